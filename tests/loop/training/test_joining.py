"""Outputs of batches that are padded to lengths of their own."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from functional_sgd import sgd
from loop import DataLoaders, Learner, predict, sample_losses, validate
from loop.metrics import Collected

BATCHES = [(torch.ones(2, 3), torch.zeros(2, 3)), (torch.ones(1, 4), torch.zeros(1, 4))]


def learner(*metrics: Any) -> Learner:
    """Of a model that gives back what it gets."""
    return Learner(nn.Identity(), DataLoaders(BATCHES, BATCHES), mse_loss, sgd(), metrics)


@pytest.mark.parametrize("collect", [predict, sample_losses])
def test_batches_of_other_lengths_cannot_be_joined(collect: Any) -> None:
    mine = learner()
    expected = (
        rf"{collect.__name__}: the batches .* shapes \(2, 3\) and \(1, 4\). Call .* one batch"
    )
    with pytest.raises(ValueError, match=expected):
        collect(mine, mine.init())


def test_batch_by_batch_they_can() -> None:
    mine = learner()
    found = [predict(mine, mine.init(), [batch]) for batch in BATCHES]
    assert [tuple(one.shape) for one in found] == [(2, 3), (1, 4)]


def largest(pred: Tensor, target: Tensor) -> Tensor:
    """A metric."""
    return pred.max()


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)])
def test_what_is_collected_cannot_be_joined(sizes: tuple[int, int]) -> None:
    """Whether it is tried in the batch, or at the end."""
    first, second = sizes
    batches = [(torch.ones(first, 3), torch.ones(1)), (torch.ones(second, 4), torch.ones(1))]
    mine = Learner(
        nn.Identity(), DataLoaders(batches), lambda pred, y: pred.sum(), sgd(), [Collected(largest)]
    )
    expected = r"Collected: the batches .* and \(., 4\). Pad all data to one length"
    with pytest.raises(ValueError, match=expected):
        validate(mine, mine.init(), batches)


def test_a_metric_that_joins_nothing_measures_them() -> None:
    mine = learner(largest)
    assert validate(mine, mine.init())["largest"] == 1.0
