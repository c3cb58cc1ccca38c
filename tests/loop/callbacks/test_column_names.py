"""Metrics must not take the name of a column that is there already."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from functional_sgd import sgd
from loop import DataLoaders, Learner, Recorder, fit, validate
from tests.loop.helpers import one_weight


def halved(pred: Tensor, y: Tensor) -> Tensor:
    """A metric."""
    return y.mean() / 2


def plays(metrics: Sequence[Any], *callbacks: object) -> Learner:
    """A learner with a batch whose loss is 2, to train and to validate with."""
    x = torch.full((1, 1), 2.0)
    data = DataLoaders([(x, x)], [(x, x)])
    return Learner(
        one_weight(),
        data,
        lambda pred, y: pred.sum() * 0 + y.mean(),
        sgd(lr=0.0),
        metrics,
        callbacks,
    )


def called(name: str) -> Any:
    """The metric `halved` under another name."""

    def metric(pred: Tensor, y: Tensor) -> Tensor:
        return halved(pred, y)

    metric.__name__ = name
    return metric


@pytest.mark.parametrize("name", ["valid_loss", "train_loss", "epoch", "train_iter"])
def test_a_metric_called_like_a_column_is_refused(name: str) -> None:
    mine = plays([called(name)])
    with pytest.raises(ValueError, match=f"Recorder: every column needs a name .* got '{name}'"):
        fit(mine, mine.init(), 1)
    with pytest.raises(ValueError, match=f"Recorder: every column needs a name .* got '{name}'"):
        validate(mine, mine.init())


@pytest.mark.parametrize(
    ("names", "column"),
    [
        (["loss"], "train_loss"),
        (["mean_loss"], "train_mean_loss"),
        (["halved", "train_halved"], "train_halved"),
    ],
)
def test_a_metric_called_like_a_column_of_training_is_refused(
    names: list[str], column: str
) -> None:
    metrics = [called(name) for name in names]
    mine = plays(metrics, Recorder(train_metrics=True))
    with pytest.raises(ValueError, match=f"Recorder: .* got '{column}' for a metric"):
        fit(mine, mine.init(), 1)
    # Without train_metrics there is no such column.
    other = plays(metrics)
    assert fit(other, other.init(), 1).history.rows[0][names[0]] == 1.0
