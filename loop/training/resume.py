"""Go on with a run: the state that it was in, and whether the command is the one that began it."""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optree
import torch
from torch import Tensor

from functional_sgd.tree import Tree
from loop.callback import Callback, without_reports
from loop.callbacks import Checkpoint
from loop.disk.store import checkpoints, is_checkpoint, is_finite, load_latest
from loop.learner import Learner
from loop.state import State
from loop.training.length import Length, length_of_run

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # another in every process
_LONGEST = 1_000  # characters of a repr that are kept: some show whole data sets


def begun_with(
    learner: Learner,
    state: State,
    callbacks: Sequence[object],
    hyper: Mapping[str, Tree],
    graph: bool,
) -> dict[str, Any]:
    """What a run of `fit` is begun with, apart from the state, as plain data that is kept in it.

    Callbacks that only report are left out, for the run is the same without them; and so is what is
    no Callback by class, which is made for the occasion.
    """
    deciding: dict[str, str] = {}
    for one in without_reports(callbacks):
        if isinstance(one, Callback):
            deciding[one.name] = _shown(one)
    return {
        "hyper": {**state.hyper, **hyper},
        "given": sorted(hyper),
        "optimizer": _shown(learner.opt),
        "callbacks": deciding,
        "data": {"train": _lengths(learner.data.train), "valid": _lengths(learner.data.valid)},
        # Other values of these may change last digits and dropout: a warning, not an error.
        "compile": graph,
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
    }


def to_go_on_from(
    resume: bool | str | Path,
    state: State,
    length: Length,
    hyper: Mapping[str, Tree],
    now: Mapping[str, Any],
    callbacks: Sequence[object],
) -> State | None:
    """The state that a run goes on from, None if it is to be begun. `now` is what `begun_with` says
    of this command.

    Raises ValueError where going on would be another run than the one that was begun (a hyper, the
    length, the data), and warns of what may make it one (optimizer, callbacks, torch).
    """
    if resume is False:
        return None
    if resume is True:
        stopped = state
    else:
        found = latest(resume, state)
        if found is None:
            _warn_of_another_folder(Path(resume), callbacks)
            return None
        stopped = found
    _check_within(stopped)
    begun = stopped.begun_with
    if begun:  # not in a state of a Run that was made without fit
        _check_same(begun, hyper, now)
    _check_length(stopped, length, resume)
    if begun:
        _warn_of_differences(begun, now)
        # What it was begun with stays, however often it is resumed.
        given = begun.get("given", now["given"])
        now = {**now, "hyper": begun["hyper"], "given": given}
    return stopped.replace(stopped="", begun_with=now)


def latest(folder: object, like: State) -> State | None:
    """The state of the newest checkpoint that can be read, None if there is no checkpoint.

    Raises TypeError or ValueError for what is no folder of checkpoints, and for a run with another
    seed than that of `like`.
    """
    if not isinstance(folder, (str, Path)):
        raise TypeError(
            f"fit: resume must be True, False or the folder of a Checkpoint, got {folder!r}."
        )
    _check_folder(Path(folder))
    if not checkpoints(folder):
        return None
    state = load_latest(folder, like)
    # The seed is part of the state, so the one given would have no effect.
    if state.seed != like.seed:
        raise ValueError(
            f"fit: the run in {folder} has the seed {state.seed}, but the state given has the seed "
            f"{like.seed}. Give learner.init(seed={state.seed}), or another folder to begin a new "
            f"run."
        )
    _warn_of_what_is_not_finite(Path(folder), state)
    return state


def _check_folder(folder: Path) -> None:
    if is_checkpoint(folder):
        raise ValueError(
            f"fit: resume={str(folder)!r} is a checkpoint, expected the folder that it is in. Pass "
            f"resume={str(folder.absolute().parent)!r} to go on from the newest in there, or "
            f"fit(learner, load({str(folder)!r}), ..., resume=True) to go on from this one."
        )
    if folder.exists() and not folder.is_dir():
        raise ValueError(
            f"fit: resume={str(folder)!r} is a file, expected the folder of a Checkpoint. Check "
            f"the path."
        )


def _warn_of_another_folder(folder: Path, callbacks: Sequence[object]) -> None:
    others: list[str] = []
    for one in callbacks:
        if isinstance(one, Checkpoint) and Path(one.folder).absolute() != folder.absolute():
            others.append(str(one.folder))
    if others:
        warnings.warn(
            f"fit: there is no checkpoint in resume={str(folder)!r}, so a new run begins; but it "
            f"will write into {', '.join(others)}. Give both the same folder, or the same command "
            f"will begin a new run every time.",
            UserWarning,
            stacklevel=5,  # the line that calls fit, here and below
        )


