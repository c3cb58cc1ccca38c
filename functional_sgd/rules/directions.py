"""A rule that makes the momentum of a matrix orthonormal in its strongest directions alone."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from functional_sgd.decompositions import orthonormal, renewed
from functional_sgd.randomness import Key, normal
from functional_sgd.ranges import Decay, NonNegative
from functional_sgd.reduction import root
from functional_sgd.rule import Rule, leafwise
from functional_sgd.rules.matrices import as_matrix, is_matrix, like_leaf, nothing

__all__ = ["power_iteration"]


@dataclass(frozen=True)
class Basis:
    """The slot of directions on the shorter side of a matrix, as columns; a single zero for what is
    no matrix.
    """

    rank_fraction: float

    def __call__(self, param: Tensor) -> Tensor:
        if not is_matrix(param):
            return nothing(param)
        matrix = as_matrix(param)
        shorter = min(matrix.shape)
        return matrix.new_zeros(shorter, math.ceil(self.rank_fraction * shorter))


def of_fraction(rank_fraction: float) -> Rule:
    """The rule below, with so many directions for each entry of the shorter side.

    >>> of_fraction(0.5).starts["basis"](torch.zeros(8, 6)).shape
    torch.Size([6, 3])
    """
    if not 0 < rank_fraction <= 1:
        raise ValueError(
            f"power_iteration: rank_fraction must be more than 0 and at most 1, got "
            f"{rank_fraction!r}. It is the share of a matrix's directions that a step moves along."
        )
    return replace(
        power_iteration, starts={**power_iteration.starts, "basis": Basis(rank_fraction)}
    )


@leafwise(momentum=torch.zeros_like, basis=Basis(1.0))
def power_iteration(
    grad: Tensor,
    momentum: Tensor,
    basis: Tensor,
    *,
    key: Key,
    step: Tensor,
    mom: Decay = 0.95,
    eps: NonNegative = 1e-8,
) -> dict[str, Tensor]:
    """Move equally far along the strongest directions of the momentum of a matrix, and leave the
    others in it for later steps.

    total = momentum + grad;  left = the Q of a QR decomposition of total basis
    right = total' left;  basis = right / (length of each column + eps);  update = left basis'
    momentum = total - (1 - mom) left right'

    Of a matrix that is wider than high, its transpose. The basis, columns on the shorter side, is
    drawn at the first step; from step to step it turns to the strongest directions, as one power
    iteration a step would. Where total is 0 the update is, too. What is not a matrix gets total,
    and keeps mom * total.

    Reads grad, step, key, mom in [0, 1) and eps >= 0; keeps momentum and basis. Where total has
    fewer directions than the basis, those that are left over are made of rounding errors, divided
    by eps. Source: Dion (Ahn et al. 2025).

    >>> from functional_sgd.randomness import key_of
    >>> key = key_of(torch.tensor(0), torch.tensor(1), leaf=0, position=0)
    >>> now = dict(key=key, step=torch.tensor(2), mom=0.9)
    >>> matrix, basis = torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0], [0.0]])
    >>> found = power_iteration(matrix, torch.zeros(2, 2), basis, **now)
    >>> found["update"] @ torch.ones(2), found["momentum"]
    (tensor([1., 0.]), tensor([[2.7000, 0.0000],
            [0.0000, 2.0000]]))
    """
    total = as_matrix(grad) + as_matrix(momentum)
    if not is_matrix(grad):
        return dict(
            update=like_leaf(total, grad),
            momentum=like_leaf(mom * total, grad),
            basis=basis.clone(),
        )
    tall = total.shape[0] >= total.shape[1]
    matrix = total if tall else total.mT
    basis = renewed(step == 1, basis, lambda: normal(key, basis))
    # The Q of zeros is made of unit vectors, which would move the leaf; and a basis that has become
    # 0 could never turn to anything again.
    anything = (matrix != 0).any()
    left = torch.where(anything, orthonormal(matrix @ basis), 0.0)
    right = matrix.mT @ left
    rest = matrix - (1 - mom) * (left @ right.mT)
    right = torch.where(anything, right, basis)
    basis = right / (root(right.square().sum(0, keepdim=True)) + eps)
    update = left @ basis.mT
    if not tall:
        rest, update = rest.mT, update.mT
    return dict(update=like_leaf(update, grad), momentum=like_leaf(rest, momentum), basis=basis)
