"""Everything public in functional_sgd, with arguments: what is listed here has to keep all the
laws.
"""

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor

import functional_sgd as fs
from functional_sgd import Chain, Optimizer, Rule, chain
from functional_sgd.schedules import one_cycle

Tree = Any

RULES: tuple[Rule, ...] = tuple(getattr(fs, name) for name in fs.rules.NAMES)

RECIPES: dict[str, Callable[[], Chain]] = {
    "adam": lambda: fs.adam(lr=0.02),
    "adam_wd": lambda: fs.adam(lr=0.02, wd=0.1),
    "adamw": lambda: fs.adamw(lr=0.02, wd=0.1),
    "lamb": lambda: fs.lamb(lr=0.02, wd=0.1),
    "larc": lambda: fs.larc(lr=0.05, wd=0.1),
    "lion": lambda: fs.lion(lr=0.01, wd=0.1),
    "momentum": lambda: fs.momentum(lr=0.05),
    "qhadam": lambda: fs.qhadam(lr=0.02, nu_2=0.9, wd=0.1),
    "radam": lambda: fs.radam(lr=0.02),
    "radam_wd": lambda: fs.radam(lr=0.02, wd=0.1),
    "ranger": lambda: fs.ranger(lr=0.02, sync_every=2),
    "rmsprop": lambda: fs.rmsprop(lr=0.01),
    "rmsprop_centered": lambda: fs.rmsprop(lr=0.01, centered=True),
    "rmsprop_momentum": lambda: fs.rmsprop(lr=0.01, mom=0.9),
    "rmsprop_wd_momentum_centered": lambda: fs.rmsprop(lr=0.01, wd=0.1, mom=0.9, centered=True),
    "sgd": lambda: fs.sgd(lr=0.05),
    "sgd_dampening": lambda: fs.sgd(lr=0.05, mom=0.9, dampening=0.3),
    "sgd_mom": lambda: fs.sgd(lr=0.05, mom=0.9),
    "sgd_nesterov_wd": lambda: fs.sgd(lr=0.05, mom=0.9, nesterov=True, wd=0.1),
    "sgd_wd": lambda: fs.sgd(lr=0.05, wd=0.1),
    "adamuon": lambda: fs.adamuon(lr=0.02, wd=0.1),
    "muon": lambda: fs.muon(lr=0.02, wd=0.1),
    "muon_float32": lambda: fs.muon(lr=0.02, adjust="match_rms_adamw", bfloat16=False),
    "normuon": lambda: fs.normuon(lr=0.02, wd=0.1),
    "shampoo": lambda: fs.shampoo(lr=0.02),
    "shampoo_every": lambda: fs.shampoo(lr=0.02, every=3),
    "soap": lambda: fs.soap(lr=0.02, wd=0.1, eps=1e-3),
    "soap_every": lambda: fs.soap(lr=0.02, eps=1e-3, every=2),
    # chains that no recipe has
    "identity": fs.identity,
    "lookahead_sgd": lambda: fs.lookahead(fs.sgd(lr=0.05), sync_every=3, slow_step=0.4),
    "lookahead_adamw": lambda: fs.lookahead(fs.adamw(lr=0.02), sync_every=2),
    "centralize_sgd": lambda: chain(fs.centralize, fs.sgd(lr=0.05, mom=0.9)),
    "clip_norm_adam": lambda: chain(fs.clip_norm, fs.adam(lr=0.02), max_norm=0.5),
    "clip_value_adamw": lambda: chain(fs.clip_value, fs.adamw(lr=0.02), max_value=0.5),
    "lars": lambda: chain(
        fs.weight_decay, fs.heavy_ball, fs.lars_ratio, fs.sgd_step, lr=0.05, wd=0.1
    ),
    "radam_fastai": lambda: chain(*_AVERAGES, fs.rectify, fs.sgd_step, lr=0.02),
    "radam_softplus": lambda: chain(
        *_AVERAGES, fs.rectify_softplus, fs.sgd_step, lr=0.02, beta=20.0
    ),
    "rmsprop_eps_inside": lambda: chain(
        fs.average_sqr_grad, fs.scale_by_rms_eps_inside, fs.sgd_step, lr=0.01
    ),
    "clip_norm_inside": lambda: chain(
        fs.average_grad, fs.rename(fs.clip_norm, grad="update"), fs.sgd_step, lr=0.05, max_norm=0.2
    ),
    "two_averages": lambda: chain(
        fs.average_grad,
        fs.rename(fs.average_grad, grad="update", grad_avg="slow_avg", mom="slow_mom"),
        fs.sgd_step,
        lr=0.05,
        slow_mom=0.5,
    ),
}


