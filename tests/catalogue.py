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
    "adadelta": lambda: fs.adadelta(lr=0.5, wd=0.1),
    "adafactor": lambda: fs.adafactor(lr=0.02),
    "adafactor_wd": lambda: fs.adafactor(lr=0.02, max_rms=1.5, wd=0.1),
    "adagrad": lambda: fs.adagrad(lr=0.05),
    "adagrad_lr_decay_wd": lambda: fs.adagrad(lr=0.05, lr_decay=0.1, first_sum=0.1, wd=0.1),
    "adam": lambda: fs.adam(lr=0.02),
    "adam_amsgrad": lambda: fs.adam(lr=0.02, amsgrad=True),
    "adam_wd": lambda: fs.adam(lr=0.02, wd=0.1),
    "adamax": lambda: fs.adamax(lr=0.02, wd=0.1),
    "adamw": lambda: fs.adamw(lr=0.02, wd=0.1),
    "asgd": lambda: fs.asgd(lr=0.05, lambd=0.1, average_from=0.0, wd=0.1),
    "adam_mini": lambda: fs.adam_mini(lr=0.02, wd=0.1),
    "came": lambda: fs.came(lr=0.02, wd=0.1),
    "fromage": lambda: fs.fromage(lr=0.02),
    "lamb": lambda: fs.lamb(lr=0.02, wd=0.1),
    "larc": lambda: fs.larc(lr=0.05, wd=0.1),
    "lars": lambda: fs.lars(lr=0.05, trust_coeff=0.02, wd=0.1, nesterov=True),
    "lion": lambda: fs.lion(lr=0.01, wd=0.1),
    "madgrad": lambda: fs.madgrad(lr=0.02, wd=0.1),
    "momentum": lambda: fs.momentum(lr=0.05),
    "nadam": lambda: fs.nadam(lr=0.02, wd=0.1),
    "normalized_sgd": lambda: fs.normalized_sgd(lr=0.05, mom=0.9),
    "novograd": lambda: fs.novograd(lr=0.02, wd=0.1),
    "optimistic_adam": lambda: fs.optimistic_adam(lr=0.02),
    "optimistic_sgd": lambda: fs.optimistic_sgd(lr=0.05, optimism=0.5),
    "qhadam": lambda: fs.qhadam(lr=0.02, nu_2=0.9, wd=0.1),
    "radam": lambda: fs.radam(lr=0.02),
    "radam_wd": lambda: fs.radam(lr=0.02, wd=0.1),
    "ranger": lambda: fs.ranger(lr=0.02, sync_every=2),
    "rmsprop": lambda: fs.rmsprop(lr=0.01),
    "rmsprop_centered": lambda: fs.rmsprop(lr=0.01, centered=True),
    "rmsprop_momentum": lambda: fs.rmsprop(lr=0.01, mom=0.9),
    "rmsprop_wd_momentum_centered": lambda: fs.rmsprop(lr=0.01, wd=0.1, mom=0.9, centered=True),
    "rprop": lambda: fs.rprop(lr=0.05),
    "sgd": lambda: fs.sgd(lr=0.05),
    "sgd_dampening": lambda: fs.sgd(lr=0.05, mom=0.9, dampening=0.3),
    "sgd_mom": lambda: fs.sgd(lr=0.05, mom=0.9),
    "sgd_nesterov_wd": lambda: fs.sgd(lr=0.05, mom=0.9, nesterov=True, wd=0.1),
    "sgd_wd": lambda: fs.sgd(lr=0.05, wd=0.1),
    "acprop": lambda: fs.acprop(lr=0.02, wd=0.1),
    "adabelief": lambda: fs.adabelief(lr=0.02, wd=0.1),
    "adabound": lambda: fs.adabound(lr=0.02, final_scale=5.0, gamma=0.1),
    "adabound_wd": lambda: fs.adabound(lr=0.02, wd=0.1),
    "adamp": lambda: fs.adamp(lr=0.02, delta=0.5, wd=0.1),
    "adan": lambda: fs.adan(lr=0.02, wd=0.1),
    "ademamix": lambda: fs.ademamix(lr=0.02, wd=0.1),
    "adopt": lambda: fs.adopt(lr=0.02),
    "adopt_wd": lambda: fs.adopt(lr=0.02, wd=0.1),
    "cautious_adamw": lambda: fs.cautious_adamw(lr=0.02, wd=0.1),
    "laprop": lambda: fs.laprop(lr=0.02, wd=0.1),
    "mars": lambda: fs.mars(lr=0.02, wd=0.1),
    "nadamw": lambda: fs.nadamw(lr=0.02, wd=0.1),
    "simplified_ademamix": lambda: fs.simplified_ademamix(lr=0.002, alpha=2.0, wd=0.1),
    "stable_adamw": lambda: fs.stable_adamw(lr=0.02, wd=0.1),
    "yogi": lambda: fs.yogi(lr=0.02, wd=0.1),
    "sign_sgd": lambda: fs.sign_sgd(lr=0.01, wd=0.1),
    "signum": lambda: fs.signum(lr=0.01, wd=0.1),
    "sm3": lambda: fs.sm3(lr=0.05),
    "spam": lambda: fs.spam(lr=0.02, spike=4.0, restart_every=4, patience=1, warmup=2, wd=0.1),
    "tiger": lambda: fs.tiger(lr=0.01, wd=0.1),
    "accsgd": lambda: fs.accsgd(lr=0.02, stretch=20.0, advantage=4.0, wd=0.1),
    "adai": lambda: fs.adai(lr=0.05, wd=0.1),
    "adamaxw": lambda: fs.adamaxw(lr=0.02, wd=0.1),
    "adamc": lambda: fs.adamc(lr=0.02, max_lr=0.05, wd=0.1),
    "adamod": lambda: fs.adamod(lr=0.02, rate_mom=0.5, wd=0.1),
    "aggmo": lambda: fs.aggmo(lr=0.02, wd=0.1),
    "cautious_lion": lambda: fs.cautious_lion(lr=0.01, wd=0.1),
    "ftrl": lambda: fs.ftrl(lr=0.05, beta=1.0, l1=0.1, l2=0.1),
    "grams": lambda: fs.grams(lr=0.02, wd=0.1),
    "grokfast_adamw": lambda: fs.grokfast_adamw(lr=0.02, wd=0.1),
    "msvag": lambda: fs.msvag(lr=0.05, wd=0.1),
    "pid": lambda: fs.pid(lr=0.005, wd=0.1),
    "pnm": lambda: fs.pnm(lr=0.05, wd=0.1),
    "qhm": lambda: fs.qhm(lr=0.05, wd=0.1),
    "rmsprop_tf": lambda: fs.rmsprop_tf(lr=0.01, wd=0.1),
    "sgdp": lambda: fs.sgdp(lr=0.02, delta=0.5, nesterov=True, wd=0.1),
    "sgdw": lambda: fs.sgdw(lr=0.05, mom=0.9, wd=0.1),
    # rates by distances
    "prodigy": lambda: fs.prodigy(first_distance=0.01, wd=0.1),
    "prodigy_slow": lambda: fs.prodigy(first_distance=0.01, growth_rate=1.5, safeguard_warmup=True),
    "d_adapt_adam": lambda: fs.d_adapt_adam(first_distance=0.01, wd=0.1),
    "d_adapt_adam_decoupled": lambda: fs.d_adapt_adam(first_distance=0.01, wd=0.1, decoupled=True),
    "d_adapt_sgd": lambda: fs.d_adapt_sgd(mom=0.5, first_distance=0.01, wd=0.1),
    "d_adapt_adagrad": lambda: fs.d_adapt_adagrad(mom=0.5, first_distance=0.01, wd=0.1),
    "dog": lambda: fs.dog(first_move=0.01, wd=0.1),
    "dowg": lambda: fs.dowg(wd=0.1),
    "cocob": lambda: fs.cocob(wd=0.1),
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
    "adam_eps_early": lambda: chain(*_AVERAGES, fs.scale_by_rms_eps_early, fs.sgd_step, lr=0.02),
    "ascend_adamw": lambda: chain(fs.ascend, fs.adamw(lr=0.02, wd=0.1)),
    "adaptive_clip_sgd": lambda: chain(fs.adaptive_clip, fs.sgd(lr=0.05, mom=0.9)),
    "centralize_sgd": lambda: chain(fs.centralize, fs.sgd(lr=0.05, mom=0.9)),
    "clip_norm_adam": lambda: chain(fs.clip_norm, fs.adam(lr=0.02), max_norm=0.5),
    "clip_value_adamw": lambda: chain(fs.clip_value, fs.adamw(lr=0.02), max_value=0.5),
    "clip_rms_sgd": lambda: chain(fs.clip_rms, fs.sgd(lr=0.05, mom=0.9), max_rms=0.5),
    "lars_fastai": lambda: chain(
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
    "ema_of_update": lambda: chain(*_ADAPTED, *_EMA, fs.sgd_step, lr=0.02, update_mom=0.8),
    "non_negative": lambda: chain(fs.sgd(lr=0.05), fs.project_non_negative),
    "box": lambda: chain(fs.adam(lr=0.05), fs.project_box, low=-0.5, high=0.7),
    "l1_ball": lambda: chain(fs.sgd(lr=0.05), fs.project_l1_ball, radius=1.5),
    "l2_ball": lambda: chain(fs.sgd(lr=0.05), fs.project_l2_ball, radius=0.7),
    "l2_sphere": lambda: chain(fs.sgd(lr=0.05), fs.project_l2_sphere, radius=0.7),
    "simplex": lambda: chain(fs.sgd(lr=0.05), fs.project_simplex),
    "snapshots": lambda: chain(
        fs.snapshot_mean,
        fs.snapshot_largest,
        fs.average_grad,
        fs.rename(fs.snapshot_norm, grad="update", norm_seen="update_norm"),
        fs.sgd_step,
        lr=0.05,
    ),
    "two_averages": lambda: chain(
        fs.average_grad,
        fs.rename(fs.average_grad, grad="update", grad_avg="slow_avg", mom="slow_mom"),
        fs.sgd_step,
        lr=0.05,
        slow_mom=0.5,
    ),
}


