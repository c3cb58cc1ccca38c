"""Optimizers that see a leaf as a matrix: orthogonal updates (Muon and kin), and preconditioners
for its two sides (Shampoo, SOAP, Kron).

What they do with leaves of fewer than two axes is seldom what one wants: give those to another
optimizer, as `muon_with_adamw` does, or `partition`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from functional_sgd import rules
from functional_sgd.catalogue.adaptive import adamw
from functional_sgd.catalogue.parts import recipe
from functional_sgd.chaining import Chain, chain
from functional_sgd.rule import Rule
from functional_sgd.rules import (
    average_grad,
    average_in_eigenbasis,
    average_sqr_grad,
    clip_rms,
    debias,
    heavy_ball,
    match_rms_of_adamw,
    normalize_rows,
    orthogonalize,
    orthogonalize_in_bfloat16,
    precondition_sides,
    scale_by_aspect,
    scale_by_fans,
    scale_by_rms,
    set_rms,
    sgd_step,
    sign_of_average,
    weight_decay,
    whiten,
)
from functional_sgd.rules.directions import of_fraction
from functional_sgd.trial import rename
from functional_sgd.wrappers.labels import Patterned, covers
from functional_sgd.wrappers.partition import Partition, partition

__all__ = ["adamuon", "dion", "kron", "muon", "muon_with_adamw", "normuon", "shampoo", "soap"]

Adjust: TypeAlias = Literal["original", "match_rms_adamw"]
"""How updates are scaled by the shape of their matrix, by torch's names for it."""

SCALES: dict[str, Rule] = {
    "original": scale_by_aspect,
    "match_rms_adamw": match_rms_of_adamw,
}


@recipe
def muon(
    lr: float = 1e-3,
    mom: float = 0.95,
    wd: float = 0.1,
    nesterov: bool = True,
    adjust: Adjust = "original",
    bfloat16: bool = True,
) -> Chain:
    """SGD with momentum whose updates of matrices are made orthogonal: every direction moves
    equally far. Decoupled weight decay.

    For matrices, and kernels of convolutions; leaves of fewer than two axes take the momentum's
    steps. `muon_with_adamw` gives them, and embeddings, to AdamW. `adjust` says how far matrices
    of other shapes move: with "match_rms_adamw", lr and wd of adamw can be kept. Iterations are in
    float32 with bfloat16=False, and in float64 for float64 leaves.

    Source: Jordan et al. 2024; Liu et al. 2025 for "match_rms_adamw"; numbers of torch.optim.Muon,
    whose momentum is an average, which does not matter to an orthogonal update; in bfloat16 it
    rounds less often than the authors do.

    >>> print(*muon().rules)
    weight_decay heavy_ball nesterov orthogonalize_in_bfloat16 scale_by_aspect sgd_step
    """
    ahead = [rules.nesterov] if nesterov else []
    scale = _scale("muon", adjust)
    parts = (weight_decay, heavy_ball, *ahead, _orthogonal(bfloat16), scale, sgd_step)
    return chain(*parts, lr=lr, mom=mom, wd=wd)


@recipe
def muon_with_adamw(
    lr: float = 1e-3,
    adamw_lr: float = 1e-3,
    mom: float = 0.95,
    wd: float = 0.1,
    adjust: Adjust = "original",
    others: str | Iterable[str] = (),
) -> Partition:
    """Muon for matrices, and AdamW for all leaves with fewer than two axes.

    `others` are patterns of paths that AdamW gets too, such as the embedding and the head:
    ("embed", "head"), or one of them. The numbers of either part can be set by "muon.lr",
    "adamw.lr", ... AdamW has the same `wd`, and the momenta of its recipe. For other optimizers, or
    for more parts, write a `partition`. Raises ValueError, in `init`, if a pattern matches no leaf.

    Source: Jordan et al. 2024; numbers of torch.optim.Muon and torch.optim.AdamW.

    >>> import torch
    >>> params = {"embed": torch.ones(3, 2), "w": torch.eye(2), "b": torch.ones(2)}
    >>> opt = muon_with_adamw(lr=0.02, others=("embed",))
    >>> {part: list(state["grad_avg" if part == "adamw" else "velocity"])
    ...  for part, state in opt.init(params)["parts"].items()}
    {'adamw': ['b', 'embed'], 'muon': ['w']}
    """
    parts = {
        "muon": muon(lr=lr, mom=mom, wd=wd, adjust=adjust),
        "adamw": adamw(lr=adamw_lr, wd=wd),
    }
    patterns = (others,) if isinstance(others, str) else tuple(others)
    return partition(parts, MatricesBut(patterns, "muon", "adamw"))