def is_matrix(path: str, leaf: Tensor) -> bool:
    """Whether a leaf has two axes."""
    return leaf.dim() == 2


def by_size(path: str, leaf: Tensor) -> str | None:
    """A label for every leaf: "large" from two axes on."""
    return "large" if leaf.dim() > 1 else "small"


def halves() -> Optimizer:
    """An optimizer for large leaves and another for small ones."""
    return fs.partition(
        {"large": fs.momentum(lr=0.05), "small": fs.adamw(lr=0.02, wd=0.1)}, by_size
    )


WRAPPED: dict[str, Callable[[], Optimizer]] = {
    "accumulate": lambda: fs.accumulate(fs.adamw(lr=0.02), every=2),
    "average_params": lambda: fs.average_params(fs.adam(lr=0.02), decay=0.9),
    "average_params_plain": lambda: fs.average_params(fs.sgd(lr=0.05, mom=0.9), decay=1.0),
    "freeze": lambda: fs.freeze(fs.adamw(lr=0.02, wd=0.1), is_matrix),
    "muon_with_adamw": lambda: fs.muon_with_adamw(lr=0.02, wd=0.1),
    "partition": halves,
    "sam": lambda: fs.sam(fs.adamw(lr=0.02, wd=0.1)),
    "schedule_free": lambda: fs.schedule_free(fs.rmsprop(lr=0.02, mom=None), mom=0.8, wd=0.1),
    "schedule_free_adamw": lambda: fs.schedule_free_adamw(lr=0.02, wd=0.1),
    "schedule_free_sgd": lambda: fs.schedule_free_sgd(lr=0.05, wd=0.1),
    "scheduled": lambda: fs.scheduled(fs.adamw(wd=0.1), steps=10, lr=one_cycle(0.02)),
    "skip_nonfinite": lambda: fs.skip_nonfinite(fs.adamw(lr=0.02, wd=0.1)),
    "skip_nonfinite_of_all_others": lambda: fs.skip_nonfinite(
        fs.average_params(
            fs.accumulate(fs.scheduled(halves(), wd=lambda step: 0.1 / (step + 1)), every=2),
            decay=0.8,
        )
    ),
}
"""Optimizers around optimizers: each wrapper at least once."""

OPTIMIZERS: dict[str, Callable[[], Optimizer]] = {**RECIPES, **WRAPPED}

_AVERAGES = (fs.average_grad, fs.average_sqr_grad, fs.debias)


def is_pointwise(rule: Rule) -> bool:
    """Whether an element's result depends on that element and on hypers alone."""
    return rule.scope == "elementwise" and not rule.signature.reductions


ELEMENTWISE_RULES = tuple(filter(is_pointwise, RULES))

ELEMENTWISE_RECIPES = tuple(
    name for name, make in RECIPES.items() if all(map(is_pointwise, make().rules))
)
SEPARABLE_RECIPES = tuple(
    name for name, make in RECIPES.items() if not any(rule.needs_tree for rule in make().rules)
)


def sample_tree(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tree:
    """A nested tree with leaves of 0, 1, 2 and 4 axes."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return torch.randn(shape, generator=generator, dtype=wide).to(dtype)

    return {
        "body": [leaf(3, 4), {"bias": leaf(4)}],
        "conv": leaf(2, 3, 2, 2),
        "ends": (leaf(), leaf(5)),
    }


def small_tree(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tree:
    """Two leaves, seven numbers between 0.5 and 1.5."""
    generator = torch.Generator().manual_seed(seed)
    matrix, scalar = (
        0.5 + torch.rand(shape, generator=generator, dtype=torch.float64) for shape in ((2, 3), ())
    )
    return {"matrix": matrix.to(dtype), "scalar": scalar.to(dtype)}


def run(
    opt: Optimizer, params: Tree, steps: int, state: Any = None, start: int = 0, **hyper: Any
) -> tuple[Tree, Any]:
    """Steps with random gradients, which depend on `start` and the number of the step alone."""
    state = opt.init(params) if state is None else state
    for number in range(start, start + steps):
        params, state = opt(params, random_like(params, 100 + number), state, hyper)
    return params, state


def random_like(params: Tree, seed: int) -> Tree:
    """Gradients for these params."""
    generator = torch.Generator().manual_seed(seed)

    def draw(leaf: Tensor) -> Tensor:
        wide = torch.complex128 if leaf.is_complex() else torch.float64
        return torch.randn(leaf.shape, generator=generator, dtype=wide).to(leaf.dtype)

    return optree.tree_map(draw, params)
