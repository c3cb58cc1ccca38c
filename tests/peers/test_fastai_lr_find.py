"""The same learning rate finder as fastai's: its four rules, and what it records while it
trains.
"""

import copy
import warnings
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from functional_sgd import sgd
from loop import Learner, LRFind, lr_find
from loop.data import DataLoaders
from loop.tools.lr_suggestions import minimum, slide, steep, valley
from tests.peers.peers import fastai_module

learners = fastai_module("fastai.learner")
core = fastai_module("fastai.data.core")
optimizers = fastai_module("fastai.optimizer")
theirs = fastai_module("fastai.callback.schedule")

RULES = {"valley": valley, "slide": slide, "minimum": minimum, "steep": steep}
CURVES = st.lists(st.integers(-1000, 1000), min_size=16, max_size=60, unique=True)


def asked(name: str, lrs: list[float], losses: list[float]) -> float:
    """What fastai's rule of this name says."""
    tensors = (torch.tensor(values, dtype=torch.float64) for values in (lrs, losses))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(getattr(theirs, name)(*tensors, len(lrs))[0])


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=200, deadline=None)
@given(values=CURVES, scale=st.sampled_from([1e-4, 1e-3, 1.0]))
def test_random_curves(name: str, values: list[int], scale: float) -> None:
    losses = [value * scale for value in values]
    lrs = np.geomspace(1e-6, 1.0, len(losses)).tolist()
    slopes = np.diff(losses)
    assume(name != "steep" or np.sort(slopes)[1] - slopes.min() > 1e-9)  # or rounding decides
    assert RULES[name](lrs, losses) == pytest.approx(asked(name, lrs, losses), rel=1e-12)


@settings(max_examples=200, deadline=None)
@given(values=st.lists(st.integers(0, 5), min_size=3, max_size=12))
def test_valleys_with_plateaus(values: list[int]) -> None:
    losses = [float(value) for value in values]
    lrs = np.geomspace(1e-6, 1.0, len(losses)).tolist()
    beyond = losses[1] < losses[0] and lower_run(losses) == 2  # where fastai takes the index -1
    assert valley(lrs, losses) == pytest.approx(lrs[0] if beyond else asked("valley", lrs, losses))


def lower_run(losses: list[float]) -> int:
    """The length of the longest decreasing subsequence."""
    best: list[int] = []
    for i, loss in enumerate(losses):
        best.append(1 + max((best[j] for j in range(i) if losses[j] > loss), default=0))
    return max(best)


def problem() -> tuple[nn.Module, DataLoader[Any]]:
    """Five batches in a fixed order, for a linear model: a deep one in float32 is chaotic where lr
    is high.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        x = torch.randn(40, 3)
        y = (x @ torch.randn(3, 1)).sin()
        model = nn.Linear(3, 1)
    return model, DataLoader(TensorDataset(x, y), 8)


def both(tmp_path: Path, mom: float, iterations: int, stop: bool = True) -> tuple[LRFind, Any, Any]:
    """(our finder's curve, fastai's Learner after its own, its suggestions)."""
    model, loader = problem()
    ours = Learner(
        copy.deepcopy(model), DataLoaders(loader, loader), nn.functional.mse_loss, sgd(mom=mom)
    )
    found = lr_find(ours, ours.init(), iterations=iterations, stop_factor=4.0 if stop else None)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        fast = learners.Learner(
            core.DataLoaders(loader, loader),
            model,
            loss_func=nn.functional.mse_loss,
            opt_func=lambda params, lr: optimizers.SGD(params, lr, mom=mom, wd=0.0),
            path=tmp_path,
        )
        rules = [getattr(theirs, name) for name in RULES]
        with fast.no_bar():
            suggested = fast.lr_find(
                num_it=iterations, stop_div=stop, show_plot=False, suggest_funcs=rules
            )
    return found, fast, suggested


@pytest.mark.parametrize("mom", [0.0, 0.9])
@pytest.mark.parametrize(("iterations", "stop"), [(100, True), (60, False), (37, True)])
def test_what_is_recorded_and_suggested(
    tmp_path: Path, mom: float, iterations: int, stop: bool
) -> None:
    found, fast, suggested = both(tmp_path, mom, iterations, stop)
    recorded = [float(loss) for loss in fast.recorder.losses]
    assert len(found.lrs) == len(fast.recorder.lrs)
    assert found.lrs == pytest.approx([float(lr) for lr in fast.recorder.lrs], rel=1e-6)
    assert found.losses[:-5] == pytest.approx(recorded[:-5], rel=1e-6)
    assert found.losses[-5:] == pytest.approx(recorded[-5:], rel=1e-5)  # float32 that explodes
    assert found.suggestions == pytest.approx(tuple(suggested), rel=1e-6)


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    found, fast, _ = both(tmp_path, 0.0, 30)
    assert found.losses != pytest.approx(
        [float(loss) * 1.00001 for loss in fast.recorder.losses], rel=1e-6
    )
