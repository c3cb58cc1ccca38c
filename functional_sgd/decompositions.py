"""Eigenvectors and orthonormal bases that can be differentiated where theory divides by zero."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from functional_sgd.tracing import known_for_all


def renewed(due: Tensor, old: Tensor, renew: Callable[[], Tensor]) -> Tensor:
    """What renew() gives if it is due, else the old; not computed where that is known."""
    return renewed_together(due, [old], lambda: [renew()])[0]


def renewed_together(
    due: Tensor, old: Sequence[Tensor], renew: Callable[[], Sequence[Tensor]]
) -> list[Tensor]:
    """`renewed` for tensors that are computed from one another."""
    found = known_for_all(due)
    if found is None:
        return [torch.where(due, *pair) for pair in zip(renew(), old, strict=True)]
    # A slot that stays as it was must not share memory with the old state.
    return [*renew()] if found else [one.clone() for one in old]


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues of a symmetric matrix, and its eigenvectors as columns.

    NaN if anything is not finite, where LAPACK would raise. The first derivatives are those of
    theory; but directions of one eigenvalue are as good as any others in their plane, so within it
    they do not turn, where theory divides by zero.
    """
    fixed = matrix.detach()
    finite, one = fixed.isfinite().all(), torch.eye(len(matrix), dtype=matrix.dtype).to(fixed)
    values, vectors = torch.linalg.eigh(torch.where(finite, fixed, one))
    vectors = torch.where(finite, vectors, torch.nan).contiguous()
    # The rest is for the derivative alone, and costs three matrix products.
    if not _may_be_tracked(matrix):
        return values, vectors
    change = vectors.mT @ (matrix - fixed) @ vectors  # 0, but its derivative is not
    return values + change.diagonal(), _turned(vectors, values, change)


def singular_vectors(matrix: Tensor) -> Tensor:
    """The singular vectors of a matrix on its shorter side, as columns, the first ones first.

    NaN if anything is not finite; derivatives as those of `eigh`. Their signs are LAPACK's.
    """
    fixed, rows, columns = matrix.detach(), *matrix.shape
    finite = fixed.isfinite().all()
    left, values, right = torch.linalg.svd(torch.where(finite, fixed, 0.0), full_matrices=False)
    shorter = right.mT if rows >= columns else left
    vectors = torch.where(finite, shorter, torch.nan).contiguous()
    if not _may_be_tracked(matrix):
        return vectors
    scale = fixed.abs().amax()
    even = matrix / torch.where(scale == 0, 1.0, scale)  # the squares of 1e-30 would be none
    squares = even.mT @ even if rows >= columns else even @ even.mT
    change = vectors.mT @ (squares - squares.detach()) @ vectors
    return _turned(vectors, (values / torch.where(scale == 0, 1.0, scale)).square(), change)


def _turned(vectors: Tensor, values: Tensor, change: Tensor) -> Tensor:
    """Eigenvectors, whose derivative is how a change of their matrix, which is 0, turns them."""
    gap = values[None, :] - values[:, None]
    same = gap.abs() <= 1e-12 * values.abs().amax()
    turn = torch.where(same, 0.0, change / torch.where(same, 1.0, gap))
    return vectors + vectors @ turn


def orthonormal(matrix: Tensor) -> Tensor:
    """The Q of a QR decomposition of a matrix that is not wider than high; its first derivative is
    taken as 0 where a column depends on the others.
    """
    fixed = matrix.detach()
    found, triangle = torch.linalg.qr(fixed)
    basis: Tensor = found.contiguous()
    if not _may_be_tracked(matrix):
        return basis
    # R is the derivative's divisor; where a column depends on others it is singular.
    diagonal = triangle.diagonal().abs()
    regular = diagonal.amin() > 1e-12 * diagonal.amax()
    triangle = torch.where(regular, triangle, torch.eye(len(triangle)).to(triangle))
    change = matrix - fixed  # 0, but its derivative is not
    within = basis.mT @ change
    lower = torch.linalg.solve_triangular(triangle, within, upper=True, left=False).tril(-1)
    turn = basis @ (lower - lower.mT)
    if len(basis) > len(triangle):  # it can leave the space of its columns, too
        outside = change - basis @ within
        turn = turn + torch.linalg.solve_triangular(triangle, outside, upper=True, left=False)
    return basis + torch.where(regular, turn, 0.0)


def _may_be_tracked(value: Tensor) -> bool:
    """Whether derivatives may go through a value; in a batch they do if they go through its
    members.
    """
    if torch.compiler.is_compiling() or torch.autograd.forward_ad._current_level >= 0:
        return True
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        if torch._C._functorch.is_gradtrackingtensor(value):
            return True
        value = torch._C._functorch.get_unwrapped(value)
    tracked: bool = value.requires_grad
    return tracked
