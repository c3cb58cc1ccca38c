"""Rules that keep the squares of a matrix as one number for each row and each column."""

import torch
from torch import Tensor

from functional_sgd.pairs import as_real
from functional_sgd.ranges import NonNegative
from functional_sgd.rule import leafwise

__all__ = ["scale_by_factored_rms"]


def _first_rows(param: Tensor) -> Tensor:
    """One number for each row; vectors are kept whole."""
    return torch.zeros_like(param) if param.dim() < 2 else param.new_zeros((*param.shape[:-1], 1))


def _first_columns(param: Tensor) -> Tensor:
    """One number for each column; for vectors, one that is not used."""
    shape = (1,) if param.dim() < 2 else (*param.shape[:-2], 1, param.shape[-1])
    return param.new_zeros(shape)


@leafwise(rows=_first_rows, columns=_first_columns)
def scale_by_factored_rms(
    grad: Tensor,
    rows: Tensor,
    columns: Tensor,
    *,
    step: Tensor,
    sqr_mom_decay: NonNegative = 0.8,
    eps: NonNegative = 2**-23,
) -> dict[str, Tensor]:
    """scale_by_rms with mean squares that are kept by row and column, and rebuilt as a product.

    share = step**-sqr_mom_decay;  rows = rows + share * (mean of grad**2 over each row - rows),
    columns likewise;  sqr_avg = rows * columns / max(mean of rows, eps)
    update = grad / max(sqrt(sqr_avg), eps)

    Reads grad, step, sqr_mom_decay >= 0 and eps >= 0 (at 0, 0 / 0 is NaN). Rows and columns are the
    last two axes of a leaf; leaves of fewer axes keep all their squares, as rows. Complex leaves
    are real ones with a last axis of 2. Keeps rows and columns, which start at 0 and are replaced
    by the first step. Source: Adafactor (Shazeer and Stern 2018), in the form of
    torch.optim.Adafactor.

    >>> one = torch.ones(1)
    >>> found = scale_by_factored_rms(torch.tensor([[3.0, 3.0]]), one[None], one[None], step=one)
    >>> found["rows"], found["columns"], found["update"]
    (tensor([[9.]]), tensor([[9., 9.]]), tensor([[1., 1.]]))
    """
    grad, rows, columns = map(as_real, (grad, rows, columns))
    share, square = step**-sqr_mom_decay, grad.square()
    if grad.dim() < 2:
        rows = sqr_avg = rows + share * (square - rows)
        columns = columns.clone()  # what a step returns is its own
    else:
        rows = rows + share * (_mean(square, -1) - rows)
        columns = columns + share * (_mean(square, -2) - columns)
        # The bound is eps here and its square below, as in torch.optim.Adafactor.
        sqr_avg = rows * columns / _mean(rows, -2).clamp(min=eps)
    # Bounded before the root, whose derivative at 0 is infinite.
    return dict(rows=rows, columns=columns, update=grad * sqr_avg.clamp(min=eps * eps).rsqrt())


def _mean(values: Tensor, axis: int) -> Tensor:
    """The mean along an axis, which stays; 0 if there is nothing."""
    return values.sum(axis, keepdim=True) / max(values.shape[axis], 1)
