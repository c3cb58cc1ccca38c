"""The loop against loops written out: functional, and plain PyTorch (Q1b: with torch.optim)."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from functional_sgd import Optimizer, adamw, apply, sgd, split, value_and_grad
from loop import DataLoaders, Learner, State, fit, validate
from tests.comparing import assert_close, assert_same
from tests.loop.helpers import UNUSED, batches, learned, learner, losses, net


def functional_loop(mine: Learner, state: State, epochs: int) -> dict[str, Any]:
    """The loop without the loop."""
    params, buffers, opt_state = state.params, state.buffers, state.opt_state
    for _ in range(epochs):
        for x, y in mine.data.train:

            def loss_fn(
                params: Mapping[str, Any], buffers: Any = buffers, x: Any = x, y: Any = y
            ) -> tuple[Any, Any]:
                pred, after = apply(mine.model, params, buffers, x)
                return mine.loss(pred, y), after

            (_, buffers), grads = value_and_grad(loss_fn, has_aux=True)(params)
            params, opt_state = mine.opt(params, grads, opt_state)
    return {"params": params, "buffers": buffers, "opt_state": opt_state}


@pytest.mark.parametrize(
    "opt", [sgd(lr=0.1), sgd(lr=0.1, mom=0.9, wd=0.01), adamw(lr=0.01)], ids=repr
)
def test_the_loop_is_the_loop_written_out(opt: Optimizer) -> None:
    mine = learner(net(dropout=0.0), opt=opt, fused=False)
    start = mine.init()
    mine.model.train()
    assert_same(learned(fit(mine, start, 3)), functional_loop(mine, start, 3))


def torch_loop(
    model: nn.Module, data: list[Any], make_opt: Callable[[Any], torch.optim.Optimizer], epochs: int
) -> tuple[nn.Module, list[float]]:
    """The loop that everybody writes."""
    model, seen = copy.deepcopy(model).train(), []
    opt = make_opt(model.parameters())
    for _ in range(epochs):
        for x, y in data:
            loss = mse_loss(model(x), y)
            loss.backward()
            opt.step()
            opt.zero_grad()
            seen.append(loss.item())
    return model, seen


PAIRS: list[tuple[Optimizer, Callable[[Any], torch.optim.Optimizer]]] = [
    (sgd(lr=0.1, mom=0.9), lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)),
    (
        sgd(lr=0.1, mom=0.9, nesterov=True, wd=0.1),
        lambda params: torch.optim.SGD(
            params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1
        ),
    ),
    (adamw(lr=0.01), lambda params: torch.optim.AdamW(params, lr=0.01)),
]


@pytest.mark.parametrize(("opt", "make_opt"), PAIRS, ids=["sgd", "nesterov", "adamw"])
def test_the_loop_is_plain_torch(opt: Optimizer, make_opt: Callable[[Any], Any]) -> None:
    data = [(x.double(), y.double()) for x, y in batches(3, seed=1)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(2, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 2)
        ).double()
    mine = learner(model, DataLoaders(data), opt=opt)
    end = fit(mine, mine.init(), 4)
    expected, seen = torch_loop(model, data, make_opt, 4)
    assert_close({**end.params, **end.buffers}, dict(expected.state_dict()), rtol=1e-10, atol=1e-10)
    assert losses(end) == pytest.approx(seen, rel=1e-10)


def test_validation_is_plain_torch() -> None:
    mine = learner(net())
    end = fit(mine, mine.init(), 1)
    model = copy.deepcopy(mine.model).eval()
    model.load_state_dict({**end.params, **end.buffers})
    x, y = (torch.cat(parts) for parts in zip(*mine.data.valid or (), strict=True))
    with torch.no_grad():
        assert validate(mine, end)["valid_loss"] == pytest.approx(
            mse_loss(model(x), y).item(), rel=1e-6
        )


def test_tied_layers_learn_as_one() -> None:
    """Two layers that share a weight: the gradient is the sum, and there is one parameter."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).double()
    with torch.no_grad():
        for index, value in enumerate(model.parameters()):
            value.copy_(torch.linspace(-1, 1, value.numel()).reshape(value.shape) + 0.1 * index)
    model[1].weight = model[0].weight
    data = [(x.double(), y.double()) for x, y in batches(3, seed=1)]
    mine = learner(model, DataLoaders(data), opt=sgd(lr=0.1))
    end = fit(mine, mine.init(), 2)
    expected, _ = torch_loop(model, data, lambda params: torch.optim.SGD(params, lr=0.1), 2)
    assert_close(end.params, dict(split(expected)[0]), rtol=1e-10, atol=1e-12)


def test_a_frozen_layer_stays_as_it_is() -> None:
    model = net(dropout=0.0)
    model[0].requires_grad_(False)
    mine = learner(model)
    end = fit(mine, mine.init(), 2)
    assert "0.weight" not in end.params
    assert torch.equal(end.buffers["0.weight"], model[0].weight)


def test_a_parameter_that_the_loss_does_not_use_stays_as_it_is() -> None:
    class Spare(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.spare = nn.Parameter(torch.ones(3))

    mine = learner(Spare())
    with pytest.warns(UserWarning, match=UNUSED):
        end = fit(mine, mine.init(), 1)
    assert torch.equal(end.params["spare"], torch.ones(3))
