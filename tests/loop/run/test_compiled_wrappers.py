"""Compiled batches with every kind of optimizer: wrapped, fused, or one of torch.optim."""

from typing import Any

import pytest
import torch
from torch import nn

import functional_sgd as fs
from functional_sgd.schedules import Linear
from loop import DataLoaders, Learner, fit
from tests.comparing import assert_close


def parts() -> fs.Optimizer:
    return fs.partition({"a": fs.sgd(lr=0.1), "b": fs.adamw(lr=0.1)}, {"0*": "a", "*": "b"})


OPTIMIZERS = {
    "scheduled": lambda: fs.scheduled(fs.adamw(), steps=12, lr=Linear(0.1, 0.0)),
    "accumulate": lambda: fs.accumulate(fs.adamw(lr=0.1), 2),
    "skip_nonfinite": lambda: fs.fuse(fs.skip_nonfinite(fs.adamw(lr=0.1))),
    "partition": lambda: fs.fuse(parts()),
    "scheduled partition": lambda: fs.scheduled(parts(), steps=12, **{"b.lr": Linear(0.1, 0.0)}),
    "schedule_free": lambda: fs.schedule_free(fs.sgd(lr=0.1)),
    "of torch": lambda: fs.torch_optimizer(torch.optim.NAdam, lr=0.1),
    "of torch, inside": lambda: fs.average_params(fs.torch_optimizer(torch.optim.NAdam, lr=0.1)),
}


def learner(opt: fs.Optimizer) -> Learner:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(48, 4, generator=generator), torch.randn(48, 1, generator=generator)
    data = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 48, 8)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    return Learner(model, DataLoaders(data, data), nn.functional.mse_loss, opt)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_wrapper_is_part_of_what_is_compiled(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch._inductor, "compile", lambda graph, inputs: graph
    )  # what is traced, as it is
    one = learner(make())
    expected = fit(one, one.init(), 2)
    found = fit(one, one.init(), 2, compile=True)
    assert_close(
        (found.params, found.opt_state), (expected.params, expected.opt_state), rtol=1e-4, atol=1e-6
    )
