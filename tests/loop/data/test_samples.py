"""Batches with tensors in dataclasses, and in mappings that are no dicts."""

from collections import UserDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from functional_sgd import sgd
from loop import DataLoaders, GradientAccumulation, Learner, State, fit, validate
from loop.callbacks.accumulation import count_targets
from loop.metrics import sample_count
from loop.ranks.cut import Cut
from loop.run.stages import to_device

BLANK = State({}, {}, {}, {})


@dataclass(frozen=True)
class Sample:
    """Inputs, and what they are called."""

    x: Tensor
    scale: float = 1.0


class Scaled(nn.Module):
    """w * x of a Sample."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, sample: Any) -> Tensor:
        """Of either kind."""
        return self.w * (sample.x if isinstance(sample, Sample) else sample["x"])


def encoded(values: Tensor) -> Any:
    """As a tokenizer does it."""
    return UserDict(x=values)


def learner(kind: Any) -> Learner:
    """Losses of 1, 2 and 3 in batches of 4, 4 and 1."""
    batches = [
        (kind(torch.full((count,), value)),) for value, count in ((1.0, 4), (2.0, 4), (3.0, 1))
    ]
    return Learner(Scaled(), DataLoaders(batches, batches), lambda pred: pred.mean(), sgd(lr=1.0))


@pytest.mark.parametrize("kind", [Sample, encoded])
def test_the_samples_in_a_record_are_counted(kind: Any) -> None:
    assert sample_count(BLANK.replace(xb=(kind(torch.ones(5, 2)),))) == 5
    assert sample_count(BLANK.replace(xb=(kind(torch.ones(5, 2)),), yb=(torch.ones(3),))) == 3
    assert sample_count(BLANK.replace(xb=({"deep": [kind(torch.ones(5, 2))]},))) == 5


@pytest.mark.parametrize("kind", [Sample, encoded])
def test_batches_of_records_weigh_by_their_samples(kind: Any) -> None:
    mine = learner(kind)
    assert validate(mine, mine.init())["valid_loss"] == pytest.approx((4 + 8 + 3) / 9)


@pytest.mark.parametrize("kind", [Sample, encoded])
def test_accumulated_batches_of_records_weigh_by_their_samples(kind: Any) -> None:
    mine = learner(kind)
    end = fit(mine, mine.init(), 1, [GradientAccumulation(batches=3)])
    assert float(end.params["w"]) == pytest.approx(1 - (4 + 8 + 3) / 9)


@pytest.mark.parametrize("kind", [Sample, encoded])
def test_the_targets_in_a_record_are_counted(kind: Any) -> None:
    labels = kind(torch.tensor([[1, 2], [3, -100]]))
    assert count_targets()(BLANK.replace(yb=(labels,))) == 3


@pytest.mark.parametrize("kind", [Sample, encoded])
def test_the_tensors_in_a_record_are_moved(kind: Any) -> None:
    record = kind(torch.ones(2))
    moved = to_device([record, "cat"], torch.device("meta"))
    assert type(moved[0]) is type(record)
    assert (moved[1], Scaled()(record).device.type) == ("cat", "cpu")
    inner = moved[0].x if kind is Sample else moved[0]["x"]
    assert inner.device.type == "meta"


@pytest.mark.parametrize("kind", [Sample, encoded])
def test_records_are_cut(kind: Any) -> None:
    batch = (kind(torch.arange(5)),)
    one, two = (next(iter(Cut([batch], which, 2))) for which in (0, 1))
    assert [Scaled()(part[0]).tolist() for part in (one, two)] == [[0, 1], [2, 3, 4]]
