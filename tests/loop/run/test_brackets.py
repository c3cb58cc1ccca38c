"""Brackets: open around a scope or stage, closed on every way out, in reverse order; resources are
there meanwhile.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from loop import (
    Cancel,
    CancelBackward,
    CancelBatch,
    CancelEpoch,
    CancelFit,
    CancelStep,
    CancelTrain,
    State,
    fit,
    trace,
    validate,
)
from tests.loop.helpers import (
    SCOPES,
    STAGES,
    assert_at_rest,
    everywhere,
    learner,
    on,
    raise_once,
    raiser,
)

LEARNER = learner()
START = LEARNER.init()


def bracket(log: list[str], name: str) -> Callable[[State], AbstractContextManager[str]]:
    """A bracket that writes down its opening and closing."""

    @contextmanager
    def around(state: State) -> Iterator[str]:
        log.append(f"open {name}")
        try:
            yield f"resource of {name}"
        finally:
            log.append(f"close {name}")

    return around


def all_brackets(log: list[str]) -> Any:
    return on("all", **{f"around_{name}": bracket(log, name) for name in (*SCOPES, *STAGES)})


def assert_nested(log: list[str]) -> None:
    """Whatever was opened has been closed, innermost first."""
    stack: list[str] = []
    for line in log:
        what, name = line.split()
        if what == "open":
            stack.append(name)
        else:
            assert stack.pop() == name
    assert stack == []
    assert log


def test_a_bracket_is_open_from_before_before_x_to_after_after_x() -> None:
    log: list[str] = []
    spy = everywhere(lambda event, state: log.append(event), order=100)
    fit(LEARNER, START, 1, [on("mine", around_train=bracket(log, "train")), spy])
    assert log[log.index("open train") + 1] == "before_train"
    assert log[log.index("close train") - 1] == "after_train"
    assert log[log.index("close train") + 1] == "before_validate"


@pytest.mark.parametrize("scope", SCOPES)
def test_every_scope_can_have_a_bracket(scope: str) -> None:
    log: list[str] = []
    fit(LEARNER, START, 1, [on(**{f"around_{scope}": bracket(log, scope)})])
    times = {"batch": 5, "backward": 3, "step": 3}.get(scope, 1)
    assert log == [f"open {scope}", f"close {scope}"] * times


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_can_have_a_bracket(stage: str) -> None:
    """3 training and 2 validation batches."""
    log: list[str] = []
    fit(LEARNER, START, 1, [on(**{f"around_{stage}": bracket(log, stage)})])
    assert (
        log
        == [f"open {stage}", f"close {stage}"]
        * {"predict": 5, "loss": 5, "gradients": 3, "update": 3}[stage]
    )


def test_the_brackets_of_stages_are_just_around_them() -> None:
    """Of events and scopes, only their own batch, backward and step are around."""
    log: list[str] = []
    spy = everywhere(lambda event, state: log.append(event), order=100)
    fit(LEARNER, START, 1, [all_brackets(log), spy])
    first = log[log.index("before_batch") : log.index("close batch")]
    assert " ".join(first) == (
        "before_batch open predict close predict after_pred open loss close loss after_loss open "
        "backward "
        "before_backward open gradients close gradients after_backward close backward open step "
        "before_step "
        "open update close update after_step close step after_batch"
    )


def test_the_bracket_of_a_stage_is_open_while_it_works() -> None:
    """The model is called between opening and closing, and so is the loss."""
    log: list[str] = []
    mine = learner(loss=lambda pred, y: log.append("loss") or (pred - y).square().mean())
    hook = mine.model.register_forward_hook(lambda *_: log.append("model"))
    fit(
        mine,
        mine.init(),
        1,
        [on(around_predict=bracket(log, "predict"), around_loss=bracket(log, "loss"))],
    )
    hook.remove()
    assert log == ["open predict", "model", "close predict", "open loss", "loss", "close loss"] * 5


@pytest.mark.parametrize(
    ("stage", "event"), [("gradients", "before_backward"), ("update", "before_step")]
)
def test_the_bracket_of_a_stage_that_is_cancelled_does_not_open(stage: str, event: str) -> None:
    log: list[str] = []
    signal = CancelBackward if stage == "gradients" else CancelStep
    cancel = on("cancel", **{event: raise_once(signal, at=1)})
    fit(LEARNER, START, 1, [on(**{f"around_{stage}": bracket(log, stage)}), cancel])
    assert log == [f"open {stage}", f"close {stage}"] * 2


def test_brackets_of_one_stage_close_in_reverse_order_of_opening() -> None:
    log: list[str] = []
    first, second = (
        on("a", -1, around_loss=bracket(log, "a")),
        on("b", 1, around_loss=bracket(log, "b")),
    )
    validate(learner(callbacks=[second, first]), START)
    assert log == ["open a", "open b", "close b", "close a"] * 2


def test_the_bracket_of_a_stage_lends_nothing() -> None:
    """Its resource would be gone before any handler could use it; that of the scope stays."""
    seen: list[dict[str, Any]] = []
    both = on("both", around_batch=bracket([], "batch"), around_predict=bracket([], "predict"))
    fit(LEARNER, START, 1, [both, on(after_pred=lambda state: seen.append(dict(state.resources)))])
    assert seen == [{"both": "resource of batch"}] * 5


@pytest.mark.parametrize("stage", STAGES)
def test_brackets_of_a_stage_close_when_its_work_fails(stage: str) -> None:
    """A shape that fits nowhere, a loss that is none, a loss without a graph, and gradients of
    nothing.
    """
    log: list[str] = []
    breaking = {
        "predict": on(before_batch=lambda state: state.replace(xb=(None,))),
        "loss": on(after_pred=lambda state: state.replace(yb=("no target",))),
        "gradients": on(after_loss=lambda state: state.replace(loss=state.loss.detach())),
        "update": on(before_step=lambda state: state.replace(grads={})),
    }
    with pytest.raises(Exception) as caught:  # noqa: PT011
        fit(LEARNER, START, 1, [all_brackets(log), breaking[stage]])
    assert f"raised in [{stage}], training batch 0 of epoch 0" in caught.value.__notes__[0]
    assert_nested(log)
    assert f"close {stage}" in log


@pytest.mark.parametrize("signal", [CancelBatch, CancelTrain, CancelEpoch, CancelFit])
@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_from_the_bracket_of_a_stage_is_a_signal(stage: str, signal: type[Cancel]) -> None:
    """Raised while it opens: the work is not done, and the run goes on as after any other."""
    log: list[str] = []
    act = raise_once(signal, at=1)

    @contextmanager
    def around(state: State) -> Iterator[None]:
        act()
        yield

    end = fit(
        LEARNER, START, 2, [all_brackets(log), on("canceller", 1, **{f"around_{stage}": around})]
    )
    assert_nested(log)
    assert (
        end.opt_state["step"].max()
        == {CancelBatch: 5, CancelTrain: 4, CancelEpoch: 4, CancelFit: 1}[signal]
    )
    assert_at_rest(end)


def test_brackets_of_one_scope_close_in_reverse_order_of_opening() -> None:
    log: list[str] = []
    first, second = (
        on("a", -1, around_fit=bracket(log, "a")),
        on("b", 1, around_fit=bracket(log, "b")),
    )
    fit(LEARNER, START, 0, [second, first])
    assert log == ["open a", "open b", "close b", "close a"]


@pytest.mark.parametrize("signal", [CancelBatch, CancelTrain, CancelEpoch, CancelFit])
@pytest.mark.parametrize("event", ["before_batch", "after_pred", "before_step", "after_backward"])
def test_brackets_close_on_signals(event: str, signal: type[Cancel]) -> None:
    log: list[str] = []
    fit(LEARNER, START, 2, [all_brackets(log), on(**{event: raise_once(signal)})])
    assert_nested(log)


@pytest.mark.parametrize(
    "event",
    [
        "before_fit",
        "before_train",
        "after_pred",
        "before_backward",
        "after_step",
        "after_epoch",
        "after_fit",
    ],
)
def test_brackets_close_on_errors(event: str) -> None:
    log: list[str] = []
    with pytest.raises(ZeroDivisionError):
        fit(LEARNER, START, 1, [all_brackets(log), on(**{event: raiser(ZeroDivisionError)})])
    assert_nested(log)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_brackets_close_on_exits(error: type[BaseException]) -> None:
    log: list[str] = []
    with pytest.raises(error):
        fit(LEARNER, START, 1, [all_brackets(log), on(after_loss=raiser(error))])
    assert_nested(log)


def test_brackets_close_when_a_trace_is_closed_early() -> None:
    log: list[str] = []
    running = trace(LEARNER, START, 1, [all_brackets(log)])
    for event, _ in running:
        if event == "before_step":
            break
    running.close()
    assert_nested(log)
    assert log[-1] == "close fit"


def test_brackets_close_if_a_later_one_fails_to_open() -> None:
    log: list[str] = []
    callbacks = [
        on("a", around_batch=bracket(log, "batch")),
        on("b", around_batch=raiser(OSError("no file"))),
    ]
    with pytest.raises(OSError, match="no file") as caught:
        fit(LEARNER, START, 1, callbacks)
    assert log == ["open batch", "close batch"]
    assert any("callback 'b' in around_batch" in note for note in caught.value.__notes__)


def test_an_error_passes_through_the_brackets_as_itself() -> None:
    seen: list[type[BaseException] | None] = []

    class Watch:
        def __enter__(self) -> None: ...

        def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
            seen.append(kind)

    with pytest.raises(ZeroDivisionError):
        fit(
            LEARNER,
            START,
            1,
            [on("a", around_step=lambda state: Watch()), on(before_step=raiser(ZeroDivisionError))],
        )
    assert seen == [ZeroDivisionError]


def test_a_resource_is_in_the_state_inside_its_scope_and_nowhere_else() -> None:
    inside, depth = set(), 0
    mine = on("mine", around_batch=bracket([], "batch"))
    for event, state in trace(LEARNER, START, 2, [mine]):
        depth += event == "before_batch"
        assert ("mine" in state.resources) == (depth > 0), event
        if depth:
            inside.add(state.resources["mine"])
        depth -= event == "after_batch"
    assert inside == {"resource of batch"}


@pytest.mark.parametrize("signal", [CancelTrain, CancelEpoch, CancelFit])
def test_a_resource_is_gone_when_a_signal_has_left_its_scope(signal: type[Cancel]) -> None:
    """Its bracket is closed by then: using it would be using a closed file."""
    mine = on("mine", around_batch=bracket([], "batch"))
    running = trace(LEARNER, START, 1, [mine, on(after_loss=raise_once(signal))])
    held = next(
        "mine" in state.resources for event, state in running if event.startswith("after_cancel")
    )
    running.close()
    assert not held


def test_resources_of_several_scopes_are_there_together() -> None:
    log: list[str] = []
    callbacks = [
        on("outer", around_fit=bracket(log, "fit")),
        on("inner", around_batch=bracket(log, "batch")),
    ]
    running = trace(LEARNER, START, 1, callbacks)
    state = next(state for event, state in running if event == "after_pred")
    running.close()
    assert dict(state.resources) == {"outer": "resource of fit", "inner": "resource of batch"}


def test_the_bracket_of_a_callback_sees_the_state_at_the_opening() -> None:
    seen: list[int] = []

    @contextmanager
    def around(state: State) -> Iterator[None]:
        seen.append(state.train_iter)
        yield

    fit(LEARNER, START, 1, [on(around_batch=around)])
    assert seen == [0, 1, 2, 3, 3]


@pytest.mark.parametrize("act", [None, CancelFit, CancelBatch])
def test_no_resource_is_left_in_the_last_state(act: type[Cancel] | None) -> None:
    extra = [on(after_loss=raise_once(act))] if act else []
    assert_at_rest(fit(LEARNER, START, 1, [all_brackets([]), *extra]))


def test_a_state_from_the_middle_of_a_trace_can_start_another_run() -> None:
    """A state is a checkpoint, wherever it was seen."""
    running = trace(LEARNER, START, 1, [all_brackets([])])
    middle = next(state for event, state in running if event == "after_step")
    running.close()
    assert_at_rest(fit(LEARNER, middle, 1))
