"""Checkpoints of several ranks: rank 0 writes a state that all have; of pieces, each writes its
own.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

from torch import Tensor

from functional_sgd.sharded import any_distributed, distributed, local
from loop.callbacks.checkpoint import Background, Checkpoint, Saver
from loop.disk.atomic import scratch
from loop.disk.files import as_stored, pack, write
from loop.disk.finite import not_finite
from loop.disk.pieces import Piece, nobody, own_pieces, write_pieces
from loop.disk.store import probe, put_newest
from loop.ranks.group import Group
from loop.state import State

Result = TypeVar("Result")


@dataclass(frozen=True)
class SharedCheckpoint:
    """A Checkpoint, on each of the ranks."""

    checkpoint: Checkpoint
    group: Group  # which has equal pieces, if params lie on other processes than batches
    everyone: Group
    order: ClassVar[int] = Checkpoint.order
    reports: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """That of the checkpoint."""
        return self.checkpoint.name

    def around_fit(self, state: State) -> AbstractContextManager[Saver | None]:
        """Write what there is when the run ends."""
        return self._pieces() if any_distributed(state.params.values()) else self._whole()

    @contextmanager
    def _whole(self) -> Iterator[Saver | None]:
        """Rank 0 writes. Where all end alike they wait for it, since the next thing that they do
        may be to read what it has written.
        """
        own: Any = self.checkpoint.around_fit(_NOBODY) if self.everyone.rank == 0 else nullcontext()
        # Ranks end alike by themselves, or by an agreed stop, which closes the generator. After an
        # error or a second signal, another rank may never come to the collective below.
        alike, failure = False, ""
        try:
            with ExitStack() as stack:
                saver = on_all(self.everyone, stack.enter_context, own)
                try:
                    yield saver
                    alike = True
                except GeneratorExit:
                    alike = True
                    raise
        except GeneratorExit:
            # The stop on its way out, and no failure to write.
            raise
        except BaseException as error:
            failure = f"{type(error).__name__}: {error}"
            raise
        finally:
            if alike:
                failures = self.everyone.gathered(failure)
                # The rank that failed is raising its own error already.
                if not failure:
                    _check(failures)

    @contextmanager
    def _pieces(self) -> Iterator[Saver]:
        """All ranks write, but only if they end alike: by themselves, or by a stop that they have
        agreed on, which closes the run (GeneratorExit). After anything else, such as an error or a
        second signal, the others may be anywhere.
        """
        if self.checkpoint.seconds is not None:
            raise ValueError(
                "Checkpoint: ranks do not have one clock, so they cannot write their pieces every "
                f"{self.checkpoint.seconds} seconds. Give batches or epochs."
            )
        folder = Path(self.checkpoint.folder)
        on_all(self.everyone, probe, folder)
        background = Background() if self.checkpoint.background else None
        # What a thread tells the others must not come between what the run tells them.
        group = self.everyone if background is None else self.everyone.another()
        together = partial(saving_together, group=group, others=self._others)
        keep = self.checkpoint.keep
        saver = Saver(folder, keep, time.monotonic(), together, background)
        try:
            yield saver
        except BaseException as error:
            if not isinstance(error, GeneratorExit):
                # `write` below then does nothing: not even wait for the thread, which may wait for
                # a rank that is gone.
                saver.state = saver.background = None
            raise
        finally:
            saver.write(last=True)

    def _others(self, tensor: Tensor) -> bool:
        """Whether another rank, which has this piece too, writes it."""
        return self.group.rank > 0 and self.group.adds(tensor)

    def committed(self, state: State) -> None:
        """Write the state if it is time."""
        if state.resources[self.name] is not None:
            self.checkpoint.committed(state)

    def overwritten(self, state: State) -> None:
        """There is no state to write until the next one."""
        if state.resources[self.name] is not None:
            self.checkpoint.overwritten(state)


_NOBODY: Any = None  # the state that Checkpoint.around_fit does not look at


class _Packed(NamedTuple):
    """A state as it goes to the disk."""

    document: dict[str, object]  # what is in state.json
    tensors: dict[str, Tensor]  # all of them, by name
    own: dict[str, Tensor]  # the pieces that this rank writes


class _Begun(NamedTuple):
    """What a rank says before it writes."""

    scratch: str  # the directory that all write into, whose name only rank 0 knows
    place: tuple[int, tuple[int, ...]]  # (train_iter, done)
    failure: str


class _Written(NamedTuple):
    """What a rank says of what it has written."""

    pieces: dict[str, Piece]
    finite: bool


def saving_together(
    state: State,
    folder: Path,
    keep: int,
    group: Group,
    others: Callable[[Tensor], bool] = nobody,
) -> Callable[[], None]:
    """`saving` for a state in pieces, on all ranks at once: each writes its pieces into one
    directory, which appears when all of them are in it.

    That raises an error on all ranks if one of them cannot write: there its own, and OSError
    elsewhere. It raises RuntimeError if their states are not of one place in the run, for pieces of
    several states are none.
    """
    document, tensors = pack(state.at_rest())
    packed = _Packed(document, tensors, own_pieces(tensors, others))
    return partial(_save_together, state, packed, folder, keep, group)


def _save_together(state: State, packed: _Packed, folder: Path, keep: int, group: Group) -> None:
    params = {name: local(value) for name, value in state.params.items()}
    # Every failure is sent before it is raised, or the other ranks would wait for this one.
    with ExitStack() as stack:

        def open_scratch() -> Path | None:
            return stack.enter_context(scratch(folder)) if group.rank == 0 else None

        new, error = attempted(open_scratch)
        begun = group.gathered(_Begun(str(new), (state.train_iter, state.done), _said(error)))
        _check([one.failure for one in begun], error)
        places = [one.place for one in begun]
        if any(place != places[0] for place in places):
            raise RuntimeError(
                f"Checkpoint: the ranks are at different places in the run, so there is no state "
                f"to write: (train_iter, done) are {places}."
            )
        directory = Path(begun[0].scratch)

        def write_own() -> _Written:
            stored = dict(as_stored(packed.own))
            pieces = write_pieces(directory, group.rank, packed.tensors, stored)
            return _Written(pieces, finite=not not_finite(params, state.buffers))

        mine, error = attempted(write_own)
        told = group.gathered((mine, _said(error)))
        written: list[_Written] = []
        failures: list[str] = []
        for one, failure in told:
            failures.append(failure)
            if one is not None:
                written.append(one)
        _check(failures, error)

        def write_rest() -> None:
            if group.rank == 0:
                pieces = _by_tensor(packed.tensors, written)
                write(directory, packed.document, packed.tensors, pieces)
                finite = all(one.finite for one in written)
                put_newest(directory, folder, state.train_iter, finite, keep)

        on_all(group, write_rest)


def _by_tensor(
    tensors: Mapping[str, Tensor], written: Sequence[_Written]
) -> dict[str, list[Piece]]:
    """The pieces of all ranks; an empty list for a tensor in pieces of which nobody wrote any."""
    pieces: dict[str, list[Piece]] = {}
    for name, tensor in tensors.items():
        if distributed(tensor):
            pieces[name] = []
    for one in written:
        for name, piece in one.pieces.items():
            pieces[name].append(piece)
    return pieces


def on_all(group: Group, work: Callable[..., Result], *args: Any) -> Result | None:
    """What `work(*args)` returns on this rank, once all ranks have done theirs. Raises what it
    raises, and OSError where another rank has failed.
    """
    result, error = attempted(work, *args)
    _check(group.gathered(_said(error)), error)
    return result


def attempted(work: Callable[..., Result], *args: Any) -> tuple[Result | None, Exception | None]:
    """What `work(*args)` returns, or what it raises."""
    try:
        return work(*args), None
    except Exception as error:
        return None, error


def _said(error: Exception | None) -> str:
    """A failure, for the other ranks."""
    return "" if error is None else f"{type(error).__name__}: {error}"


def _check(failures: list[str], own: Exception | None = None) -> None:
    """Raise this rank's own failure, or OSError for that of another."""
    if own is not None:
        raise own
    for rank, failure in enumerate(failures):
        if failure:
            raise OSError(f"Checkpoint: rank {rank} could not write its part: {failure}")