MOVES_ZEROS = {"simplex"}
"""Recipes that leave zero params with zero gradients somewhere else."""


RANDOM: dict[str, Callable[[], Chain]] = {
    "apollo": lambda: fs.apollo(lr=0.02, wd=0.1, rank=2, sketch_every=3),
    "apollo_mini": lambda: fs.apollo_mini(lr=0.005, wd=0.1, sketch_every=3),
    "dion": lambda: fs.dion(lr=0.02, wd=0.1, rank_fraction=0.5),
    "kron": lambda: fs.kron(lr=0.02, wd=0.1, max_rms=1e3),
    "noisy_sgd": lambda: fs.noisy_sgd(lr=0.05, noise=0.5),
    "sgld": lambda: fs.sgld(lr=0.05, temperature=0.1),
}
"""Recipes that draw random numbers: they move without a gradient, and by the place of a leaf."""

DRAW_FOR_MATRICES = {"apollo", "apollo_mini", "dion"}
"""Those of them in which nothing is drawn for vectors, and matrices of two rows or columns."""


NARROW: dict[str, Callable[[], Chain]] = {
    "clipped_stochastic": lambda: chain(fs.clip_norm, fs.adamw(lr=0.02), fs.round_stochastically),
    "compensated_adamw": lambda: chain(fs.adamw(lr=0.02, wd=0.1), fs.compensate_rounding),
    "compensated_momentum": lambda: chain(fs.momentum(lr=0.05), fs.compensate_rounding),
    "eight_bit_adamw": lambda: fs.eight_bit(fs.adamw(lr=0.02, wd=0.1)),
    "eight_bit_lamb": lambda: fs.eight_bit(fs.lamb(lr=0.02)),
    "eight_bit_momentum": lambda: chain(
        fs.eight_bit(fs.momentum(lr=0.05)), fs.round_stochastically
    ),
    "stochastic_momentum": lambda: chain(fs.momentum(lr=0.05), fs.round_stochastically),
}
"""Recipes that round in their own way: in half precision they are not float32 rounded once."""


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
    "average_params_swa": lambda: fs.average_params(fs.sgd(lr=0.05), 1.0, start=2, every=2),
    "average_params_from_the_first": lambda: fs.average_params(
        fs.sgd(lr=0.05), 0.8, start=1, debias=False
    ),
    "freeze": lambda: fs.freeze(fs.adamw(lr=0.02, wd=0.1), is_matrix),
    "lazy_rows": lambda: fs.lazy_rows(fs.adamw(lr=0.02, wd=0.1)),
    "low_rank": lambda: fs.low_rank(fs.adam(lr=0.05), rank=2, basis_every=3),
    "galore": lambda: fs.galore(lr=0.05, wd=0.1, rank=1, basis_every=2),
    "mechanize": lambda: fs.mechanize(fs.adamw(lr=1.0, wd=0.1), first_rate=0.02, tuners=3),
    "muon_with_adamw": lambda: fs.muon_with_adamw(lr=0.02, wd=0.1),
    "partition": halves,
    "sam": lambda: fs.sam(fs.adamw(lr=0.02, wd=0.1)),
    "schedule_free": lambda: fs.schedule_free(fs.rmsprop(lr=0.02, mom=None), mom=0.8, wd=0.1),
    "schedule_free_adamw": lambda: fs.schedule_free_adamw(lr=0.02, wd=0.1),
    "schedule_free_radam": lambda: fs.schedule_free_radam(lr=0.02, wd=0.1),
    "schedule_free_sgd": lambda: fs.schedule_free_sgd(lr=0.05, wd=0.1),
    "scheduled": lambda: fs.scheduled(fs.adamw(wd=0.1), steps=10, lr=one_cycle(0.02)),
    "skip_large": lambda: fs.skip_large(fs.adamw(lr=0.02, wd=0.1), max_norm=7.0),
    "skip_nonfinite_limit": lambda: fs.skip_nonfinite(fs.adamw(lr=0.02, wd=0.1), limit=2),
    "skip_nonfinite": lambda: fs.skip_nonfinite(fs.adamw(lr=0.02, wd=0.1)),
    "skip_nonfinite_of_all_others": lambda: fs.skip_nonfinite(
        fs.average_params(
            fs.accumulate(fs.scheduled(halves(), wd=lambda step: 0.1 / (step + 1)), every=2),
            decay=0.8,
        )
    ),
    "sparse_adam": lambda: fs.sparse_adam(lr=0.02),
}
"""Optimizers around optimizers: each wrapper at least once."""

