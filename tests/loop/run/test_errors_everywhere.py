"""An error in any place: it says where, every bracket is closed, and the run goes on from the state
it carries.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from loop import (
    AverageParams,
    CancelBackward,
    CancelBatch,
    CancelEpoch,
    CancelFit,
    CancelStep,
    CancelTrain,
    CancelValidate,
    Checkpoint,
    GradientAccumulation,
    Learner,
    ParamScheduler,
    SignalError,
    State,
    fit,
    load_latest,
    validate,
)
from loop.disk.store import checkpoints
from tests.loop.helpers import (
    EVENTS,
    SCOPES,
    STAGES,
    Kept,
    assert_at_rest,
    assert_same_run,
    full,
    on,
)
from tests.loop.run.test_brackets import assert_nested, bracket
from tests.loop.saving import identical

EPOCHS = 2
NAMES = (*SCOPES, *STAGES)
CANCELLED_IN = {
    "fit": ("after_validate", CancelFit),
    "epoch": ("before_validate", CancelEpoch),
    "train": ("after_loss", CancelTrain),
    "validate": ("after_pred", CancelValidate),
    "batch": ("after_pred", CancelBatch),
    "backward": ("before_backward", CancelBackward),
    "step": ("before_step", CancelStep),
}
"""Scope -> where, in the second batch of its phase (if in a batch) of the second epoch, its signal
is raised.
"""


class Broken(Exception):
    """Nothing that the library knows."""


def signals(scope: str | None) -> list[Any]:
    """A callback that cancels this scope in the second epoch, if one is given."""
    if scope is None:
        return []
    event, signal = CANCELLED_IN[scope]

    def cancel(state: State) -> None:
        in_batch = event not in ("after_validate", "before_validate")
        if state.epoch == 1 and (
            not in_batch or (state.iter == 1 and state.training is not (scope == "validate"))
        ):
            raise signal(state)

    return [on("canceller", order=80, **{event: cancel})]


def everyone() -> list[Any]:
    """Callbacks that have something to lose."""
    return [
        ParamScheduler({"lr": lambda share: 0.05 * (1 - share)}),
        GradientAccumulation(batches=2),
        AverageParams(0.9),
    ]


MINE: Learner = full(callbacks=everyone())
START = MINE.init(seed=2)


def failing(place: str) -> Callable[[State], None]:
    """A handler that fails in the second epoch, or where there is just one."""

    def handle(state: State) -> None:
        if state.epoch == 1 or place == "before_fit":
            raise Broken

    return handle


def opening(state: State) -> AbstractContextManager[None]:
    """A bracket that does not open."""
    raise Broken


@contextmanager
def closing(state: State) -> Iterator[None]:
    """A bracket that fails to close."""
    yield
    if state.epoch == 1 or not state.event:
        raise Broken


def check(callback: Any, scope: str | None, where: str, folder: Any) -> Any:
    """Run with a callback that fails; check what it leaves behind; go on without it."""
    others = signals(scope)
    expected = fit(MINE, START, EPOCHS, others)
    log: list[str] = []
    brackets = on("brackets", **{f"around_{name}": bracket(log, name) for name in NAMES})
    kept, flags = Kept(START), [layer.training for layer in MINE.model.modules()]
    with pytest.raises(Broken) as caught:
        fit(MINE, START, EPOCHS, [brackets, Checkpoint(folder, epochs=99), *others, callback])
    error: Any = caught.value
    kept.check()
    assert [layer.training for layer in MINE.model.modules()] == flags
    assert_nested(log)
    assert [where in note for note in error.__notes__] == [True]
    assert_at_rest(error.state)
    assert fit(MINE, error.state, 1).train_iter == error.state.train_iter + 3
    if error.state.done:
        assert identical(vars(load_latest(folder)), vars(error.state))
        assert_same_run(fit(MINE, error.state, EPOCHS, others, resume=True), expected)
    else:
        assert checkpoints(folder) == []
        assert error.state.train_iter == 0
    return error


@pytest.mark.parametrize("event", EVENTS)
def test_an_error_in_any_event(event: str, tmp_path: Any) -> None:
    scope = event.removeprefix("after_cancel_") if "cancel" in event else None
    error = check(
        on("bad", order=90, **{event: failing(event)}),
        scope,
        f"by callback 'bad' in {event}, ",
        tmp_path,
    )
    assert error.state.epoch == (0 if event in ("before_fit", "before_epoch") else 1)


@pytest.mark.parametrize("name", NAMES)
def test_an_error_in_a_bracket_that_opens(name: str, tmp_path: Any) -> None:
    check(
        on("bad", **{f"around_{name}": opening}),
        None,
        f"by callback 'bad' in around_{name}, ",
        tmp_path,
    )


@pytest.mark.parametrize("name", NAMES)
def test_an_error_in_a_bracket_that_closes(name: str, tmp_path: Any) -> None:
    check(
        on("bad", **{f"around_{name}": closing}),
        None,
        f"by callback 'bad' in around_{name}, closing, ",
        tmp_path,
    )


def test_an_error_in_an_observer(tmp_path: Any) -> None:
    error = check(
        on("bad", committed=failing("committed")),
        None,
        "by callback 'bad' in committed, ",
        tmp_path,
    )
    assert error.state.done == (1, 0)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_signal_from_a_bracket_that_closes_when_its_scope_is_over(scope: str) -> None:
    signal = CANCELLED_IN[scope][1]

    @contextmanager
    def around(state: State) -> Iterator[None]:
        yield
        raise signal

    with pytest.raises(
        SignalError,
        match=f"{signal.__name__} was raised by callback 'bad' in around_{scope}, closing",
    ):
        fit(MINE, START, EPOCHS, [on("bad", **{f"around_{scope}": around})])


@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_from_the_bracket_of_a_stage_that_closes(stage: str) -> None:
    """It needs no state: the run goes on as after a signal of any event."""
    seen: list[int] = []

    @contextmanager
    def around(state: State) -> Iterator[None]:
        yield
        raise CancelBatch

    watch = on(
        "watch",
        after_cancel_batch=lambda state: seen.append(state.iter) if state.training else None,
    )
    assert (
        fit(MINE, START, 1, [on("canceller", **{f"around_{stage}": around}), watch]).train_iter == 3
    )
    assert seen == (
        [1, 2] if stage == "update" else [0, 1, 2]
    )  # the first batch has no step of its own


@pytest.mark.parametrize("stage", STAGES)
def test_an_error_passes_through_the_brackets_of_a_stage(stage: str) -> None:
    """The bracket sees the error of the work, and nothing of the transition stays."""
    seen: list[type[BaseException] | None] = []

    class Watch:
        def __enter__(self) -> None: ...

        def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
            seen.append(kind)

    @contextmanager
    def around(state: State) -> Iterator[None]:
        yield
        raise Broken

    watch, bad = (
        on(f"{index}", index, **{f"around_{stage}": act})
        for index, act in enumerate((lambda s: Watch(), around))
    )
    with pytest.raises(Broken):
        fit(MINE, START, 1, [watch, bad])
    assert seen == [Broken]


@pytest.mark.parametrize(
    "place", ["after_pred", "after_validate", "around_predict", "around_validate"]
)
def test_an_error_in_validate(place: str) -> None:
    mine = full(callbacks=[on("bad", **{place: opening})])
    kept = Kept(START)
    with pytest.raises(Broken) as caught:
        validate(mine, START)
    kept.check()
    assert f"by callback 'bad' in {place}, batch " in caught.value.__notes__[0]
    assert caught.value.state.done == ()  # type: ignore[attr-defined]
