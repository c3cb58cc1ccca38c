"""A network of classes, for tests of compiled batches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from functional_sgd import sgd
from loop import (
    Batches,
    DataLoaders,
    Learner,
    State,
    accuracy,
)
from tests.comparing import assert_close as close
from tests.loop.helpers import learned, losses

X, Y = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3


traced = pytest.mark.usefixtures("as_traced")


def model(dropout: float = 0.0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3), nn.BatchNorm1d(3)
        )


def classes(
    made: nn.Module | None = None,
    opt: Any = None,
    size: int = 10,
    loss: Callable[..., Tensor] = cross_entropy,
    **rest: Any,
) -> Learner:
    """40 samples of 3 classes, in batches of 10."""
    data = DataLoaders(Batches((X, Y), size, shuffle=True), Batches((X, Y), 40))
    return Learner(
        made or model(),
        data,
        loss,
        opt or sgd(lr=0.1, mom=0.9),
        metrics=[accuracy],
        **rest,
    )


def assert_close(found: State, expected: State, atol: float = 1e-5) -> None:
    close(learned(found), learned(expected), atol=atol, rtol=1e-4)
    assert losses(found) == pytest.approx(losses(expected), abs=atol)
    assert found.history.hypers == expected.history.hypers
    for name in ("epoch", "iter", "train_iter", "epochs_seen", "pct_train", "seed"):
        assert getattr(found, name) == getattr(expected, name)