def _warn_of_what_is_not_finite(folder: Path, state: State) -> None:
    paths = checkpoints(folder)
    newest = paths[-1]
    if is_finite(newest):
        return
    advice = "Begin a new run, with a lower lr."
    last = next(filter(is_finite, reversed(paths)), None)
    if last is not None:
        advice = (
            f"The newest whose params are finite is {last}: fit(learner, load({str(last)!r}), "
            f"..., resume=True) goes on from there."
        )
    warnings.warn(
        f"fit: the newest checkpoint, {newest}, has params that are not finite (NaN or inf), so "
        f"training will not mend them. {advice}",
        UserWarning,
        stacklevel=6,
    )


def _check_within(state: State) -> None:
    if not state.done:
        raise ValueError(
            "fit: the state is not within a run, so there is nothing to resume. Leave resume out "
            "to begin one. "
            "(A state is within a run if fit was stopped and returned it, or if it comes from a "
            "checkpoint.)"
        )


def _check_length(state: State, asked: Length, resume: bool | str | Path) -> None:
    begun = length_of_run(state)
    if begun != asked:
        own = "state" if resume is True else f"load_latest({str(resume)!r})"
        raise ValueError(
            f"fit: the state is in a run of {begun}, so it cannot be resumed as one of {asked}. "
            f"Pass {begun.arguments}, or begin a new run: leave resume out. One that goes on "
            f"training from there: fit(learner, {own}, {asked.arguments})."
        )


def _check_same(
    begun: Mapping[str, Any], hyper: Mapping[str, Tree], now: Mapping[str, Any]
) -> None:
    for name, value in hyper.items():
        before = begun["hyper"].get(name)
        if not _equal(value, before):
            raise ValueError(
                f"fit: the run was begun with {name}={before!r}, so it cannot be resumed with "
                f"{name}={value!r}. Leave {name} out to go on as it was begun, or begin a new run: "
                f"leave resume out."
            )
    for name, lengths in now["data"].items():
        before = begun["data"][name]
        for what in lengths:
            # Data that cannot tell its length is noticed later, where it ends too early.
            if None in (lengths[what], before[what]):
                continue
            if lengths[what] != before[what]:
                raise ValueError(
                    f"fit: the run was begun with {before[what]} {what} in data.{name}, so it "
                    f"cannot be resumed with {lengths[what]}: it is other data. Give the data that "
                    f"it was begun with, or begin a new run: leave resume out."
                )


def _warn_of_differences(begun: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """One warning that names them all."""
    told = list(_differences(begun, now))
    if told:
        warnings.warn(
            f"fit: the run is resumed with other things than it was begun with, so it may end "
            f"otherwise: {'; '.join(told)}.",
            UserWarning,
            stacklevel=5,
        )


def _differences(begun: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What may make it another run, in words."""
    for name in ("optimizer", "compile", "torch", "threads"):
        if begun[name] != now[name]:
            yield f"{name} was {begun[name]}, is {now[name]}"
    before, after = begun["callbacks"], now["callbacks"]
    for name in before:
        if name not in after:
            yield f"the callback {name!r} is gone"
    for name in after:
        if name not in before:
            yield f"the callback {name!r} is new"
    for name in before:
        if name in after and before[name] != after[name]:
            yield f"the callback {name!r} was {before[name]}, is {after[name]}"


def _shown(value: object) -> str:
    try:
        text = _ADDRESS.sub("", repr(value))
    except Exception:  # of a user's class, which is no reason to end a run
        text = type(value).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _lengths(loader: object) -> dict[str, int | None]:
    """How long the data is, as far as it can tell."""
    tensors = getattr(loader, "tensors", None)  # of Batches
    samples = tensors[0] if tensors else getattr(loader, "dataset", None)
    return {"batches": _length(loader), "samples": _length(samples)}


def _length(value: Any) -> int | None:
    try:
        return len(value)
    except (TypeError, NotImplementedError):
        return None


def _equal(one: Tree, other: Tree) -> bool:
    """Whether two hypers, numbers or trees of them, are the same."""
    if optree.tree_structure(one) != optree.tree_structure(other):
        return False
    pairs = zip(optree.tree_leaves(one), optree.tree_leaves(other), strict=True)
    return all(_same_number(left, right) for left, right in pairs)


def _same_number(one: object, other: object) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return torch.equal(torch.as_tensor(one).cpu(), torch.as_tensor(other).cpu())
    return bool(one == other)