OPTIMIZERS: dict[str, Callable[[], Optimizer]] = {**RECIPES, **WRAPPED}

Extras = Callable[[Tree], dict[str, Any]]


def loss_of(params: Tree) -> dict[str, Any]:
    """A loss at these params, as an extra: a bowl."""
    squares = [leaf.abs().double().square().sum() for leaf in optree.tree_leaves(params)]
    return dict(value=sum(squares) / 2)


WITH_EXTRAS: dict[str, tuple[Callable[[], Chain], Extras]] = {
    "sophia": (
        lambda: fs.sophia(lr=0.02, hessian_every=2),
        lambda params: {"hessian": optree.tree_map(torch.square, random_like(params, 7))},
    ),
    "adahessian": (
        lambda: fs.adahessian(lr=0.02, wd=0.1),
        lambda params: {"hessian": optree.tree_map(torch.square, random_like(params, 7))},
    ),
    "momo": (lambda: fs.momo(lr=0.1, wd=0.1), loss_of),
    "momo_adam": (lambda: fs.momo_adam(lr=0.1, wd=0.1), loss_of),
    "polyak_sgd": (lambda: fs.polyak_sgd(lr=0.5), loss_of),
}
"""Recipes that need something from the caller, and what that is, for some params."""

_AVERAGES = (fs.average_grad, fs.average_sqr_grad, fs.debias)
_ADAPTED = (fs.average_sqr_grad, fs.scale_by_rms)
_EMA = (
    fs.rename(fs.average_grad, grad="update", grad_avg="update_avg", mom="update_mom"),
    fs.rename(fs.debias, grad_avg="update_avg", sqr_avg="sqr_update_avg", mom="update_mom"),
)


def is_pointwise(rule: Rule) -> bool:
    """Whether an element's result depends on that element and on hypers alone."""
    signature = rule.signature
    of_others = signature.reductions or signature.numbers or signature.random
    return rule.scope == "elementwise" and not of_others


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
