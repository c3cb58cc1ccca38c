"""Schedules of lr beside those of one part of a partition."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import StepLR

from functional_sgd import partition, sgd
from functional_sgd.schedules import Constant, Linear
from loop import (
    AnnealOnGradRatio,
    Batches,
    DataLoaders,
    Learner,
    ParamScheduler,
    ReduceLROnPlateau,
    State,
    TorchScheduler,
    fit,
    fit_one_cycle,
)
from loop.callbacks.tracking import lower_lr

SCHEDULE = {"lr": Constant(0.5)}


class BodyLR(ParamScheduler):
    """One more, under a name of its own."""


def parted() -> Learner:
    """Two layers of one weight, with lr 0.1 and 0.2; two batches."""
    opt = partition({"body": sgd(lr=0.1), "head": sgd(lr=0.2)}, {"0.*": "body", "1.*": "head"})
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 8)[:, None]
    return Learner(
        nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)),
        DataLoaders(Batches((x, 3 * x), 4)),
        mse_loss,
        opt,
    )


def hypers(end: State) -> dict[str, list[Any]]:
    """What was recorded."""
    return {name: list(values) for name, values in end.history.hypers.items()}


@pytest.mark.parametrize("first", [True, False])
def test_the_schedule_of_a_part_is_kept_whatever_the_order(first: bool) -> None:
    body: list[object] = [BodyLR({"body.lr": Linear(0.0, 1.0)})]
    whole: list[object] = [ParamScheduler(SCHEDULE)]
    callbacks: Sequence[object] = body + whole if first else whole + body
    learner = parted()
    end = fit(learner, learner.init(), 1, callbacks)
    assert hypers(end) == {"lr": [0.5, 0.5], "body.lr": [0.0, 0.5]}
    # The run is over, and all is as it was.
    assert end.hyper == learner.init().hyper == {"body.lr": 0.1, "head.lr": 0.2}


def test_the_lr_of_a_part_that_is_given_to_fit_is_kept() -> None:
    learner = parted()
    given: dict[str, Any] = {"body.lr": 0.25}
    end = fit_one_cycle(learner, learner.init(), 1, lr=0.5, **given)
    assert hypers(end)["body.lr"] == [0.25, 0.25]
    assert hypers(end)["lr"] == pytest.approx([0.02, 0.37500125])
    assert end.hyper == {"body.lr": 0.25, "head.lr": 0.2}


def test_the_lr_of_a_part_that_was_given_to_an_earlier_fit_is_replaced() -> None:
    learner = parted()
    given: dict[str, Any] = {"body.lr": 0.25}
    before = fit(learner, learner.init(), 1, **given)
    end = fit(learner, before, 1, [ParamScheduler(SCHEDULE)])
    assert hypers(end)["lr"][2:] == [0.5, 0.5]
    assert learned(end, [0.5, 0.5], before)
    assert end.hyper == before.hyper


def learned(end: State, rates: Sequence[float], before: State) -> bool:
    """Whether a run with this lr for all parts ends there."""
    learner = parted()
    alike = before.replace(hyper={"lr": rates[0]})
    expected = fit(learner, alike, 1).params
    return all(torch.equal(end.params[name], expected[name]) for name in expected)


def test_a_part_goes_its_own_way_beside_a_scheduler_of_torch() -> None:
    learner = parted()
    scheduler = TorchScheduler(partial(StepLR, step_size=1, gamma=0.5))
    given: dict[str, Any] = {"lr": 0.5, "body.lr": 0.25}
    end = fit(learner, learner.init(), 1, [scheduler], **given)
    assert hypers(end) == {"lr": [0.5, 0.25], "body.lr": [0.25, 0.25]}


def test_lowering_lr_lowers_that_of_every_part() -> None:
    state = State({}, {}, {}, {"lr": 1.0, "body.lr": 0.5, "body.mom": 0.9})
    assert lower_lr(state, 10.0, 0.06).hyper == {"lr": 0.1, "body.lr": 0.06, "body.mom": 0.9}


@pytest.mark.parametrize("callback", [ReduceLROnPlateau("train_loss"), AnnealOnGradRatio()])
def test_lr_of_parts_alone_can_be_lowered(callback: object) -> None:
    learner = parted()
    assert fit(learner, learner.init(), 1, [callback]).train_iter == 2


@pytest.mark.parametrize("callback", [ReduceLROnPlateau("train_loss"), AnnealOnGradRatio()])
def test_lr_that_is_scheduled_for_a_part_cannot_be_lowered(callback: object) -> None:
    learner = parted()
    with pytest.raises(ValueError, match="'body.lr' is scheduled by 'body_lr' in this run"):
        fit(learner, learner.init(), 1, [BodyLR({"body.lr": Constant(0.1)}), callback], lr=0.1)
