"""Hypers of a scheduled run that was stopped and is not resumed are put back when another
begins.
"""

from functools import partial
from typing import Any

import pytest
import torch

from functional_sgd.schedules import Linear
from loop import ParamScheduler, State, TorchScheduler, fit, load, save
from tests.loop.helpers import assert_same_run, learner, on, raiser

MINE = learner()
START = MINE.init()
HALVE = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
SCHEDULERS = [
    ParamScheduler({"lr": Linear(0.5, 0.1), "mom": Linear(0.1, 0.2)}),
    TorchScheduler(HALVE),
]


def stopped(*callbacks: Any) -> State:
    """The state of a run that failed in its third batch."""

    def fail(state: State) -> None:
        if state.train_iter == 2:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        fit(MINE, START, 2, [*callbacks, on(before_step=fail)])
    state: State = caught.value.state  # type: ignore[attr-defined]
    return state


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda one: one.name)
def test_another_run_begins_with_the_hypers_of_before(scheduler: Any) -> None:
    state = stopped(scheduler)
    assert state.hyper != START.hyper
    end = fit(MINE, state, 1)
    assert end.hyper == START.hyper
    assert list(end.history.hypers["lr"])[2:] == [START.hyper["lr"]] * 3
    assert not {"param_scheduler", "torch_scheduler", "hypers_before_schedules"} & {*end.memory}


def test_of_two_schedulers_too() -> None:
    mine = [ParamScheduler({"mom": Linear(0.1, 0.2)}), TorchScheduler(HALVE)]
    assert fit(MINE, stopped(*mine), 0).hyper == START.hyper


def test_what_is_given_to_the_other_run_counts() -> None:
    assert fit(MINE, stopped(SCHEDULERS[0]), 1, lr=0.07).hyper == {**START.hyper, "lr": 0.07}


def test_a_hyper_that_had_no_value_of_its_own_is_gone_again() -> None:
    start = START.replace(hyper={})
    with pytest.raises(ZeroDivisionError) as caught:
        fit(MINE, start, 1, [SCHEDULERS[0], on(after_epoch=raiser(ZeroDivisionError))])
    assert fit(MINE, caught.value.state, 0).hyper == {}  # type: ignore[attr-defined]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda one: one.name)
def test_a_run_that_is_resumed_goes_on_with_the_schedule(scheduler: Any, tmp_path: Any) -> None:
    state = load(save(stopped(scheduler), tmp_path / "state"), START)
    assert_same_run(fit(MINE, state, 2, [scheduler], resume=True), fit(MINE, START, 2, [scheduler]))