@recipe
def dion(
    lr: float = 1e-2,
    mom: float = 0.95,
    wd: float = 0.01,
    eps: float = 1e-8,
    rank_fraction: float = 1.0,
) -> Chain:
    """Muon of low rank: updates of matrices are orthonormal along the strongest directions of the
    momentum, and what they leave out stays in it. Decoupled weight decay.

    See `power_iteration`; the state of a matrix is its momentum, and rank_fraction of the square of
    its shorter side. For matrices: leaves of fewer than two axes take the momentum's steps, so give
    them, embeddings and the head to another optimizer by `partition`, as `muon_with_adamw` does.
    The authors train these with Lion at the same lr, the head's divided by the root of its inputs.

    Source: Ahn et al. 2025; numbers of the authors' code, but that float64 is so throughout, and
    NaN stays NaN.

    >>> print(*dion(rank_fraction=0.25).rules)
    weight_decay power_iteration scale_by_fans sgd_step
    """
    parts = (of_fraction(rank_fraction), scale_by_fans, sgd_step)
    return chain(weight_decay, *parts, lr=lr, mom=mom, wd=wd, eps=eps)


@recipe
def normuon(
    lr: float = 2e-2,
    mom: float = 0.95,
    sqr_mom: float = 0.95,
    wd: float = 0.0,
    eps: float = 1e-10,
    nesterov: bool = True,
    bfloat16: bool = True,
) -> Chain:
    """Muon with a speed for each row of a matrix, so that no neuron moves further than the others.

    For matrices, as muon. Kernels of convolutions are flattened here for all that is done; the
    authors average over their last axis alone. Iterations as in muon.

    Source: Li et al. 2025; numbers of the authors' NorMuon.

    >>> print(*normuon(bfloat16=False).rules)
    weight_decay heavy_ball nesterov orthogonalize normalize_rows scale_by_aspect sgd_step
    """
    ahead = [rules.nesterov] if nesterov else []
    parts = (heavy_ball, *ahead, _orthogonal(bfloat16), normalize_rows, scale_by_aspect, sgd_step)
    return chain(weight_decay, *parts, lr=lr, mom=mom, sqr_mom=sqr_mom, wd=wd, eps=eps)


@recipe
def adamuon(
    lr: float = 2e-2,
    mom: float = 0.95,
    sqr_mom: float = 0.95,
    wd: float = 0.01,
    eps: float = 1e-8,
    nesterov: bool = True,
    bfloat16: bool = True,
) -> Chain:
    """Muon on the signs of the momentum, with the speed of every element made equal after it.

    For matrices, as muon; vectors move by sign. The sign of a momentum that looks ahead is that of
    Lion's average with mom**2, so the chain has the hypers mom (the square) and slow_mom.

    Source: Si et al. 2025; numbers of the authors' AdaMuon, where sqr_mom is mom
    and the second eps is added to the update's length, not to its root mean square.
    pytorch_optimizer's takes no signs, and debiases.

    >>> adamuon(mom=0.5, lr=0.1, bfloat16=False).given["mom"]
    0.25
    >>> print(*adamuon().rules[:3])
    weight_decay sign_of_average orthogonalize_in_bfloat16
    """
    squares = rename(average_sqr_grad, grad="update")
    parts = (sign_of_average, _orthogonal(bfloat16), squares, scale_by_rms, set_rms, sgd_step)
    sign_mom = mom**2 if nesterov else mom
    hypers = dict(mom=sign_mom, slow_mom=mom, sqr_mom=sqr_mom, eps=eps)
    return chain(weight_decay, *parts, lr=lr, wd=wd, **hypers)


