"""Validation on the average: who sees it, and that every way out puts back what was trained."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from loop import State, fit, predict, trace, validate
from loop.callbacks.average import TRAINED, AverageParams, at_average
from loop.run.signals import Cancel, CancelBatch, CancelEpoch, CancelFit, CancelValidate
from tests.comparing import assert_same
from tests.loop.helpers import (
    assert_same_run,
    everywhere,
    learned,
    learner,
    net,
    on,
    raise_once,
    raiser,
)

AVERAGE = AverageParams(decay=0.5)
PLAIN = learner(net())
MINE = learner(net(), callbacks=[AVERAGE])
START = MINE.init()
RUN = fit(MINE, START, 2)

IN_A_BATCH = [
    (event, signal)
    for event in ("before_batch", "after_pred", "after_loss", "after_cancel_batch", "after_batch")
    for signal in (CancelBatch, CancelValidate, CancelEpoch, CancelFit)
    if signal is not CancelBatch or event in ("before_batch", "after_pred", "after_loss")
]
AROUND = [
    (event, signal)
    for event in ("before_validate", "after_cancel_validate", "after_validate")
    for signal in (CancelValidate, CancelEpoch, CancelFit)
    if signal is not CancelValidate or event == "before_validate"
]


def in_validation(act: Any) -> Any:
    """A handler that acts in the validation phase only."""
    return lambda state: None if state.training else act(state)


def test_validation_of_a_run_is_on_the_average() -> None:
    assert RUN.history.rows[-1]["valid_loss"] == validate(PLAIN, at_average(RUN))["valid_loss"]
    assert RUN.history.rows[-1]["valid_loss"] != validate(PLAIN, RUN)["valid_loss"]


def test_validate_and_predict_are_on_the_average() -> None:
    assert validate(MINE, RUN) == validate(PLAIN, at_average(RUN))
    assert_same(predict(MINE, RUN), predict(PLAIN, at_average(RUN)))
    assert not torch.equal(predict(MINE, RUN), predict(PLAIN, RUN))


def test_they_can_be_on_what_was_trained() -> None:
    mine = replace(MINE, callbacks=[replace(AVERAGE, evaluate=False)])
    assert validate(mine, RUN) == validate(PLAIN, RUN)
    assert fit(mine, START, 2).history.rows == fit(PLAIN, START, 2).history.rows


def test_validation_before_any_step_is_on_what_there_is() -> None:
    assert validate(MINE, START) == validate(PLAIN, START)


def test_only_params_and_buffers_are_replaced_and_only_in_validation_batches() -> None:
    last: dict[str, Any] = {}
    for event, state in trace(MINE, START, 2):
        if TRAINED in state.memory:
            assert not state.training
            assert event in ("before_batch", "after_pred", "after_loss")
            assert_same(state.params, at_average(state).params)
            assert_same(state.buffers, at_average(state).buffers)
            assert state.opt_state is last["opt_state"]
        else:
            last = {"opt_state": state.opt_state, "params": state.params}
            if event == "before_validate":
                trained = state.params
            if event == "after_validate":
                assert state.params is trained


@pytest.mark.parametrize("order", [-1, 100])
@pytest.mark.parametrize(("event", "signal"), IN_A_BATCH)
def test_a_signal_in_a_validation_batch_puts_back(
    event: str, signal: type[Cancel], order: int
) -> None:
    handlers = {event: in_validation(raise_once(signal))}
    if event == "after_cancel_batch":
        handlers["after_loss"] = in_validation(raise_once(CancelBatch))
    seen = []
    watch = on(
        "watch",
        200,
        after_epoch=lambda state: seen.append(state),
        after_fit=lambda state: seen.append(state),
    )
    found = fit(MINE, START, 2, [on(order=order, **handlers), watch])
    assert TRAINED not in found.memory
    assert all(TRAINED not in state.memory for state in seen)
    epochs = 1 if signal is CancelFit else 2
    assert_same(learned(found), learned(fit(PLAIN, START, epochs)))
    assert_same(at_average(found).params, at_average(fit(MINE, START, epochs)).params)


@pytest.mark.parametrize(("event", "signal"), AROUND)
def test_a_signal_around_the_validation_puts_back(event: str, signal: type[Cancel]) -> None:
    handlers = {event: raise_once(signal)}
    if event == "after_cancel_validate":
        handlers["after_loss"] = in_validation(raise_once(CancelValidate))
    found = fit(MINE, START, 2, [on(order=-1, **handlers)])
    assert_same(learned(found), learned(fit(PLAIN, START, 1 if signal is CancelFit else 2)))


@pytest.mark.parametrize("first", [CancelValidate, CancelEpoch])
def test_a_signal_out_of_the_handling_of_a_signal_puts_back(first: type[Cancel]) -> None:
    """The next scope's after_cancel is the one that remains."""
    extra = on(
        order=-1,
        after_loss=in_validation(raise_once(first)),
        **{f"after_cancel_{first.scope}": raise_once(CancelFit)},
    )
    assert_same(learned(fit(MINE, START, 2, [extra])), learned(fit(PLAIN, START, 1)))


