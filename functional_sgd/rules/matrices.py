"""Rules that see a leaf as a matrix: its rows are the first axis, its columns all others.

So the kernel of a convolution is a matrix of one row for each output, and a complex matrix one of
twice as many real columns. Leaves of fewer than two axes are not matrices: each rule says what
becomes of them. Everything is done with batched torch operators, so that `fuse` runs all leaves of
one shape as one call.
"""

import math

import torch
from torch import Tensor

from functional_sgd.pairs import as_real
from functional_sgd.products import add_product
from functional_sgd.ranges import Decay, NonNegative, Positive
from functional_sgd.reduction import mean, root
from functional_sgd.rule import elementwise, leafwise

__all__ = [
    "match_rms_of_adamw",
    "normalize_rows",
    "orthogonalize",
    "orthogonalize_in_bfloat16",
    "scale_by_aspect",
    "scale_by_fans",
    "set_rms",
]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic polynomial of Muon, whose slope at 0 is as steep as can be."""

ITERATIONS = 5


def is_matrix(leaf: Tensor) -> bool:
    """Whether a leaf has rows and columns, and any elements."""
    return leaf.dim() > 1 and leaf.numel() > 0


def as_matrix(leaf: Tensor) -> Tensor:
    """A leaf of two or more axes as a real matrix, with a row for each entry of the first axis;
    any other as it is, in real numbers.

    >>> as_matrix(torch.zeros(4, 3, 2, 2)).shape, as_matrix(torch.zeros(4, 3) * 1j).shape
    (torch.Size([4, 12]), torch.Size([4, 6]))
    """
    real = as_real(leaf)
    return real.flatten(1) if is_matrix(leaf) else real


def like_leaf(matrix: Tensor, leaf: Tensor) -> Tensor:
    """A matrix made by `as_matrix`, in the shape and dtype of the leaf.

    >>> like_leaf(torch.ones(4, 12), torch.zeros(4, 3, 2, 2)).shape
    torch.Size([4, 3, 2, 2])
    """
    if leaf.is_complex():
        return torch.view_as_complex(matrix.reshape(*leaf.shape, 2).contiguous())
    return matrix.reshape(leaf.shape)


def nothing(param: Tensor) -> Tensor:
    """A single zero, for a slot of one number, or of none."""
    return as_matrix(param).new_zeros(())


def projected(matrix: Tensor, basis: Tensor) -> Tensor:
    """A matrix in the few dimensions of a basis, whose columns are directions on its shorter side.

    >>> projected(torch.ones(3, 2), torch.tensor([[1.0], [0.0]])).shape
    torch.Size([3, 1])
    """
    rows, columns = matrix.shape
    return matrix @ basis if rows >= columns else basis.mT @ matrix


@leafwise
def orthogonalize(update: Tensor) -> dict[str, Tensor]:
    """Make all singular values of a matrix about 1, without finding them: the nearest matrix whose
    rows (or columns, if these are fewer) are orthonormal.

    x = update / max(|update|, 1e-7);  five times:  x = a x + (b x x' + c (x x')**2) x

    with (a, b, c) = (3.4445, -4.7750, 2.0315), which brings singular values between 0.7 and 1.2
    rather than to 1 exactly. In the precision of the leaf, float32 at least. Tall matrices are
    transposed, and back. Leaves of fewer than two axes stay as they are.
    Source: Muon (Jordan et al. 2024), numbers of torch.optim.Muon, which iterates in bfloat16:
    `orthogonalize_in_bfloat16`.

    >>> orthogonalize(torch.tensor([[3.0, 0.0], [0.0, -3.0]]))
    {'update': tensor([[ 1.1081,  0.0000],
            [ 0.0000, -1.1081]])}
    """
    if not is_matrix(update):
        return dict(update=update)
    return dict(update=like_leaf(_newton_schulz(as_matrix(update)), update))


@leafwise
def orthogonalize_in_bfloat16(update: Tensor) -> dict[str, Tensor]:
    """orthogonalize with iterations in bfloat16, which is faster where the hardware has it.

    A product and the sum that it goes into are rounded together, as in torch.optim.Muon, with the
    same bits; the code of its authors rounds both. A float64 leaf is iterated in float64.

    Source: Muon (Jordan et al. 2024).

    >>> orthogonalize_in_bfloat16(torch.tensor([[3.0, 0.0], [0.0, -3.0]]))
    {'update': tensor([[ 1.1250,  0.0000],
            [ 0.0000, -1.1250]])}
    """
    if not is_matrix(update):
        return dict(update=update)
    matrix = as_matrix(update)
    short = matrix if matrix.dtype == torch.float64 else matrix.to(torch.bfloat16)
    return dict(update=like_leaf(_newton_schulz(short).to(matrix.dtype), update))


def _newton_schulz(matrix: Tensor) -> Tensor:
    # With the shorter side in front, gram is as small as can be.
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.mT if tall else matrix
    # The norm in bfloat16 is torch.optim.Muon's, bit for bit; root has a derivative at 0.
    length = root(wide.square().sum()) if wide.dtype != torch.bfloat16 else wide.norm()
    x = wide / length.clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


@leafwise
def scale_by_aspect(update: Tensor) -> dict[str, Tensor]:
    """Let a matrix with more rows than columns move further: Muon's own correction for shapes.

    update = update * sqrt(max(1, rows / columns))

    Leaves of fewer than two axes stay as they are. Source: Jordan et al. 2024; torch.optim.Muon's
    "original".

    >>> scale_by_aspect(torch.ones(4, 1))["update"].flatten()
    tensor([2., 2., 2., 2.])
    """
    if not is_matrix(update):
        return dict(update=update)
    rows, columns = as_matrix(update).shape
    return dict(update=update * math.sqrt(max(1.0, rows / columns)))


@leafwise
def scale_by_fans(update: Tensor) -> dict[str, Tensor]:
    """Let a matrix move further the more outputs it has for each input, so that one lr is good for
    layers of every size.

    update = update * sqrt(rows / columns)

    Leaves of fewer than two axes stay as they are. Source: Dion (Ahn et al. 2025); the spectral
    condition of Yang et al. 2023.

    >>> scale_by_fans(torch.ones(1, 4))["update"].flatten()
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    if not is_matrix(update):
        return dict(update=update)
    rows, columns = as_matrix(update).shape
    return dict(update=update * math.sqrt(rows / columns))


