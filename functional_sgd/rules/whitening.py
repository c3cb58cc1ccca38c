"""A rule that learns what to multiply a matrix by, from both sides, so that it becomes white."""

import torch
from torch import Tensor

from functional_sgd.decompositions import renewed, renewed_together
from functional_sgd.pairs import as_complex, as_real
from functional_sgd.randomness import Key, normal, uniform
from functional_sgd.ranges import AtLeastOne, NonNegative, Positive, Share
from functional_sgd.reduction import root
from functional_sgd.rule import leafwise
from functional_sgd.rules.matrices import as_matrix, is_matrix, like_leaf, nothing

__all__ = ["whiten"]

LONGEST = 8192
"""A side that is longer has a factor for each of its entries, and no triangle."""

FALL = 1e-3
"""How fast factors are renewed less often, once the calm steps are over."""

# The smallest normal float32: too small to change a divisor, unless that is 0.
TINY = 2.0**-126


def rows_factor(param: Tensor) -> Tensor:
    """The unit matrix for the rows; for a vector, or too many, a one for each."""
    matrix = as_matrix(param)
    return _unit(matrix, 0) if is_matrix(param) else matrix.new_ones(matrix.numel())


def columns_factor(param: Tensor) -> Tensor:
    """The unit matrix for the columns; a one for each of too many, a single one for a vector."""
    matrix = as_matrix(param)
    return _unit(matrix, 1) if is_matrix(param) else matrix.new_ones(())


def _unit(matrix: Tensor, side: int) -> Tensor:
    size = matrix.shape[side]
    if size > LONGEST:
        return matrix.new_ones(size)
    return torch.eye(size, dtype=matrix.dtype, device=matrix.device)


@leafwise(left=rows_factor, right=columns_factor, waited=nothing)
def whiten(
    update: Tensor,
    left: Tensor,
    right: Tensor,
    waited: Tensor,
    *,
    key: Key,
    step: Tensor,
    factor_lr: Positive = 0.1,
    factors_every: AtLeastOne = 100 / 3,
    calm_steps: NonNegative = 500,
    balanced: Share = 0.01,
) -> dict[str, Tensor]:
    """Multiply a matrix from both sides so that its entries become independent and equally large:
    by factors that are learned by gradient descent, without a root or an inverse.

    a = left update right';  b = left'**-1 noise right**-1
    left = left - factor_lr * upper(a a' - b b') left / |a a' + b b'|
    right = right - factor_lr * upper(a' a - b' b) right / |a' a + b' b|
    update = (left' left) update (right' right)

    upper() is the upper triangle, and |.| a lower bound of the largest eigenvalue: the length of
    what the matrix makes of its longest column, twice over. Both factors start as the unit matrix;
    a side longer than 8,192, and a vector, have a number for each entry, and the largest in place
    of |.|.

    Reads update, step, key, factor_lr > 0 and three numbers that say when the factors are learned:
    in each of the first `calm_steps` steps, and then less and less, exp(0.001) times as seldom with
    each step, until it is once in `factors_every`. Before a share of these steps, `balanced`, both
    factors are scaled so that their largest entries are equally large.

    What is not due is not computed on the CPU; on other devices, and in programs that are recorded,
    it is, and thrown away. Source: Li 2018, "Preconditioned stochastic gradient descent", and 2024
    for the Kronecker product; numbers of the Kron that people train with.

    >>> from functional_sgd.randomness import key_of
    >>> key = key_of(torch.tensor(0), torch.tensor(1), leaf=0, position=0)
    >>> left, right = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.eye(2)
    >>> later = dict(key=key, step=torch.tensor(2000))  # due in 4 steps
    >>> whiten(torch.ones(2, 2), left, right, torch.tensor(0.0), **later)["update"]
    tensor([[1., 1.],
            [9., 9.]])
    """
    x = as_matrix(update)
    if not x.numel():
        return dict(update=update, left=left.clone(), right=right.clone(), waited=waited.clone())
    # Bounded before exp, which is infinite from step 710,000 on: the minimum below would choose the
    # other, but derivatives would be NaN.
    seldom = torch.exp(FALL * (step - 1 - calm_steps).clamp(max=1e5)).clamp(min=1)
    # Counted and not drawn, as in the authors' code. step * 0 + factors_every is a tensor, which
    # minimum needs, where factors_every is a plain number.
    due = waited + 1 >= torch.minimum(seldom, step * 0 + factors_every)
    slots = left, right  # a factor as large as its complex leaf comes as complex numbers
    left, right = as_real(left), as_real(right)
    two_sided = x.dim() > 1  # as the real pairs of a complex vector are
    if two_sided:
        even = uniform(key, waited) < balanced
        left, right = renewed_together(
            due,
            (left, right),
            lambda: _both_learned(left, right, x, normal(key, x), even, factor_lr),
        )
        x = _squared(right, x.mT).mT
    else:
        x = x.reshape(-1, 1)
        left = renewed(
            due,
            left,
            lambda: _learned(left, _times(left, x), _over(left, normal(key, x)), factor_lr),
        )
        right = right.clone()
    update = like_leaf(_squared(left, x), update)
    waited = torch.where(due, 0.0, waited + 1)
    kept = dict(left=as_complex(left, slots[0]), right=as_complex(right, slots[1]))
    return dict(update=update, waited=waited, **kept)