@recipe
def shampoo(lr: float = 1e-3, eps: float = 1e-6, every: int = 1) -> Chain:
    """AdaGrad with a full matrix for each side of a matrix; their roots are taken every so many
    steps.

    For matrices: kernels of convolutions are flattened, where the paper gives every axis a matrix,
    and leaves of fewer than two axes take SGD's steps.

    Source: Gupta et al. 2018; numbers of pytorch_optimizer.Shampoo.

    >>> print(*shampoo().rules)
    precondition_sides sgd_step
    """
    return chain(precondition_sides, sgd_step, lr=lr, eps=eps, every=every)


@recipe
def soap(
    lr: float = 3e-3,
    mom: float = 0.95,
    sqr_mom: float = 0.95,
    eps: float = 1e-8,
    wd: float = 0.01,
    every: int = 10,
) -> Chain:
    """Adam in the eigenbasis of Shampoo's preconditioner, which turns every so many steps.

    Decoupled weight decay, before the step and in the first one too, as in adamw; the authors'
    comes after it. Kernels of convolutions are flattened, where the authors give every axis a
    basis; leaves of fewer than two axes get Adam. The first step moves nothing.

    Source: Vyas et al. 2024; numbers of the authors' SOAP.

    >>> print(*soap().rules)
    weight_decay average_in_eigenbasis sgd_step
    """
    parts = (weight_decay, average_in_eigenbasis, sgd_step)
    return chain(*parts, lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd, every=every)


@recipe
def kron(
    lr: float = 1e-3,
    mom: float = 0.9,
    wd: float = 0.0,
    factor_lr: float = 0.1,
    factors_every: float = 100 / 3,
    max_rms: float = 1.1,
) -> Chain:
    """Momentum made white by two factors, which are learned: PSGD with a Kronecker product.
    Decoupled weight decay.

    update = left' left (debiased mean of grad) right' right, clipped to a root mean square

    Kernels of convolutions are flattened, where the authors give every axis a factor; vectors have
    a number for each entry. How often factors are learned: see `whiten`. The authors add 1e-6 to
    the root mean square, decay matrices alone, and balance the factors of all leaves at once. Their
    newer code adds noise of sqrt(eps) * mean|grad| to what factors are learned from; here, as in
    pytorch_optimizer, there is none.

    Source: Li 2018 and 2024; numbers of Walters' Kron and pytorch_optimizer.Kron.

    >>> print(*kron().rules)
    weight_decay average_grad debias whiten rename(clip_rms, grad='update') sgd_step
    """
    clip = rename(clip_rms, grad="update")
    hypers = dict(lr=lr, mom=mom, wd=wd, max_rms=max_rms)
    parts = (weight_decay, average_grad, debias, whiten, clip, sgd_step)
    return chain(*parts, factor_lr=factor_lr, factors_every=factors_every, **hypers)


# A class, as a function made in a recipe could not be pickled.
@dataclass(frozen=True)
class MatricesBut(Patterned):
    """One label for leaves of two or more axes, another for all others and for some paths."""

    patterns: tuple[str, ...]
    matrix: str
    other: str

    def __call__(self, path: str, leaf: Tensor) -> str:
        other = leaf.dim() < 2 or any(covers(path, pattern) for pattern in self.patterns)
        return self.other if other else self.matrix


def _orthogonal(bfloat16: bool) -> Rule:
    return orthogonalize_in_bfloat16 if bfloat16 else orthogonalize


def _scale(who: str, adjust: str) -> Rule:
    if adjust not in SCALES:
        raise ValueError(
            f"{who}: adjust must be one of {', '.join(map(repr, SCALES))}, got {adjust!r}."
        )
    return SCALES[adjust]