def test_a_signal_with_a_state_of_the_middle_puts_back() -> None:
    def give_up(state: State) -> None:
        raise CancelFit(state)

    found = fit(MINE, START, 1, [on(order=100, after_pred=in_validation(give_up))])
    assert_same(learned(found), learned(fit(PLAIN, START, 1)))


@pytest.mark.parametrize(
    "event", ["before_batch", "after_pred", "after_batch", "after_validate", "after_epoch"]
)
def test_the_state_of_an_error_has_what_was_trained(event: str) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        fit(MINE, START, 1, [on(order=100, **{event: in_validation(raiser(ZeroDivisionError))})])
    state = caught.value.state
    assert TRAINED not in state.memory
    assert_same(learned(state), learned(fit(PLAIN, START, 1)))


@pytest.mark.parametrize("at", range(10))
def test_a_run_stopped_in_validation_has_what_was_trained_and_goes_on_bit_for_bit(at: int) -> None:
    """At each of before_validate, two batches of four events, and after_validate."""
    committed: list[State] = []
    events = iter(range(10))

    def stop(event: str, state: State) -> None:
        if (
            not state.training
            and "epoch" not in event
            and "fit" not in event
            and next(events) == at
        ):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(
            MINE,
            START,
            2,
            [everywhere(stop, order=100), on("observer", committed=committed.append)],
        )
    state = committed[-1].at_rest()
    assert TRAINED not in state.memory
    assert_same(learned(state), learned(fit(PLAIN, START, 1)))
    assert_same_run(fit(MINE, state, 2, resume=True), RUN)


@pytest.mark.parametrize("event", ["before_batch", "after_pred", "after_loss"])
def test_a_state_from_the_middle_of_a_validation_batch_can_begin_a_run(event: str) -> None:
    for name, state in trace(MINE, START, 1):
        if name == event and not state.training:
            break
    assert TRAINED in state.memory
    found, expected = fit(MINE, state, 1), fit(MINE, fit(MINE, START, 1).replace(epochs_seen=0), 1)
    assert_same(found.params, expected.params)
    assert TRAINED not in found.memory


def test_of_two_averages_the_later_is_validated_on_and_what_was_trained_comes_back() -> None:
    class Slow(AverageParams):
        order = 41

    mine = replace(MINE, callbacks=[AVERAGE, Slow(decay=0.9)])
    found = fit(mine, START, 2)
    assert_same(learned(found), learned(fit(PLAIN, START, 2)))
    expected = validate(PLAIN, at_average(found, "slow"))["valid_loss"]
    assert found.history.rows[-1]["valid_loss"] == expected
    assert expected != validate(PLAIN, at_average(found))["valid_loss"]
