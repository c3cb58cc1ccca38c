"""Shares of a batch that depend on its targets: of validations, and where nothing counts."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from functional_sgd import sgd
from loop import (
    Batches,
    Callback,
    CancelValidate,
    DataLoaders,
    Learner,
    Order,
    State,
    fit,
    parallel,
    validate,
)
from tests.ranks import Ranks


def learner(targets: list[int], loss: object = cross_entropy, **rest: object) -> Learner:
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 5 * len(targets), dtype=torch.float64).view(-1, 5)
    y = torch.tensor(targets)
    data = DataLoaders(Batches((x, y), 4), Batches((x, y), 4))
    return Learner(nn.Linear(5, 3).double(), data, loss, sgd(lr=0.1), **rest)  # type: ignore[arg-type]


def losses_of_validation(alone: bool) -> list[float]:
    mine = learner([-100, -100, 1, 2, 0, 1])
    if not alone:
        mine = parallel(mine, weight="targets")
    end = fit(mine, mine.init(), 2)
    return [validate(mine, end)["valid_loss"], *end.history.column("valid_loss")]


def test_validation_weighs_the_parts_as_training_does(ranks: Ranks) -> None:
    """A part without targets has no loss at all."""
    expected = torch.tensor(losses_of_validation(alone=True))
    for found in ranks(losses_of_validation, False):
        torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-12, atol=0)


class Scaled(nn.Module):
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.register_buffer("scale", torch.full((1,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) * self.scale
        return out


def mean_of_targets(pred: Tensor, target: Tensor) -> Tensor:
    there = (target >= 0).sum().clamp(min=1)
    return cross_entropy(pred, target, reduction="sum") / there


def constant(compile: bool) -> float:
    mine = learner([0, 1, 2, 0, -100, -100, -100, -100], mean_of_targets)
    mine = parallel(replace(mine, model=Scaled().double()), weight="targets")
    return fit(mine, mine.init(), 1, compile=compile).buffers["scale"].item()


def test_a_batch_that_counts_nothing_leaves_buffers(ranks: Ranks) -> None:
    assert ranks(constant, False) == [2.0, 2.0]


class Look(Callback):
    order = Order.REPORT

    def after_loss(self, state: State) -> None:
        assert state.loss is not None
        if not state.training and state.loss.item() > 0.9:
            raise CancelValidate(state)


def cancelled() -> list[float]:
    mine = parallel(learner([0, 1, 2, 0, 1, 1, 2, 2, 0, 1, 0], callbacks=[Look()]))
    rows = fit(mine, mine.init(), 2).history.rows
    return [row["valid_loss"] for row in rows]


def test_a_cancel_by_the_loss_of_a_validation_batch_is_that_of_all_ranks(ranks: Ranks) -> None:
    one, other = ranks(cancelled)
    assert one == other
