"""The same numbers as fastai's optimizers (Q17, B22): random gradients, float64, a hundred steps,
within 1e-12.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import functional_sgd as fs
from functional_sgd import Chain, Rule, chain, lookahead
from tests.peers.peers import fastai_module

fastai = fastai_module("fastai.optimizer")

SHAPES = ((4, 3), (5,), ())
LR, STEPS = 0.01, 100
AVERAGES = (fs.average_grad, fs.average_sqr_grad, fs.debias)

Theirs = Callable[[list[Tensor], bool], Any]
Ours = Callable[[Rule], Chain]


def of(*rules: Rule, **given: float) -> Ours:
    """Our chain, with the kind of decay in front."""
    return lambda decay: chain(decay, *rules, fs.sgd_step, **{"lr": LR, "wd": 0.0, **given})


CASES: dict[str, tuple[Theirs, Ours]] = {
    "sgd": (lambda p, true: fastai.SGD(p, LR, wd=0.1, decouple_wd=true), of(wd=0.1)),
    "sgd mom": (
        lambda p, true: fastai.SGD(p, LR, mom=0.9, wd=0.1, decouple_wd=true),
        of(fs.heavy_ball, mom=0.9, wd=0.1),
    ),
    "rmsprop": (
        lambda p, true: fastai.RMSProp(p, LR, sqr_mom=0.95, wd=0.1, decouple_wd=true),
        of(fs.average_sqr_grad, fs.scale_by_rms, sqr_mom=0.95, wd=0.1),
    ),
    "rmsprop mom": (
        lambda p, true: fastai.RMSProp(p, LR, mom=0.9, wd=0.1, decouple_wd=true),
        of(fs.heavy_ball, fs.average_sqr_grad, fs.scale_by_rms, mom=0.9, wd=0.1),
    ),
    "adam": (
        lambda p, true: fastai.Adam(p, LR, wd=0.1, decouple_wd=true),
        of(*AVERAGES, fs.scale_by_rms, sqr_mom=0.99, eps=1e-5, wd=0.1),
    ),
    "radam": (
        lambda p, true: fastai.RAdam(p, LR, wd=0.1, decouple_wd=true),
        of(*AVERAGES, fs.rectify, sqr_mom=0.99, eps=1e-5, wd=0.1),
    ),
    "radam beta": (
        lambda p, true: fastai.RAdam(p, LR, wd=0.1, beta=20.0, decouple_wd=true),
        of(*AVERAGES, fs.rectify_softplus, sqr_mom=0.99, eps=1e-5, wd=0.1, beta=20.0),
    ),
    "qhadam": (
        lambda p, true: fastai.QHAdam(p, LR, wd=0.1, nu_2=0.8, decouple_wd=true),
        of(
            *AVERAGES,
            fs.quasi_hyperbolic,
            fs.scale_by_rms,
            mom=0.999,
            sqr_mom=0.999,
            nu_2=0.8,
            wd=0.1,
        ),
    ),
    "larc": (
        lambda p, true: fastai.Larc(p, LR, wd=0.1, trust_coeff=2.0, decouple_wd=true),
        of(fs.heavy_ball, fs.larc_ratio, mom=0.9, wd=0.1, trust_coeff=2.0),
    ),
    "lars": (
        lambda p, true: fastai.Larc(p, LR, wd=0.1, clip=False, decouple_wd=true),
        of(fs.heavy_ball, fs.lars_ratio, mom=0.9, wd=0.1),
    ),
    "lamb": (
        lambda p, true: fastai.Lamb(p, LR, wd=0.1, decouple_wd=true),
        of(*AVERAGES, fs.scale_by_rms, fs.trust_ratio, sqr_mom=0.99, eps=1e-5, wd=0.1),
    ),
    "lookahead": (
        lambda p, true: fastai.Lookahead(
            fastai.SGD(p, LR, wd=0.1, decouple_wd=true), k=4, alpha=0.3
        ),
        lambda decay: lookahead(of(wd=0.1)(decay), sync_every=4, slow_step=0.3),
    ),
    "ranger": (
        lambda p, true: fastai.ranger(p, LR, decouple_wd=true),
        lambda decay: lookahead(
            of(*AVERAGES, fs.rectify, mom=0.95, sqr_mom=0.99, eps=1e-6, wd=0.01)(decay)
        ),
    ),
}

RECIPES: dict[str, tuple[Theirs, Callable[[], Chain]]] = {
    "sgd": (lambda p, true: fastai.SGD(p, LR, mom=0.9), lambda: fs.sgd(LR, mom=0.9)),
    "rmsprop": (lambda p, true: fastai.RMSProp(p, LR), lambda: fs.rmsprop(LR)),
    "adamw": (lambda p, true: fastai.Adam(p, LR, sqr_mom=0.999, eps=1e-8), lambda: fs.adamw(LR)),
    "qhadam": (lambda p, true: fastai.QHAdam(p, LR, wd=0.1), lambda: fs.qhadam(LR, wd=0.1)),
    "larc": (lambda p, true: fastai.Larc(p, LR, wd=0.1), lambda: fs.larc(LR, wd=0.1)),
    "lamb": (lambda p, true: fastai.Lamb(p, LR, wd=0.1), lambda: fs.lamb(LR, wd=0.1)),
    "ranger": (lambda p, true: fastai.ranger(p, LR), lambda: fs.ranger(LR)),
}


def largest_difference(make: Theirs, decoupled: bool, ours: Chain) -> float:
    """Over all steps and leaves."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> list[Tensor]:
        return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]

    params: Any = draw()
    mirrored = [torch.nn.Parameter(leaf.clone()) for leaf in params]
    theirs, state, worst = make(mirrored, decoupled), ours.init(params), 0.0
    for _ in range(STEPS):
        grads = draw()
        for leaf, grad in zip(mirrored, grads, strict=True):
            leaf.grad = grad.clone()
        theirs.step()
        params, state = ours(params, grads, state)
        worst = max(
            worst,
            *(float((a - b.detach()).abs().max()) for a, b in zip(params, mirrored, strict=True)),
        )
    return worst


@pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "l2"])
@pytest.mark.parametrize("name", CASES)
def test_chains(name: str, decoupled: bool) -> None:
    theirs, ours = CASES[name]
    assert (
        largest_difference(theirs, decoupled, ours(fs.weight_decay if decoupled else fs.l2_reg))
        <= 1e-12
    )


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str) -> None:
    theirs, ours = RECIPES[name]
    assert largest_difference(theirs, True, ours()) <= 1e-12


def test_the_comparison_can_fail() -> None:
    """fastai's RAdam and torch's differ by where eps is added."""
    theirs, _ = CASES["radam"]
    ours = of(*AVERAGES, fs.rectify_eps_early, sqr_mom=0.99, eps=1e-5, wd=0.1)(fs.weight_decay)
    assert largest_difference(theirs, True, ours) > 1e-8
