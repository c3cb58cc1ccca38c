"""Recipes with other momentum, and those that ask the gradient once more, compared with
pytorch_optimizer in float64, a hundred steps; plain loops after the authors' code where that
departs.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import functional_sgd as fs
from functional_sgd import Chain

SHAPES, STEPS, LR, WITHIN = ((4, 3), (5,), ()), 100, 0.01, 1e-9
Make = Callable[[Any, list[Tensor]], Any]


def drawn(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


START, GRADS = drawn(0), [drawn(1 + step) for step in range(STEPS)]


def largest_gap(ours: Any, theirs: list[Tensor]) -> float:
    return max(float((a - b.detach()).abs().max()) for a, b in zip(ours, theirs, strict=True))


def gap(
    opt: Chain, make: Make, hyper: Callable[[int], float] | None = None, **extras: Any
) -> float:
    """How far the two are apart at the worst step; with lr as a function of the step."""
    package = pytest.importorskip("pytorch_optimizer")
    mirrored = [leaf.clone().requires_grad_() for leaf in START]
    params: Any = START
    theirs, state, worst = make(package, mirrored), opt.init(START), 0.0
    for step, grads in enumerate(GRADS):
        for leaf, grad in zip(mirrored, grads, strict=True):
            leaf.grad = grad.clone()
        now = {} if hyper is None else {"lr": hyper(step)}
        for group in theirs.param_groups:
            group.update(now)
        theirs.step(**{name: [leaf.clone() for leaf in tree] for name, tree in extras.items()})
        params, state = opt(params, grads, state, now, **extras)
        worst = max(worst, largest_gap(params, mirrored))
    return worst


CASES: dict[str, tuple[Make, Chain]] = {
    "accsgd": (
        lambda po, p: po.AccSGD(p, LR, kappa=20.0, xi=4.0, constant=0.6, weight_decay=0.3),
        fs.accsgd(LR, stretch=20.0, advantage=4.0, caution=0.6, wd=0.3),
    ),
    "adai": (
        lambda po, p: po.Adai(p, LR, (0.3, 0.95), weight_decay=0.3, eps=1e-2),
        fs.adai(LR, looseness=0.3, sqr_mom=0.95, eps=1e-2, wd=0.3),
    ),
    "adamod": (
        lambda po, p: po.AdaMod(p, LR, (0.8, 0.95, 0.9), weight_decay=0.3, eps=1e-4),
        fs.adamod(LR, 0.8, 0.95, rate_mom=0.9, eps=1e-4, wd=0.3),
    ),
    "aggmo": (
        lambda po, p: po.AggMo(p, LR, (0.0, 0.8, 0.95), weight_decay=0.3),
        fs.aggmo(LR, mom=0.8, slow_mom=0.95, wd=0.3),
    ),
    "ftrl": (
        lambda po, p: po.FTRL(p, 0.5, beta=1.0, lambda_1=0.7, lambda_2=0.3),
        fs.ftrl(0.5, beta=1.0, l1=0.7, l2=0.3),
    ),
    "grams": (
        lambda po, p: po.Grams(p, LR, (0.8, 0.95), weight_decay=0.3, eps=1e-4),
        fs.grams(LR, 0.8, 0.95, eps=1e-4, wd=0.3),
    ),
    "grokfast_adamw": (
        lambda po, p: po.GrokFastAdamW(
            p, LR, (0.8, 0.95), True, 0.9, 3.0, weight_decay=0.3, normalize_lr=False, eps=0.0
        ),
        fs.grokfast_adamw(LR, 0.8, 0.95, eps=0.0, slow_mom=0.9, amplify=3.0, wd=0.3),
    ),
    "msvag": (lambda po, p: po.MSVAG(p, LR, beta=0.8), fs.msvag(LR, mom=0.8)),
    "pid": (
        lambda po, p: po.PID(p, LR, momentum=0.8, derivative=3.0, integral=2.0, weight_decay=0.3),
        fs.pid(LR, mom=0.8, derivative=3.0, integral=2.0, wd=0.3),
    ),
    "pnm": (
        lambda po, p: po.PNM(p, LR, (0.8, 0.6), weight_decay=0.3),
        fs.pnm(LR, mom=0.8, contrast=0.6, wd=0.3),
    ),
    "qhm": (
        lambda po, p: po.QHM(p, LR, momentum=0.8, nu=0.6, weight_decay=0.3),
        fs.qhm(LR, mom=0.8, nu=0.6, wd=0.3),
    ),
    "sgdp": (
        lambda po, p: po.SGDP(
            p, LR, 0.8, weight_decay=0.3 * (1 - 0.8), delta=1.0, wd_ratio=0.2, eps=0.0
        ),
        fs.sgdp(LR, 0.8, delta=1.0, wd_ratio=0.2, eps=0.0, wd=0.3),
    ),
    "sgdp nesterov": (
        lambda po, p: po.SGDP(p, LR, 0.8, delta=1.0, wd_ratio=0.2, nesterov=True, eps=0.0),
        fs.sgdp(LR, 0.8, True, delta=1.0, wd_ratio=0.2, eps=0.0),
    ),
    "sgdw": (
        lambda po, p: po.SGDW(p, LR, 0.8, weight_decay=0.3, dampening=0.4),
        fs.sgdw(LR, 0.8, dampening=0.4, wd=0.3),
    ),
    "sgdw nesterov": (
        lambda po, p: po.SGDW(p, LR, 0.8, weight_decay=0.3, nesterov=True),
        fs.sgdw(LR, 0.8, nesterov=True, wd=0.3),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_pytorch_optimizer(name: str) -> None:
    make, opt = CASES[name]
    assert gap(opt, make) <= WITHIN


def test_the_comparison_can_fail() -> None:
    make, _ = CASES["grams"]
    assert gap(fs.grams(LR, 0.8, 0.95, eps=1e-3, wd=0.3), make) > WITHIN


def test_adamc_while_the_rate_falls() -> None:
    """Theirs decays by the square of lr in groups that are marked; its peak is the first lr."""

    def normalized(po: Any, params: list[Tensor]) -> Any:
        groups = [dict(params=params, normalized=True)]
        return po.AdamC(groups, 2 * LR, (0.8, 0.95), weight_decay=0.3, eps=0.0)

    opt = fs.adamc(2 * LR, 0.8, 0.95, eps=0.0, max_lr=2 * LR, wd=0.3)
    assert gap(opt, normalized, hyper=lambda step: 2 * LR * (1 - step / STEPS)) <= WITHIN


def test_adahessian_with_the_same_hessians() -> None:
    hessian = drawn(1000)
    opt = fs.adahessian(LR, 0.8, 0.95, eps=1e-4, wd=0.3)
    assert (
        gap(
            opt,
            lambda po, p: po.AdaHessian(p, LR, (0.8, 0.95), weight_decay=0.3, eps=1e-4),
            hessian=hessian,
        )
        <= WITHIN
    )


def test_ftrl_leaves_what_has_had_no_gradient() -> None:
    """Theirs makes it 0; that is all that differs."""
    package = pytest.importorskip("pytorch_optimizer")
    start, grad = torch.tensor([3.0, 3.0]), torch.tensor([0.0, 1.0])
    leaf = start.clone().requires_grad_()
    leaf.grad = grad.clone()
    package.FTRL([leaf], 0.5, beta=1.0).step()
    opt = fs.ftrl(0.5, beta=1.0)
    after, _ = opt(start, grad, opt.init(start))
    assert leaf.tolist() == [0.0, float(after[1])]
    assert float(after[0]) == 3.0


# Plain loops over one leaf, after the authors' code.


def cautious_lion_by_hand(param: Tensor, grads: list[Tensor]) -> Tensor:
    m = torch.zeros_like(param)
    for grad in grads:
        param = param * (1 - LR * 0.3)
        update = (0.8 * m + 0.2 * grad).sign()
        mask = (update * grad > 0).to(grad.dtype)
        update = update * (mask / mask.mean().clamp(min=1e-3))
        param, m = param - LR * update, 0.95 * m + 0.05 * grad
    return param


def rmsprop_tf_by_hand(param: Tensor, grads: list[Tensor]) -> Tensor:
    """timm's RMSpropTF, with lr_in_momentum."""
    square, ball = torch.ones_like(param), torch.zeros_like(param)
    for grad in grads:
        grad = grad + 0.3 * param
        square = square + (1 - 0.95) * (grad**2 - square)
        ball = 0.8 * ball + LR * grad / (square + 1e-4).sqrt()
        param = param - ball
    return param


BY_HAND: dict[str, tuple[Callable[[Tensor, list[Tensor]], Tensor], Chain]] = {
    "cautious_lion": (cautious_lion_by_hand, fs.cautious_lion(LR, 0.8, slow_mom=0.95, wd=0.3)),
    "rmsprop_tf": (rmsprop_tf_by_hand, fs.rmsprop_tf(LR, 0.95, eps=1e-4, mom=0.8, wd=0.3)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_authors_code(name: str) -> None:
    loop, opt = BY_HAND[name]
    params: Any = START
    state = opt.init(params)
    for grads in GRADS:
        params, state = opt(params, grads, state)
    wanted = [loop(leaf, [grads[place] for grads in GRADS]) for place, leaf in enumerate(START)]
    assert largest_gap(params, wanted) <= 1e-12
