"""The same weights as fastai's GradientAccumulation, where a step's samples are a multiple of the
batch's: float64.
"""

import importlib
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from functional_sgd import sgd
from loop import Batches, DataLoaders, GradientAccumulation, GradientClip, Learner, fit
from tests.comparing import assert_close

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what fastai imports
    fastai: ModuleType = pytest.importorskip("fastai.basics", exc_type=ImportError)
    accumulation: Any = importlib.import_module("fastai.callback.training")

X = torch.randn(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = X @ torch.tensor([[1.0], [-2.0]], dtype=torch.float64) + 1
EPOCHS, LR = 3, 0.1


def model() -> nn.Linear:
    """y = 0."""
    layer = nn.Linear(2, 1).double()
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    return layer


def theirs(size: int, samples: int, clip: float) -> nn.Linear:
    """What fastai learns, without its Recorder, which knows no float64."""
    data = torch.utils.data.TensorDataset(X, Y)
    loaders = fastai.DataLoaders(
        *(fastai.DataLoader(data, bs=size, shuffle=False, num_workers=0) for _ in range(2))
    )
    callbacks = [accumulation.GradientAccumulation(samples), accumulation.GradientClip(clip)]
    layer = model()
    learner = fastai.Learner(loaders, layer, mse_loss, opt_func=fastai.SGD, lr=LR, cbs=callbacks)
    learner.remove_cbs(
        [callback for callback in learner.cbs if callback.name in ("recorder", "progress")]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learner.fit(EPOCHS, LR, wd=0.0)
    return layer


@pytest.mark.parametrize("clip", [1e9, 0.5], ids=["", "clipped"])
@pytest.mark.parametrize(("size", "samples"), [(4, 12), (2, 6), (1, 4), (3, 3)])
def test_n29_weights_are_fastais(size: int, samples: int, clip: float) -> None:
    expected = theirs(size, samples, clip)
    mine = Learner(model(), DataLoaders(Batches((X, Y), size)), mse_loss, sgd(lr=LR))
    end = fit(
        mine, mine.init(), EPOCHS, [GradientAccumulation(samples=samples), GradientClip(clip)]
    )
    assert_close(
        end.params,
        {name: value.detach() for name, value in expected.named_parameters()},
        atol=1e-14,
    )
    assert end.opt_state["step"].max() == EPOCHS * 12 // samples
