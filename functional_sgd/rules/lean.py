"""Rules that keep less than one number for each element."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from functional_sgd.pairs import as_real
from functional_sgd.ranges import Decay, NonNegative, Positive
from functional_sgd.reduction import norm, root
from functional_sgd.rule import leafwise
from functional_sgd.rules.averaging import averaged_from_first

__all__ = [
    "average_sqr_rows",
    "scale_by_axes",
    "scale_by_confidence",
    "scale_by_factors",
    "scale_by_norm_avg",
]


def one_number(param: Tensor) -> Tensor:
    """The first value of a number of each leaf: 0."""
    return param.new_zeros(())


def one_per_row(param: Tensor) -> Tensor:
    """Zeros for each entry of the first axis; one, for vectors."""
    shape = param.shape[:1] if param.dim() > 1 else ()
    return param.new_zeros(shape)


def one_per_axis(param: Tensor) -> Tensor:
    """Zeros for each entry of each axis, one axis after the other."""
    return param.new_zeros(max(sum(param.shape), 1))


def row_factors(param: Tensor) -> Tensor:
    """Zeros for each row; for each element of a vector."""
    shape = param.shape[:-1] if param.dim() > 1 else param.shape
    return param.new_zeros(shape)


def row_doubts(param: Tensor) -> Tensor:
    """Zeros for each row; one, for vectors, which keep none."""
    shape = param.shape[:-1] if param.dim() > 1 else ()
    return param.new_zeros(shape)


def column_factors(param: Tensor) -> Tensor:
    """Zeros for each column; one, for vectors, which keep none."""
    shape = (*param.shape[:-2], param.shape[-1]) if param.dim() > 1 else ()
    return param.new_zeros(shape)


@leafwise(sqr_norm_avg=one_number)
def scale_by_norm_avg(
    grad: Tensor,
    sqr_norm_avg: Tensor,
    *,
    step: Tensor,
    slope: Tensor = norm("grad"),
    sqr_mom: Decay = 0.25,
    eps: NonNegative = 1e-8,
) -> dict[str, Tensor]:
    """Divide by how long the gradient of the leaf has been: one number for each leaf.

    sqr_norm_avg = slope**2 at step 1, then sqr_mom * sqr_norm_avg + (1 - sqr_mom) * slope**2
    update = grad / (sqrt(sqr_norm_avg) + eps);  slope is the Euclidean norm of the leaf's gradient

    Reads grad, step, sqr_mom in [0, 1) and eps >= 0 (at 0, 0 / 0 is NaN); keeps sqr_norm_avg, one
    number for each leaf. Source: NovoGrad (Ginsburg et al. 2019).

    >>> scale_by_norm_avg(torch.tensor([3.0, 4.0]), torch.tensor(0.0), step=torch.tensor(1), eps=0)
    {'sqr_norm_avg': tensor(25.), 'update': tensor([0.6000, 0.8000])}
    """
    # A norm comes as float64, and a slot of one number as one element; the average is to be
    # neither.
    square = slope.to(sqr_norm_avg.dtype).square()
    average = averaged_from_first(sqr_norm_avg.reshape(()), square, sqr_mom, step)
    return dict(sqr_norm_avg=average, update=grad / (root(average) + eps))


@leafwise(row_sqr_avg=one_per_row)
def average_sqr_rows(
    grad: Tensor, row_sqr_avg: Tensor, *, sqr_mom: Decay = 0.999
) -> dict[str, Tensor]:
    """average_sqr_grad with one number for all weights of an output unit, and one for a vector.

    row_sqr_avg = sqr_mom * row_sqr_avg + (1 - sqr_mom) * mean of grad**2 over all axes but the
    first, of a vector over all;  sqr_avg = row_sqr_avg, spread over the elements

    Reads grad and sqr_mom in [0, 1); keeps row_sqr_avg, which starts at 0. Rules that read sqr_avg
    (debias, scale_by_rms) can follow. Source: Adam-mini (Zhang et al. 2025).

    >>> average_sqr_rows(torch.tensor([[1.0, 3.0]]), torch.tensor([0.0]), sqr_mom=0.5)
    {'row_sqr_avg': tensor([2.5000]), 'sqr_avg': tensor([[2.5000, 2.5000]])}
    """
    square = as_real(grad).square()
    # The mean of no elements is NaN.
    if not square.numel():
        return dict(row_sqr_avg=row_sqr_avg.clone(), sqr_avg=square)
    mean = square.flatten(1).mean(1) if square.dim() > 1 else square.mean()
    rows = sqr_mom * row_sqr_avg + (1 - sqr_mom) * mean
    spread = rows.reshape(-1, *[1] * (square.dim() - 1))
    return dict(row_sqr_avg=rows, sqr_avg=spread.expand(square.shape))


@leafwise(covers=one_per_axis)
def scale_by_axes(grad: Tensor, covers: Tensor, *, eps: NonNegative = 0.0) -> dict[str, Tensor]:
    """Divide by the root of a bound on the sum of all squared gradients, of which only one number
    for each entry of each axis is kept.

    bound = the least of the covers that an element has, one for each axis, + grad**2
    update = grad / sqrt(bound + eps), 0 where bound is 0;  each cover = the largest bound under it

    Reads grad and eps >= 0; keeps covers, one axis after the other, which start at 0. Of a vector
    they are Adagrad's sums. Source: SM3 (Anil et al. 2019), algorithm SM3-II.

    >>> scale_by_axes(torch.tensor([[3.0, 4.0]]), torch.zeros(3))
    {'update': tensor([[1., 1.]]), 'covers': tensor([16.,  9., 16.])}
    """
    grad, covers = as_real(grad), as_real(covers)
    if not grad.numel():
        return dict(update=grad, covers=covers.clone())
    parts = []
    for axis, part in enumerate(torch.split(covers, list(grad.shape))):
        along_axis = [1] * grad.dim()
        along_axis[axis] = -1
        parts.append(part.reshape(along_axis))
    bound = functools.reduce(torch.minimum, parts) + grad.square()
    largest = []
    for axis in range(grad.dim()):
        others = [other for other in range(grad.dim()) if other != axis]
        largest.append(bound.amax(others))
    # A vector has no other axis, and amax over no axes is that over all.
    covers = torch.cat(largest) if grad.dim() > 1 else bound
    known = bound > 0
    update = torch.where(known, grad / root(torch.where(known, bound, 1.0) + eps), 0.0)
    return dict(update=update, covers=covers)


@leafwise(sqr_rows=row_factors, sqr_columns=column_factors)
def scale_by_factors(
    grad: Tensor,
    sqr_rows: Tensor,
    sqr_columns: Tensor,
    *,
    sqr_mom: Decay = 0.999,
    eps_sqr: Positive = 1e-30,
) -> dict[str, Tensor]:
    """Divide by the root of the running mean of the squared gradient, of which only the means over
    rows and columns are kept.

    sqr_rows and sqr_columns: running means of grad**2 + eps_sqr, meant over columns and over rows
    update = grad / sqrt(sqr_rows * sqr_columns / mean of sqr_rows);  the last two axes are rows and
    columns;  of a vector all squares are kept, as sqr_rows

    Reads grad, sqr_mom in [0, 1) and eps_sqr > 0; keeps sqr_rows and sqr_columns, which start at 0;
    nothing is debiased. Source: Adafactor (Shazeer and Stern 2018), in the form of CAME.

    >>> two = torch.tensor([[2.0, 2.0], [2.0, 2.0]])
    >>> scale_by_factors(two, torch.zeros(2), torch.zeros(2), sqr_mom=0.75)["update"]
    tensor([[2., 2.],
            [2., 2.]])
    """
    grad = as_real(grad)
    found = _factored(grad.square() + eps_sqr, sqr_rows, sqr_columns, sqr_mom)
    return dict(sqr_rows=found.rows, sqr_columns=found.columns, update=grad * found.scale)


@leafwise(doubt_rows=row_doubts, doubt_columns=column_factors)
def scale_by_confidence(
    update: Tensor,
    grad_avg: Tensor,
    doubt_rows: Tensor,
    doubt_columns: Tensor,
    *,
    doubt_mom: Decay = 0.9999,
    eps_doubt: Positive = 1e-16,
) -> dict[str, Tensor]:
    """Move along the average of the updates, the more the nearer they have been to it.

    doubt_rows and doubt_columns: running means of (update - grad_avg)**2 + eps_doubt, meant as in
    scale_by_factors;  update = grad_avg / sqrt(doubt_rows * doubt_columns / mean of doubt_rows), of
    a vector grad_avg itself

    Reads update, its average grad_avg, doubt_mom in [0, 1) and eps_doubt > 0; keeps doubt_rows and
    doubt_columns, which start at 0. Source: CAME (Luo et al. 2023).

    >>> update, average = torch.tensor([[3.0, 3.0]]), torch.tensor([[1.0, 1.0]])
    >>> rows, columns = torch.zeros(1), torch.zeros(2)
    >>> scale_by_confidence(update, average, rows, columns, doubt_mom=0.75)["update"]
    tensor([[1., 1.]])
    """
    update, average = as_real(update), as_real(grad_avg)
    if update.dim() < 2:  # the authors keep no doubt of vectors
        rows, columns = doubt_rows.clone(), doubt_columns.clone()
        return dict(doubt_rows=rows, doubt_columns=columns, update=average)
    doubt = (update - average).square() + eps_doubt
    found = _factored(doubt, doubt_rows, doubt_columns, doubt_mom)
    return dict(doubt_rows=found.rows, doubt_columns=found.columns, update=average * found.scale)


class _Factored(NamedTuple):
    """A running mean of squares, of which the means over columns and over rows are kept."""

    rows: Tensor
    columns: Tensor
    scale: Tensor  # 1 / its root, for each element


def _factored(square: Tensor, rows: Tensor, columns: Tensor, mom: float) -> _Factored:
    """The mean with these squares in it."""
    if not square.numel():
        return _Factored(rows.clone(), columns.clone(), square)
    rows, columns = as_real(rows), as_real(columns)
    if square.dim() < 2:
        rows = mom * rows + (1 - mom) * square
        return _Factored(rows, columns.clone(), rows.rsqrt())
    rows = mom * rows + (1 - mom) * square.mean(-1)
    columns = mom * columns + (1 - mom) * square.mean(-2)
    # Each root by itself: in float32 the product of two means of 1e-30 is 0.
    of_rows = (rows / rows.mean(-1, keepdim=True)).rsqrt()[..., None]
    return _Factored(rows, columns, of_rows * columns.rsqrt()[..., None, :])
