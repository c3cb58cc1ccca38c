"""torch.optim's numbers (N16: all four flags of SGD): random gradients, float64, a hundred steps,
within 1e-12.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import functional_sgd as fs
from functional_sgd import Chain, chain

pytestmark = pytest.mark.usefixtures("scalars_in_double")

SHAPES = ((4, 3), (5,), ())
Make = Callable[[list[Tensor], float], torch.optim.Optimizer]
O = torch.optim  # noqa: E741

CASES: dict[str, tuple[Make, Callable[[float], Chain]]] = {
    "sgd": (lambda p, lr: O.SGD(p, lr), lambda lr: fs.sgd(lr)),
    "sgd wd": (lambda p, lr: O.SGD(p, lr, weight_decay=0.1), lambda lr: fs.sgd(lr, wd=0.1)),
    "sgd mom": (lambda p, lr: O.SGD(p, lr, momentum=0.9), lambda lr: fs.sgd(lr, mom=0.9)),
    "sgd nesterov": (
        lambda p, lr: O.SGD(p, lr, momentum=0.9, nesterov=True),
        lambda lr: fs.sgd(lr, mom=0.9, nesterov=True),
    ),
    "sgd dampening": (
        lambda p, lr: O.SGD(p, lr, momentum=0.9, dampening=0.4),
        lambda lr: fs.sgd(lr, mom=0.9, dampening=0.4),
    ),
    "sgd mom wd": (
        lambda p, lr: O.SGD(p, lr, momentum=0.9, weight_decay=0.1),
        lambda lr: fs.sgd(lr, mom=0.9, wd=0.1),
    ),
    "sgd nesterov wd": (
        lambda p, lr: O.SGD(p, lr, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda lr: fs.sgd(lr, mom=0.9, nesterov=True, wd=0.1),
    ),
    "sgd dampening wd": (
        lambda p, lr: O.SGD(p, lr, momentum=0.9, dampening=0.4, weight_decay=0.1),
        lambda lr: fs.sgd(lr, mom=0.9, dampening=0.4, wd=0.1),
    ),
    "adam": (lambda p, lr: O.Adam(p, lr), lambda lr: fs.adam(lr)),
    "adam betas eps": (
        lambda p, lr: O.Adam(p, lr, betas=(0.8, 0.95), eps=1e-3),
        lambda lr: fs.adam(lr, mom=0.8, sqr_mom=0.95, eps=1e-3),
    ),
    "adam wd": (lambda p, lr: O.Adam(p, lr, weight_decay=0.1), lambda lr: fs.adam(lr, wd=0.1)),
    "adamw": (lambda p, lr: O.AdamW(p, lr), lambda lr: fs.adamw(lr)),
    "adamw wd": (lambda p, lr: O.AdamW(p, lr, weight_decay=0.3), lambda lr: fs.adamw(lr, wd=0.3)),
    "rmsprop": (lambda p, lr: O.RMSprop(p, lr), lambda lr: fs.rmsprop(lr)),
    "rmsprop alpha eps": (
        lambda p, lr: O.RMSprop(p, lr, alpha=0.9, eps=1e-3),
        lambda lr: fs.rmsprop(lr, sqr_mom=0.9, eps=1e-3),
    ),
    "rmsprop mom": (
        lambda p, lr: O.RMSprop(p, lr, momentum=0.9),
        lambda lr: fs.rmsprop(lr, mom=0.9),
    ),
    "rmsprop centered": (
        lambda p, lr: O.RMSprop(p, lr, centered=True),
        lambda lr: fs.rmsprop(lr, centered=True),
    ),
    "rmsprop wd": (
        lambda p, lr: O.RMSprop(p, lr, weight_decay=0.1),
        lambda lr: fs.rmsprop(lr, wd=0.1),
    ),
    "rmsprop all": (
        lambda p, lr: O.RMSprop(p, lr, momentum=0.9, centered=True, weight_decay=0.1),
        lambda lr: fs.rmsprop(lr, mom=0.9, centered=True, wd=0.1),
    ),
    "radam": (lambda p, lr: O.RAdam(p, lr), lambda lr: fs.radam(lr)),
    "radam eps": (lambda p, lr: O.RAdam(p, lr, eps=1e-3), lambda lr: fs.radam(lr, eps=1e-3)),
    "radam betas": (
        lambda p, lr: O.RAdam(p, lr, betas=(0.8, 0.95)),
        lambda lr: fs.radam(lr, mom=0.8, sqr_mom=0.95),
    ),
    "radam wd": (lambda p, lr: O.RAdam(p, lr, weight_decay=0.1), lambda lr: fs.radam(lr, wd=0.1)),
    "radam decoupled wd": (
        lambda p, lr: O.RAdam(p, lr, weight_decay=0.1, decoupled_weight_decay=True),
        lambda lr: chain(fs.weight_decay, fs.radam(lr), wd=0.1),
    ),
    "adam amsgrad": (
        lambda p, lr: O.Adam(p, lr, amsgrad=True),
        lambda lr: fs.adam(lr, amsgrad=True),
    ),
    "adamw amsgrad maximize": (
        lambda p, lr: O.AdamW(p, lr, amsgrad=True, maximize=True),
        lambda lr: chain(fs.ascend, fs.adamw(lr, amsgrad=True)),
    ),
    "adamax wd": (
        lambda p, lr: O.Adamax(p, lr, weight_decay=0.1),
        lambda lr: fs.adamax(lr, wd=0.1),
    ),
    "nadam wd": (
        lambda p, lr: O.NAdam(p, lr, weight_decay=0.1),
        lambda lr: fs.nadam(lr, wd=0.1),
    ),
    "nadam decoupled wd": (
        lambda p, lr: O.NAdam(p, lr, weight_decay=0.1, decoupled_weight_decay=True),
        lambda lr: chain(fs.weight_decay, fs.nadam(lr), wd=0.1),
    ),
    "adagrad": (lambda p, lr: O.Adagrad(p, lr), lambda lr: fs.adagrad(lr)),
    "adagrad all": (
        lambda p, lr: O.Adagrad(
            p, lr, lr_decay=0.5, weight_decay=0.1, initial_accumulator_value=0.2
        ),
        lambda lr: fs.adagrad(lr, lr_decay=0.5, first_sum=0.2, wd=0.1),
    ),
    "adadelta wd": (
        lambda p, lr: O.Adadelta(p, lr, rho=0.95, weight_decay=0.1),
        lambda lr: fs.adadelta(lr, sqr_mom=0.95, wd=0.1),
    ),
    "rprop": (lambda p, lr: O.Rprop(p, lr), lambda lr: fs.rprop(lr)),
    "asgd": (
        lambda p, lr: O.ASGD(p, lr, lambd=0.5, t0=20, weight_decay=0.1),
        lambda lr: fs.asgd(lr, lambd=0.5, average_from=20, wd=0.1),
    ),
}
CHANGING = [name for name in CASES if name != "asgd"]
"""All but one, which heeds a new rate one step later in torch; see test_torch_optim_options.py."""


def both(name: str, dtype: torch.dtype, rates: list[float]) -> float:
    """The largest difference on the way, with a gradient and a rate for every step."""
    make_theirs, make_ours = CASES[name]
    generator = torch.Generator().manual_seed(0)

    def draw() -> list[Tensor]:
        return [
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for shape in SHAPES
        ]

    params: Any = draw()
    mirrored = [leaf.clone().requires_grad_() for leaf in params]
    theirs, ours = make_theirs(mirrored, rates[0]), make_ours(rates[0])
    state, worst = ours.init(params), 0.0
    for lr in rates:
        grads = draw()
        for leaf, grad in zip(mirrored, grads, strict=True):
            leaf.grad = grad.clone()
        theirs.param_groups[0]["lr"] = lr
        theirs.step()
        params, state = ours(params, grads, state, {"lr": lr})
        gaps = [float((a - b.detach()).abs().max()) for a, b in zip(params, mirrored, strict=True)]
        worst = max(worst, *gaps)
    return worst


@pytest.mark.parametrize("name", CASES)
def test_float64(name: str) -> None:
    assert both(name, torch.float64, [0.01] * 100) <= 1e-12


@pytest.mark.parametrize("name", CHANGING)
def test_float64_with_a_rate_that_changes_every_step(name: str) -> None:
    assert both(name, torch.float64, [0.02 / (1 + step % 7) for step in range(100)]) <= 1e-12


@pytest.mark.parametrize("name", CASES)
def test_float32(name: str) -> None:
    assert both(name, torch.float32, [0.01] * 100) <= 1e-4


def test_the_comparison_can_fail() -> None:
    """Another eps moves the params by far more than the tolerance."""
    CASES["wrong"] = CASES["radam"][0], lambda lr: fs.radam(lr, eps=1e-6)
    try:
        assert both("wrong", torch.float64, [0.01] * 100) > 1e-9
    finally:
        del CASES["wrong"]


@pytest.mark.parametrize("max_norm", [0.5, 3.0, 1e3])
def test_clip_norm_is_clip_grad_norm(max_norm: float) -> None:
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    leaves = [torch.zeros_like(grad).requires_grad_() for grad in grads]
    for leaf, grad in zip(leaves, grads, strict=True):
        leaf.grad = grad.clone()
    torch.nn.utils.clip_grad_norm_(leaves, max_norm)
    opt, zeros = chain(fs.clip_norm, fs.sgd_step, lr=1.0), [leaf.detach() for leaf in leaves]
    after, _ = opt(zeros, grads, opt.init(zeros), {"max_norm": max_norm})
    torch.testing.assert_close(
        [-leaf for leaf in after], [leaf.grad for leaf in leaves], rtol=1e-14, atol=0
    )


def test_clip_value_is_clip_grad_value() -> None:
    leaf = torch.zeros(100, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    leaf.grad = grad.clone()
    torch.nn.utils.clip_grad_value_([leaf], 0.7)
    torch.testing.assert_close(
        fs.clip_value(grad, max_value=0.7)["grad"], leaf.grad, rtol=0, atol=0
    )
