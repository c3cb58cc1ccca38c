"""Keep a run on disk, so that it can go on after whatever ends it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from loop.callback import Callback, Order
from loop.disk.files import pack
from loop.disk.store import probe, saving
from loop.disk.undisturbed import undisturbed
from loop.state import State


class Background:
    """A thread for one thing at a time; what that raises is raised here, later."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self, job: Callable[[], object]) -> None:
        """Do this; what came before must be done (`wait`)."""
        # A daemon, for it may wait for another rank, which is gone, when the process ends.
        self._thread = threading.Thread(target=self._do, args=(job,), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until all is done. Raises what it has raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise what it has raised, if it has ended."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _do(self, job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:
            # Otherwise the thread would only print it.
            self._failure = error


@dataclass
class Saver:
    """What a run's checkpoints are written with: the latest state that the run can be resumed from,
    if it is not written yet, and a clock.
    """

    folder: Path
    keep: int
    at: float  # when the last one was written
    saving: Callable[[State, Path, int], Callable[[], object]] = saving
    background: Background | None = None
    state: State | None = None
    # Places in an epoch where it is known to go well.
    tried: set[tuple[int, ...]] = field(default_factory=set)

    def write(self, last: bool = False) -> None:
        """Write the state, unless it is written already; in the background, if there is one, and it
        is not the `last`.

        That a loader's process has died is an error after it is written; none where it is the
        `last`, since nobody waits for data then.
        """
        if self.background is None or last:
            # A failure in the background must not stop the last state from being written.
            try:
                if self.background is not None:
                    self.background.wait()
            finally:
                self._write_here(last)
        elif self.state is not None:
            self.background.wait()  # so that there is one copy at most
            # In a run that donates, the next step overwrites this state while it is written.
            state, self.state, self.at = self.state.keep(), None, time.monotonic()
            # `saving` packs the state here, so what cannot be saved is an error at once.
            self.background.start(self.saving(state, self.folder, self.keep))

    def _write_here(self, last: bool) -> None:
        if self.state is None:
            return
        # When a loader's process dies, torch raises an error wherever this process is.
        with undisturbed() as waiting:
            self.saving(self.state, self.folder, self.keep)()
            self.state, self.at = None, time.monotonic()
            if last:
                waiting.clear()

    def probe(self, state: State) -> None:
        """Find out now what `write` would find out after an epoch: the first time that a run has
        come so far.
        """
        # Callbacks begin to remember things at different places of an epoch, so each kind of place
        # is tried once. Later epochs and batches are like the first.
        _, *phase = state.done  # the number of the phase in its epoch, and of its batches
        if len(phase) > 1:
            phase[1] = min(phase[1], 1)
        place = tuple(phase)
        if place not in self.tried:
            self.tried.add(place)
            pack(state.at_rest())


@dataclass(frozen=True)
class Checkpoint(Callback):
    """Write the state into a folder as the run goes on; `fit(..., resume=folder)` goes on from
    there, bit for bit.

    Written after every `batches` training batches, every `epochs` epochs, and once `seconds` have
    passed since the last one (whichever of these are given); after the last epoch; and, whatever
    they are, when the run ends in any other way: early, by Ctrl-C or SIGTERM, or by an error. Then
    it is the state of the latest whole batch; of a run that donates, none if a step had begun to
    overwrite that. The newest `keep` checkpoints stay. Each is a
    directory that is either complete or not there (see `save`). Give every run a folder of its own,
    since the newest checkpoint in it is where `resume` goes on; one that is complete is not begun
    again.

    With `background`, a thread writes while the run goes on, which needs memory for one more copy
    of the state until it is written; the last state of a run is waited for. What goes wrong there
    ends the run at the next state.

    Checkpoints of params that are not finite do not push out the newest one that is (see
    `save_in`).

    Raises ValueError if nothing says when, or a number is not positive. A folder that cannot be
    written is an OSError when the run begins, and what cannot be saved (in `state.memory`, say) a
    TypeError as soon as it is there; whatever `save_in` raises ends the run.
    """

    folder: str | Path
    batches: int | None = None
    epochs: int | None = 1
    seconds: float | None = None
    keep: int = 3
    background: bool = False
    order: ClassVar[int] = Order.FRAME
    reports: ClassVar[bool] = True

    def __post_init__(self) -> None:
        given = {"batches": self.batches, "epochs": self.epochs, "seconds": self.seconds}
        if all(value is None for value in given.values()):
            raise ValueError(
                "Checkpoint: nothing says when to write. Give batches, epochs or seconds."
            )
        for name, value in {**given, "keep": self.keep}.items():
            if value is not None and not value > 0:
                raise ValueError(f"Checkpoint: {name} must be above 0, got {value}.")

    @contextmanager
    def around_fit(self, state: State) -> Iterator[Saver]:
        """Write what there is when the run ends."""
        folder = Path(self.folder)
        probe(folder)
        behind = Background() if self.background else None
        saver = Saver(folder, self.keep, time.monotonic(), background=behind)
        del state  # its tensors would live as long as the run
        try:
            yield saver
        finally:
            saver.write(last=True)

    def committed(self, state: State) -> None:
        """Write the state if it is time."""
        saver: Saver = state.resources[self.name]
        saver.state = state
        if saver.background is not None:
            saver.background.check()
        saver.probe(state)
        if self._due(state, saver):
            saver.write()

    def overwritten(self, state: State) -> None:
        """There is no state to write until the next one."""
        saver: Saver = state.resources[self.name]
        saver.state = None

    def _due(self, state: State, saver: Saver) -> bool:
        # done is (epochs, parts of the epoch, batches). Epochs alone mean that an epoch has just
        # ended, or, if they are 0, that the run has begun.
        epochs, *phase = state.done
        if not phase and epochs:
            return epochs == state.n_epoch or (
                self.epochs is not None and epochs % self.epochs == 0
            )
        # Part 0 is training. With 0 batches, this is the state after before_train.
        trained = len(phase) == 2 and phase[0] == 0 and phase[1] > 0
        if trained and self.batches is not None and state.train_iter % self.batches == 0:
            return True
        return self.seconds is not None and time.monotonic() - saver.at >= self.seconds
