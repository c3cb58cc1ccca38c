"""What a signal carries, where else than in a callback it can be raised, and what the run goes on
from.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from functional_sgd import sgd
from loop import (
    Cancel,
    CancelBackward,
    CancelBatch,
    CancelEpoch,
    CancelFit,
    CancelStep,
    CancelTrain,
    CancelValidate,
    DataLoaders,
    SignalError,
    State,
    fit,
    trace,
    validate,
)
from tests.comparing import assert_same
from tests.loop.helpers import (
    assert_at_rest,
    batches,
    learner,
    linear,
    losses,
    on,
    raise_once,
    raiser,
)

LEARNER = learner()
START = LEARNER.init()
MARK = {"weight": torch.full((2, 2), 7.0), "bias": torch.full((2,), 7.0)}

CARRIED = [
    (CancelFit, "after_loss", "after_cancel_fit"),
    (CancelEpoch, "after_step", "after_cancel_epoch"),
    (CancelTrain, "after_batch", "after_cancel_train"),
    (CancelValidate, "before_validate", "after_cancel_validate"),
    (CancelBatch, "after_pred", "after_cancel_batch"),
    (CancelBackward, "before_backward", "after_cancel_backward"),
    (CancelStep, "before_step", "after_cancel_step"),
]


def raise_with(signal: type[Cancel], change: Callable[[State], State]) -> Callable[[State], None]:
    """A handler that raises the signal with a changed state, the first time."""
    waiting = [True]

    def act(state: State) -> None:
        if waiting.pop() if waiting else False:
            raise signal(change(state))

    return act


def seen_at(
    event: str, signal: type[Cancel], raised_in: str, change: Callable[[State], State] | None
) -> State:
    """The state of the first such event of a run in which the signal is raised."""
    act = raise_with(signal, change) if change else raise_once(signal)
    for name, state in trace(LEARNER, START, 1, [on(**{raised_in: act})]):
        if name == event:
            return state
    raise AssertionError(f"no {event}")


@pytest.mark.parametrize(("signal", "raised_in", "event"), CARRIED)
def test_the_run_goes_on_from_the_state_that_a_signal_carries(
    signal: type[Cancel], raised_in: str, event: str
) -> None:
    assert_same(
        seen_at(event, signal, raised_in, lambda state: state.replace(params=MARK)).params, MARK
    )


@pytest.mark.parametrize(("signal", "raised_in", "event"), CARRIED)
def test_a_signal_without_a_state_goes_on_from_the_state_at_its_event(
    signal: type[Cancel], raised_in: str, event: str
) -> None:
    """So what an earlier callback did at the same event is kept."""
    earlier = on("earlier", -1, **{raised_in: lambda state: state.remember("earlier", raised_in)})
    running = trace(LEARNER, START, 1, [earlier, on(**{raised_in: raise_once(signal)})])
    state = next(state for name, state in running if name == event)
    running.close()
    assert state.memory["earlier"] == raised_in


def test_a_signal_class_does_as_well_as_an_instance() -> None:
    assert fit(LEARNER, START, 1, [on(before_batch=raiser(CancelFit))]).train_iter == 0


def test_a_signal_from_the_middle_of_a_batch_keeps_the_fields_of_the_batch_until_it_ends() -> None:
    assert seen_at("after_cancel_batch", CancelBatch, "after_loss", None).loss is not None


def test_a_signal_that_leaves_the_batch_leaves_its_fields_behind() -> None:
    state = seen_at("after_cancel_train", CancelTrain, "after_loss", None)
    assert (state.xb, state.yb, state.pred, state.loss, state.grads) == (None,) * 5


def test_a_run_can_go_back_to_a_state_from_before_it() -> None:
    """An undo: CancelFit with the state that fit was given."""
    end = fit(LEARNER, START, 2, [on(after_epoch=raiser(CancelFit(START)))])
    assert_same(end.params, START.params)
    assert end.train_iter == 0
    assert_at_rest(end)


def test_going_back_to_an_earlier_state_keeps_the_share_of_the_run() -> None:
    """n_epoch is the run's, whatever state a callback returns: pct_train stays between 0 and 1."""
    shares = []
    callbacks = [
        on(
            after_epoch=lambda state: START,
            before_batch=lambda state: shares.append(state.pct_train),
        )
    ]
    fit(learner(data=DataLoaders(batches(2, 1))), START, 4, callbacks)
    assert shares == pytest.approx([0, 1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8])


def test_a_cancelled_step_leaves_params_and_optimizer_alone() -> None:
    end = fit(LEARNER, START, 1, [on(before_step=raiser(CancelStep))])
    assert_same((end.params, end.opt_state), (START.params, START.opt_state))
    assert end.train_iter == 3


def test_gradients_can_still_be_read_after_a_cancelled_step() -> None:
    assert seen_at("after_step", CancelStep, "before_step", None).grads is not None


def test_no_gradients_no_step_after_a_cancelled_backward() -> None:
    end = fit(LEARNER, START, 1, [on(before_backward=raiser(CancelBackward))])
    assert_same((end.params, end.opt_state), (START.params, START.opt_state))


def test_a_cancelled_backward_can_bring_its_own_gradients() -> None:
    """Then there is a step: sgd with lr 0.1 on gradients of 1, three times."""
    ones = {name: torch.ones_like(value) for name, value in START.params.items()}

    def act(state: State) -> None:
        raise CancelBackward(state.replace(grads=ones))

    mine = learner(opt=sgd(lr=0.1))
    end = fit(mine, mine.init(), 1, [on(before_backward=act)])
    torch.testing.assert_close(end.params["weight"], START.params["weight"] - 0.3)


