"""The same learning rates, batch by batch, as fastai's fit_flat_cos and fit_sgdr."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from functional_sgd import sgd
from loop import Learner, State, fit_flat_cos, fit_sgdr
from loop.data import DataLoaders
from tests.peers.peers import fastai_module

learners = fastai_module("fastai.learner")
core = fastai_module("fastai.data.core")
optimizers = fastai_module("fastai.optimizer")
fastai_module("fastai.callback.schedule")


def loader(batches: int) -> DataLoader[Any]:
    x = torch.linspace(-1, 1, 2 * batches)[:, None]
    return DataLoader(TensorDataset(x, 3 * x + 1), 2)


def ours(batches: int) -> tuple[Learner, State]:
    mine = Learner(
        nn.Linear(1, 1), DataLoaders(loader(batches)), nn.functional.mse_loss, sgd(mom=0.9)
    )
    return mine, mine.init()


def theirs(batches: int, method: str, path: Path, *args: Any, **options: Any) -> list[float]:
    """The learning rates that fastai recorded."""
    data = core.DataLoaders(loader(batches), loader(batches))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = learners.Learner(
            data, nn.Linear(1, 1), nn.MSELoss(), opt_func=optimizers.SGD, path=path
        )
        with fast.no_bar(), fast.no_logging():
            getattr(fast, method)(*args, **options)
    return [float(lr) for lr in fast.recorder.lrs]


@pytest.mark.parametrize(
    ("batches", "epochs", "pct", "div"), [(4, 2, 0.75, 1e5), (7, 3, 0.3, 10.0), (5, 4, 0.9, 100.0)]
)
def test_flat_cos(tmp_path: Path, batches: int, epochs: int, pct: float, div: float) -> None:
    end = fit_flat_cos(*ours(batches), epochs, 0.1, div_final=div, pct_start=pct)
    expected = theirs(
        batches, "fit_flat_cos", tmp_path, epochs, lr=0.1, div_final=div, pct_start=pct
    )
    assert list(end.history.hypers["lr"]) == pytest.approx(expected, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize(
    ("batches", "cycles", "length", "mult"),
    [(4, 2, 1, 2), (3, 3, 1, 2), (5, 2, 2, 3), (4, 1, 2, 2)],
)
def test_sgdr(tmp_path: Path, batches: int, cycles: int, length: int, mult: int) -> None:
    """fastai computes borders in float32, so a cycle of its may begin a batch late, with an lr of 0
    before.
    """
    end = fit_sgdr(*ours(batches), cycles, length, 0.1, cycle_mult=mult)
    expected = theirs(batches, "fit_sgdr", tmp_path, cycles, length, lr_max=0.1, cycle_mult=mult)
    borders = [batches * sum(length * mult**i for i in range(cycle)) for cycle in range(cycles)]
    assert len(end.history.hypers["lr"]) == len(expected)
    for batch, (found, lr) in enumerate(zip(end.history.hypers["lr"], expected, strict=True)):
        late = batch in borders and lr < 1e-8
        assert found == pytest.approx(0.1 if late else lr, rel=1e-6, abs=2e-8)
