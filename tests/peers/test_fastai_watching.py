"""fastai's ActivationStats and SaveModelCallback in runs of the same batches: what they measure,
and what they keep.
"""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from functional_sgd import sgd
from loop import DataLoaders, Learner, fit
from loop.callbacks.activations import ActivationStats, activation_stats
from loop.callbacks.saving import SaveModel
from tests.loop.helpers import batches
from tests.peers.peers import fastai_module

learners = fastai_module("fastai.learner")
core = fastai_module("fastai.data.core")
optimizers = fastai_module("fastai.optimizer")
hooks = fastai_module("fastai.callback.hook")
tracker = fastai_module("fastai.callback.tracker")

TRAIN, VALID = batches(4, seed=1, size=8), batches(2, seed=2, size=8)


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Linear(2, 6),
            nn.BatchNorm1d(6),
            nn.ReLU(),
            nn.Linear(6, 6),
            nn.ReLU(),
            nn.Linear(6, 2),
        )


def theirs(tmp_path: Path, callback: Any, epochs: int, lr: float) -> Any:
    """fastai's Learner after its run."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        fast = learners.Learner(
            core.DataLoaders(TRAIN, VALID),
            copy.deepcopy(model()),
            loss_func=nn.functional.mse_loss,
            opt_func=lambda params, lr: optimizers.SGD(params, lr, mom=0.9, wd=0.0),
            path=tmp_path,
            cbs=[callback],
        )
        with fast.no_bar(), fast.no_logging():
            fast.fit(epochs, lr)
    return fast


def ours(callback: Any, epochs: int, lr: float) -> Any:
    mine = Learner(model(), DataLoaders(TRAIN, VALID), nn.functional.mse_loss, sgd(mom=0.9))
    return fit(mine, mine.init(), epochs, [callback], lr=lr)


@pytest.mark.parametrize("every", [None, 1, 3])
def test_the_same_activations(tmp_path: Path, every: int | None) -> None:
    callback = hooks.ActivationStats(with_hist=True, every=every)
    theirs(tmp_path, callback, 3, 0.1)
    found = activation_stats(ours(ActivationStats(hist=True, every=every or 1), 3, 0.1))
    assert len(found.train_iter) == len(callback.stats) == (4 if every == 3 else 12)
    assert len(found.layers) == len(callback.stats[0]) == 4
    assert found.histograms is not None
    for batch, layers in enumerate(callback.stats):
        for layer, expected in enumerate(layers):
            where = (batch, layer)
            assert found.mean[where].item() == pytest.approx(expected["mean"], rel=1e-4, abs=1e-6)
            assert found.std[where].item() == pytest.approx(expected["std"], rel=1e-4)
            assert found.near_zero[where].item() == pytest.approx(expected["near_zero"])
            assert torch.equal(found.histograms[where], expected["hist"])


@pytest.mark.parametrize(("lr", "epochs"), [(0.3, 4), (1.2, 6)])
@pytest.mark.parametrize("restore", [True, False])
def test_the_same_weights_in_the_end(tmp_path: Path, lr: float, epochs: int, restore: bool) -> None:
    fast = theirs(tmp_path, tracker.SaveModelCallback(at_end=not restore), epochs, lr)
    found = ours(SaveModel(tmp_path / "best", at_end=not restore), epochs, lr)
    losses = found.history.column("valid_loss")
    assert losses == pytest.approx([row[1] for row in fast.recorder.values], rel=1e-4)
    assert losses.index(min(losses)) < epochs - 1, (
        "the best epoch is not the last, or nothing is compared"
    )
    expected: dict[str, Tensor] = fast.model.state_dict()
    for name, value in {**found.params, **found.buffers}.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5, msg=name)
