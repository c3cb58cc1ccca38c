"""A training batch that a signal of an outer scope ends: it counts once the model has seen it."""

import pytest
from torch import Tensor

from loop import Cancel, CancelEpoch, CancelFit, CancelTrain, State, fit
from tests.loop.helpers import full, learner, losses, on, raise_once

OUTER = [CancelTrain, CancelEpoch, CancelFit]


@pytest.mark.parametrize("signal", OUTER)
@pytest.mark.parametrize("event", ["after_loss", "after_step"])
def test_every_recorded_loss_is_a_batch_that_counts(event: str, signal: type[Cancel]) -> None:
    mine = learner()
    end = fit(mine, mine.init(), 2, [on(order=99, **{event: raise_once(signal, at=1)})])
    assert end.train_iter == len(losses(end))


@pytest.mark.parametrize("signal", OUTER)
def test_every_step_is_a_batch_that_counts(signal: type[Cancel]) -> None:
    mine = learner()
    end = fit(mine, mine.init(), 2, [on(after_step=raise_once(signal, at=1))])
    assert end.train_iter == end.opt_state["step"].max()


def test_a_batch_that_the_model_has_not_seen_does_not_count() -> None:
    mine = learner()
    end = fit(mine, mine.init(), 1, [on(before_batch=raise_once(CancelTrain))])
    assert end.train_iter == 0


def test_a_batch_cancelled_in_after_batch_counts_once() -> None:
    mine = learner()
    end = fit(mine, mine.init(), 1, [on(after_batch=raise_once(CancelTrain))])
    assert end.train_iter == 1


def test_the_next_batch_draws_another_dropout() -> None:
    """The first batch of the second epoch is that after the one that was broken off."""
    seen: list[Tensor] = []

    def note(state: State) -> None:
        if state.training:
            seen.append((state.train_iter, state.pred))

    mine = full()
    broken = on("broken", after_step=raise_once(CancelTrain, at=0))
    fit(mine, mine.init(), 2, [on(after_pred=note), broken])
    assert [number for number, _ in seen] == [0, 1, 2, 3]


def test_no_row_repeats_the_loss_of_an_earlier_epoch() -> None:
    """CancelTrain in before_train of the second epoch: it has trained nothing, so None."""
    mine = learner()
    end = fit(mine, mine.init(), 3, [on(before_train=raise_once(CancelTrain, at=1))])
    column = end.history.column("train_loss")
    assert [value is None for value in column] == [False, True, False]