def test_a_cancelled_batch_does_not_disturb_the_next() -> None:
    """Three batches of which the middle one is cancelled, and the two others alone: the same."""
    data = batches(3, seed=1)
    cancelled = fit(LEARNER, START, 1, [on(before_batch=raise_once(CancelBatch, at=1))])
    alone = fit(learner(data=DataLoaders([data[0], data[2]])), START, 1)
    assert_same(cancelled.params, alone.params)
    assert losses(cancelled) == losses(alone)


def test_a_batch_cancelled_before_its_loss_is_known_is_not_recorded() -> None:
    end = fit(LEARNER, START, 1, [on(after_pred=raise_once(CancelBatch))])
    assert len(end.history.losses) == 2


def test_a_cancelled_epoch_has_a_row() -> None:
    end = fit(LEARNER, START, 2, [on(before_batch=raise_once(CancelEpoch))])
    assert [row["epoch"] for row in end.history.rows] == [0, 1]
    assert end.history.rows[0]["valid_loss"] is None


def test_stopping_after_ten_steps() -> None:
    def act(state: State) -> None:
        if state.opt_state["step"].max() == 10:
            raise CancelFit(state)

    assert fit(LEARNER, START, 100, [on(after_step=act)]).opt_state["step"].max() == 10


class Cancelling(nn.Module):
    """A layer that raises instead of computing."""

    def __init__(self, signal: BaseException | type[BaseException], at: int) -> None:
        super().__init__()
        self.inner = linear()
        self.act = raise_once(signal, at)

    def forward(self, x: Tensor) -> Tensor:
        self.act()
        return self.inner(x)


def cancelling_loss(signal: type[Cancel]) -> Callable[..., Tensor]:
    act = raise_once(signal, at=1)
    return lambda pred, y: act() or mse_loss(pred, y)


class Loader:
    """Three batches, of which one is a signal instead."""

    def __init__(self, signal: type[Cancel], at: int = 1) -> None:
        self.signal, self.at = signal, at

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index, batch in enumerate(batches(3, seed=1)):
            if index == self.at:
                raise self.signal
            yield batch


@pytest.mark.parametrize(
    ("signal", "steps"), [(CancelBatch, 2), (CancelTrain, 1), (CancelEpoch, 1), (CancelFit, 1)]
)
def test_the_model_may_raise_a_signal(signal: type[Cancel], steps: int) -> None:
    mine = learner(Cancelling(signal, at=1))
    assert fit(mine, mine.init(), 1).opt_state["step"].max() == steps


@pytest.mark.parametrize(
    ("signal", "steps"), [(CancelBatch, 2), (CancelTrain, 1), (CancelEpoch, 1), (CancelFit, 1)]
)
def test_the_loss_may_raise_a_signal(signal: type[Cancel], steps: int) -> None:
    mine = learner(loss=cancelling_loss(signal))
    assert fit(mine, mine.init(), 1).opt_state["step"].max() == steps


@pytest.mark.parametrize("signal", [CancelTrain, CancelEpoch, CancelFit])
def test_the_loader_may_raise_a_signal(signal: type[Cancel]) -> None:
    mine = learner(data=DataLoaders(Loader(signal)))
    end = fit(mine, START, 1)
    assert end.opt_state["step"].max() == 1
    assert_at_rest(end)


@pytest.mark.parametrize("at", [0, 1])
def test_a_loader_cannot_cancel_a_batch_that_has_not_begun(at: int) -> None:
    mine = learner(data=DataLoaders(Loader(CancelBatch, at)))
    with pytest.raises(
        SignalError, match="CancelBatch was raised while fetching data.*CancelTrain"
    ):
        fit(mine, START, 1)


def test_a_model_that_raises_a_signal_that_is_not_legal_there() -> None:
    mine = learner(Cancelling(CancelStep, at=0))
    with pytest.raises(SignalError, match=r"CancelStep was raised in \[predict\]"):
        fit(mine, mine.init(), 1)


def test_in_validate_there_is_no_fit_to_cancel() -> None:
    mine = learner(callbacks=[on(before_batch=raiser(CancelFit))])
    with pytest.raises(
        SignalError,
        match="CancelFit was raised by callback 'spy' in before_batch.*CancelValidate or CancelBatch",
    ):
        validate(mine, START)


def test_a_cancelled_validation_is_the_mean_of_what_was_measured() -> None:
    mine = learner(callbacks=[on(after_batch=raise_once(CancelValidate))])
    assert validate(mine, START) == validate(LEARNER, START, batches(2, seed=2)[:1])


def test_signals_say_which_scope_they_end() -> None:
    assert [signal.scope for signal, *_ in CARRIED] == [
        "fit", "epoch", "train", "validate", "batch", "backward", "step"
    ]  # fmt: skip


@pytest.mark.parametrize("where", ["around_batch", "around_train"])
def test_a_signal_from_the_opening_of_a_bracket_ends_the_scope_around_it(where: str) -> None:
    events = [
        event for event, _ in trace(LEARNER, START, 1, [on(**{where: raise_once(CancelEpoch)})])
    ]
    assert events[-3:] == ["after_cancel_epoch", "after_epoch", "after_fit"]


def test_a_signal_from_the_opening_of_its_own_bracket_is_an_error() -> None:
    with pytest.raises(SignalError):
        fit(LEARNER, START, 1, [on(around_batch=raiser(CancelBatch))])


def test_anything_may_be_known_about_a_caught_signal() -> None:
    """The state that a signal carries can be read off it."""
    signal: Any = CancelFit(START)
    assert signal.state is START
    assert CancelFit().state is None