@leafwise
def match_rms_of_adamw(update: Tensor, *, rms: Positive = 0.2) -> dict[str, Tensor]:
    """Give the elements of an orthogonal matrix the size that those of Adam's updates mostly have,
    so that lr and wd of adamw can be kept.

    update = update * rms * sqrt(max(rows, columns))

    Reads update and rms > 0. Leaves of fewer than two axes stay as they are.
    Source: Moonlight (Liu et al. 2025); torch.optim.Muon's "match_rms_adamw".

    >>> match_rms_of_adamw(torch.ones(4, 1), rms=0.5)["update"].flatten()
    tensor([1., 1., 1., 1.])
    """
    if not is_matrix(update):
        return dict(update=update)
    return dict(update=update * (rms * math.sqrt(max(as_matrix(update).shape))))


def _square(update: Tensor) -> Tensor:
    return update.square()


@elementwise
def set_rms(
    update: Tensor,
    *,
    mean_square: Tensor = mean(_square),
    rms: Positive = 0.2,
    eps: NonNegative = 1e-8,
) -> dict[str, Tensor]:
    """Give every leaf's update the same root mean square.

    update = update * rms / (sqrt(mean(update**2)) + eps)

    Reads update, rms > 0 and eps, which keeps an update of zeros at zero.
    Source: Moonlight (Liu et al. 2025); AdaMuon (Si et al. 2025).

    >>> set_rms(torch.tensor([3.0, -3.0]), rms=0.5)
    {'update': tensor([ 0.5000, -0.5000])}
    """
    return dict(update=update * (rms / (root(mean_square) + eps)))


def row_zeros(param: Tensor) -> Tensor:
    """A zero for every row; for what is not a matrix, one that is not used."""
    shape = param.shape[:1] if is_matrix(param) else ()
    return param.new_zeros(shape)


@leafwise(row_avg=row_zeros)
def normalize_rows(
    update: Tensor, row_avg: Tensor, *, sqr_mom: Decay = 0.95, eps: NonNegative = 1e-10
) -> dict[str, Tensor]:
    """Give every row of a matrix the same speed, and leave the length of the whole as it is.

    row_avg = sqr_mom * row_avg + (1 - sqr_mom) * mean(update**2 of the row)
    scaled = update / (sqrt(row_avg) + eps);  update = scaled * |update| / (|scaled| + eps)

    Reads update, sqr_mom in [0, 1) and eps. Keeps row_avg, a number for each row, which starts at
    0. Leaves of fewer than two axes stay as they are. Source: NorMuon (Li et al. 2025), numbers of
    its authors.

    >>> update, rows = torch.tensor([[3.0, 3.0], [4.0, 4.0]]), torch.zeros(2)
    >>> made = normalize_rows(update, rows, sqr_mom=0.0)
    >>> made["row_avg"], made["update"]
    (tensor([ 9., 16.]), tensor([[3.5355, 3.5355],
            [3.5355, 3.5355]]))
    """
    if not is_matrix(update):
        return dict(update=update, row_avg=row_avg.clone())
    matrix = as_matrix(update)
    row_avg = sqr_mom * row_avg + (1 - sqr_mom) * matrix.square().mean(1)
    scaled = matrix / (root(row_avg) + eps)[:, None]
    lengths = root(matrix.square().sum()) / (root(scaled.square().sum()) + eps)
    return dict(update=like_leaf(scaled * lengths, update), row_avg=row_avg)
