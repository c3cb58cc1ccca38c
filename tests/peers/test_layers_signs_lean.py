"""pytorch_optimizer's numbers, where it does what the papers say: float64, a hundred steps, within
1e-9.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import functional_sgd as fs
from functional_sgd import Chain

po = pytest.importorskip("pytorch_optimizer")

SHAPES = ((4, 3), (5,), ())
MATRICES = ((4, 3), (2, 5))
STEPS = 100
Make = Callable[[list[Tensor]], torch.optim.Optimizer]

CASES: dict[str, tuple[Make, Chain, tuple[tuple[int, ...], ...]]] = {
    "lars": (
        lambda p: po.LARS(p, 0.1, weight_decay=0.1, trust_coefficient=0.02),
        fs.lars(lr=0.1, wd=0.1, trust_coeff=0.02),
        MATRICES,  # theirs treats others by plain SGD
    ),
    "lars nesterov": (
        lambda p: po.LARS(p, 0.1, trust_coefficient=0.02, nesterov=True),
        fs.lars(lr=0.1, trust_coeff=0.02, nesterov=True),
        MATRICES,
    ),
    "novograd": (lambda p: po.NovoGrad(p, 0.01), fs.novograd(lr=0.01), SHAPES),
    "novograd wd": (
        lambda p: po.NovoGrad(p, 0.01, betas=(0.9, 0.25), weight_decay=0.1, eps=1e-3),
        fs.novograd(lr=0.01, mom=0.9, sqr_mom=0.25, wd=0.1, eps=1e-3),
        SHAPES,
    ),
    "fromage": (lambda p: po.Fromage(p, 0.1), fs.fromage(lr=0.1), SHAPES),
    "sign_sgd": (
        lambda p: po.SignSGD(p, 0.01, momentum=0.0, weight_decay=0.1),
        fs.sign_sgd(lr=0.01, wd=0.1),
        SHAPES,
    ),
    "signum": (
        lambda p: po.SignSGD(p, 0.01, weight_decay=0.1),
        fs.signum(lr=0.01, wd=0.1),
        SHAPES,
    ),
    "tiger without sizes": (
        lambda p: po.Tiger(p, 0.01),
        fs.signum(lr=0.01, mom=0.965, wd=0.01),
        SHAPES,
    ),
    "sm3": (
        lambda p: po.SM3(p, 0.1, momentum=0.9, eps=1e-30),
        fs.sm3(lr=0.1),
        (*SHAPES, (2, 3, 2)),
    ),
    "came": (
        lambda p: po.CAME(p, 0.01, weight_decay=0.1),
        fs.came(lr=0.01, wd=0.1),
        (*SHAPES, (2, 3, 2)),
    ),
    "came betas": (
        lambda p: po.CAME(p, 0.01, betas=(0.8, 0.9, 0.95), clip_threshold=0.3, eps1=1e-3, eps2=0.1),
        fs.came(
            lr=0.01, mom=0.8, sqr_mom=0.9, doubt_mom=0.95, max_rms=0.3, eps_sqr=1e-3, eps_doubt=0.1
        ),
        SHAPES,
    ),
    "madgrad": (lambda p: po.MADGRAD(p, 0.01), fs.madgrad(lr=0.01), SHAPES),
    "madgrad wd": (
        lambda p: po.MADGRAD(p, 0.01, momentum=0.5, weight_decay=0.1, eps=1e-3),
        fs.madgrad(lr=0.01, mom=0.5, wd=0.1, eps=1e-3),
        SHAPES,
    ),
    "spam before a restart": (
        lambda p: po.SPAM(p, 0.01, threshold=2, grad_accu_steps=5, weight_decay=0.1),
        fs.spam(lr=0.01, spike=2.0, patience=5, wd=0.1),
        SHAPES,
    ),
}


def drawn(shapes: tuple[tuple[int, ...], ...], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def gap(ours: Any, mirrored: list[Tensor]) -> float:
    return max(float((a - b.detach()).abs().max()) for a, b in zip(ours, mirrored, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_same_params_after_a_hundred_steps(name: str) -> None:
    make, opt, shapes = CASES[name]
    params: Any = drawn(shapes, 0)
    mirrored = [leaf.clone().requires_grad_() for leaf in params]
    theirs, state, worst = make(mirrored), opt.init(params), 0.0
    for step in range(STEPS):
        grads = drawn(shapes, 1 + step)
        for leaf, grad in zip(mirrored, grads, strict=True):
            leaf.grad = grad.clone()
        theirs.step()
        params, state = opt(params, grads, state)
        worst = max(worst, gap(params, mirrored))
    assert worst <= 1e-9


def test_sophia_with_the_same_hessians() -> None:
    """Theirs has no rho: it clips at p, so both are scaled."""
    rho, lr, wd = 0.3, 0.01, 0.1
    opt = fs.sophia(lr=lr, rho=rho, eps=1e-3, wd=wd, hessian_every=1)
    params: Any = drawn(SHAPES, 0)
    mirrored = [leaf.clone().requires_grad_() for leaf in params]
    theirs = po.SophiaH(
        mirrored, lr / rho, betas=(0.965, 0.99), p=rho, eps=1e-3 / rho, weight_decay=wd * rho
    )
    state = opt.init(params)
    for step in range(STEPS):
        grads, hessian = drawn(SHAPES, 1 + step), drawn(SHAPES, 1000 + step)
        for leaf, grad in zip(mirrored, grads, strict=True):
            leaf.grad = grad.clone()
        theirs.step(hessian=[leaf.clone() for leaf in hessian])
        params, state = opt(params, grads, state, hessian=hessian)
    assert gap(params, mirrored) <= 1e-9