def _both_learned(
    left: Tensor, right: Tensor, x: Tensor, noise: Tensor, even: Tensor, factor_lr: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Both factors after a step; if it is to be, scaled to equal largest entries before."""
    mean = root(left.abs().amax() * right.abs().amax())
    left = torch.where(even, left * (mean / left.abs().amax()), left)
    right = torch.where(even, right * (mean / right.abs().amax()), right)
    a, b = _times(right, _times(left, x).mT).mT, _over(right, _over(left, noise).mT).mT
    return _learned(left, a, b, factor_lr), _learned(right, a.mT, b.mT, factor_lr)


def _times(factor: Tensor, rows: Tensor) -> Tensor:
    """A factor times a matrix with as many rows."""
    return factor @ rows if factor.dim() > 1 else factor[:, None] * rows


def _over(factor: Tensor, rows: Tensor) -> Tensor:
    """The inverse of a factor's transpose, times a matrix."""
    if factor.dim() == 1:
        return rows / factor[:, None]
    solved: Tensor = torch.linalg.solve_triangular(factor.mT, rows, upper=False)
    return solved


def _squared(factor: Tensor, rows: Tensor) -> Tensor:
    """A factor's transpose times the factor times a matrix."""
    turned = factor.mT if factor.dim() > 1 else factor  # a vector stands for a diagonal
    return _times(turned, _times(factor, rows))


def _learned(factor: Tensor, a: Tensor, b: Tensor, factor_lr: float | Tensor) -> Tensor:
    """The factor of the rows of two matrices, after a step towards rows that are alike in both."""
    if factor.dim() == 1:
        one, two = a.square().sum(1), b.square().sum(1)
        return factor - factor_lr * (one - two) * factor / ((one + two).amax() + TINY)
    one, two = a @ a.mT, b @ b.mT
    change = factor_lr * (one - two).triu() / (_size(one + two) + TINY)
    return factor - change @ factor


def _size(matrix: Tensor) -> Tensor:
    """A lower bound of the largest eigenvalue of a symmetric matrix, mostly close to it."""
    # Squares of 1e-30 or 1e30 are no numbers of float32.
    largest = matrix.abs().amax()
    even = matrix / torch.where(largest > 0, largest, 1.0)
    longest = even.square().sum(0).argmax()
    seen = even @ even.index_select(1, longest.reshape(1))
    length = root(seen.square().sum())
    return largest * root((even @ (seen / length.clamp(min=TINY))).square().sum())
