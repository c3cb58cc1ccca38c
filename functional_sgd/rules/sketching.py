"""Rules that find out from a random sketch of the gradient how large a step should be."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from functional_sgd.decompositions import renewed
from functional_sgd.pairs import as_complex, as_real
from functional_sgd.randomness import Key, normal
from functional_sgd.ranges import AtLeastOne, Count, Decay, NonNegative
from functional_sgd.reduction import root
from functional_sgd.rule import Rule, elementwise, leafwise
from functional_sgd.rules.matrices import as_matrix, like_leaf, nothing, projected

__all__ = ["debias_rate", "limit_norm_growth", "scale_by_sketch", "scale_channels_by_sketch"]

SMALL = 1e-8
"""What the authors add to lengths that they divide by."""


@dataclass(frozen=True)
class Directions:
    """The slot of random directions, as columns; a single zero for what is not sketched."""

    rank: int

    def __call__(self, param: Tensor) -> Tensor:
        matrix = as_matrix(param)
        if not _is_sketched(matrix, self.rank):
            return nothing(param)
        return matrix.new_zeros(min(matrix.shape), self.rank)


@dataclass(frozen=True)
class Sketch:
    """A slot as large as a sketch, or as the leaf where there is none."""

    rank: int

    def __call__(self, param: Tensor) -> Tensor:
        matrix = as_matrix(param)
        if not _is_sketched(matrix, self.rank):
            return torch.zeros_like(matrix)
        rows, columns = matrix.shape
        shape = (rows, self.rank) if rows >= columns else (self.rank, columns)
        return matrix.new_zeros(shape)


def _has_rows(matrix: Tensor) -> bool:
    """Whether what `as_matrix` gives has rows and columns; that of a complex vector has two."""
    return matrix.dim() > 1 and matrix.numel() > 0


def _is_sketched(matrix: Tensor, rank: int) -> bool:
    """Whether a sketch is smaller."""
    return _has_rows(matrix) and min(matrix.shape) > rank


def _slots(rank: int) -> dict[str, Any]:
    """The first values of what a sketch of so many dimensions needs."""
    sketch = Sketch(rank)
    return dict(directions=Directions(rank), sketch_avg=sketch, sketch_sqr_avg=sketch)


def of_rank(rule: Rule, rank: int) -> Rule:
    """One of the two rules below, with sketches of so many dimensions.

    >>> of_rank(scale_by_sketch, 2).starts["directions"]
    Directions(rank=2)
    """
    return replace(rule, starts=_slots(rank))


@leafwise(**_slots(256), positive=("sketch_sqr_avg",))
def scale_channels_by_sketch(
    grad: Tensor,
    directions: Tensor,
    sketch_avg: Tensor,
    sketch_sqr_avg: Tensor,
    *,
    key: Key,
    step: Tensor,
    mom: Decay = 0.9,
    sqr_mom: Decay = 0.999,
    eps: NonNegative = 1e-6,
    sketch_every: Count = 200,
    sketch_scale: NonNegative = 1.0,
) -> dict[str, Tensor]:
    """Make every row of a matrix as long as Adam would make the row of a sketch of it, without
    keeping more than Adam's averages of the sketch.

    sketch = grad directions;  directions = noise / sqrt(rank), drawn every so many steps
    adam = average(sketch) / (sqrt(average(sketch**2)) + eps), neither debiased
    update = sketch_scale * grad * |row of adam| / (|row of sketch| + 1e-8)

    Of a matrix that is wider than high, columns in place of rows. A sketch has 256 numbers for each
    row; matrices whose shorter side has no more are their own sketch. What is not a matrix gets
    adam of grad.

    Reads grad, step, key, mom and sqr_mom in [0, 1), eps, sketch_every >= 1 and sketch_scale >= 0.
    Keeps directions and the two averages. On a GPU, and in programs that are recorded, directions
    are drawn in every step, and thrown away where they are not due. Source: APOLLO (Zhu et al.
    2024).

    >>> from functional_sgd.randomness import key_of
    >>> key = key_of(torch.tensor(0), torch.tensor(1), leaf=0, position=0)
    >>> grad, none = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.zeros(2, 2)
    >>> now = dict(key=key, step=torch.tensor(1), mom=0.0, sqr_mom=0.0, eps=1e-9)
    >>> scale_channels_by_sketch(grad, torch.zeros(()), none, none, **now)["update"]
    tensor([[0.8485, 1.1314],
            [0.0000, 1.0000]])
    """
    slots = (directions, sketch_avg, sketch_sqr_avg)
    return _scaled(
        grad, slots, key, step, (mom, sqr_mom, eps, sketch_every, sketch_scale), by_channel=True
    )


@leafwise(**_slots(1), positive=("sketch_sqr_avg",))
def scale_by_sketch(
    grad: Tensor,
    directions: Tensor,
    sketch_avg: Tensor,
    sketch_sqr_avg: Tensor,
    *,
    key: Key,
    step: Tensor,
    mom: Decay = 0.9,
    sqr_mom: Decay = 0.999,
    eps: NonNegative = 1e-6,
    sketch_every: Count = 200,
    sketch_scale: NonNegative = 128**0.5,
) -> dict[str, Tensor]:
    """Make a matrix as long as Adam would make a sketch of it, which is a single row or column.

    As scale_channels_by_sketch, with one number for the matrix in place of one for each row, and a
    sketch of rank 1. Source: APOLLO-Mini (Zhu et al. 2024).

    >>> from functional_sgd.randomness import key_of
    >>> key = key_of(torch.tensor(0), torch.tensor(1), leaf=0, position=0)
    >>> grad, none = torch.tensor([[3.0], [4.0]]), torch.zeros(2, 1)
    >>> now = dict(key=key, step=torch.tensor(1), mom=0.0, sqr_mom=0.0, eps=0.0, sketch_scale=1.0)
    >>> scale_by_sketch(grad, torch.zeros(()), none, none, **now)["update"]  # |(1, 1)| / |(3, 4)|
    tensor([[0.8485],
            [1.1314]])
    """
    slots = (directions, sketch_avg, sketch_sqr_avg)
    return _scaled(
        grad, slots, key, step, (mom, sqr_mom, eps, sketch_every, sketch_scale), by_channel=False
    )


def _scaled(
    grad: Tensor,
    slots: tuple[Tensor, Tensor, Tensor],
    key: Key,
    step: Tensor,
    hypers: tuple[Any, ...],
    by_channel: bool,
) -> dict[str, Tensor]:
    mom, sqr_mom, eps, sketch_every, scale = hypers
    x, directions, average, squares = as_matrix(grad), slots[0], *map(as_real, slots[1:])
    if directions.dim() > 1:
        due, old, width = (step - 1) % sketch_every == 0, directions, math.sqrt(directions.shape[1])
        directions = renewed(due, old, lambda: normal(key, old) / width)
        sketch = projected(x, directions)
    else:
        directions, sketch = directions.clone(), x
    average = mom * average + (1 - mom) * sketch
    squares = sqr_mom * squares + (1 - sqr_mom) * sketch.square()
    update = average / (root(squares) + eps)
    if _has_rows(x):
        axes = [1 if x.shape[0] >= x.shape[1] else 0] if by_channel else [0, 1]
        update = scale * x * (_length(update, axes) / (_length(sketch, axes) + SMALL))
    return dict(
        update=like_leaf(update, grad),
        directions=directions,
        sketch_avg=as_complex(average, slots[1]),
        sketch_sqr_avg=as_complex(squares, slots[2]),
    )


def _length(matrix: Tensor, axes: list[int]) -> Tensor:
    return root(matrix.square().sum(axes, keepdim=True))


@leafwise(last_length=nothing)
def limit_norm_growth(
    update: Tensor, last_length: Tensor, *, growth: AtLeastOne = 1.01
) -> dict[str, Tensor]:
    """Let the update of a matrix be no more than so many times as long as the last one.

    update = update / max(1, |update| / ((last_length + 1e-8) * growth)), where last_length > 0

    Reads update and growth >= 1. Keeps last_length, that of the update as it left, which starts at
    0. Leaves of fewer than two axes stay as they are. Source: the norm-growth limiter of Fira (Chen
    et al. 2024), as in APOLLO; after an update of zeros their code lets it grow from 1e-8, which
    takes 1,600 steps to 0.1, and here it is free as in the first step.

    >>> one, ten = torch.tensor(1.0), torch.tensor([[6.0], [8.0]])
    >>> limit_norm_growth(ten, one, growth=2.0)
    {'update': tensor([[1.2000],
            [1.6000]]), 'last_length': tensor(2.)}
    """
    if not _has_rows(as_matrix(update)):
        return dict(update=update, last_length=last_length.clone())
    x = as_real(update)
    length = root(x.square().sum())
    excess = (length / (last_length + SMALL)).clamp(min=growth) / growth
    # Where all of these are 0-d, a growth that is a tensor has made float64 of them.
    excess = torch.where(last_length > 0, excess, 1.0).to(x.dtype)
    return dict(update=as_complex(x / excess, update), last_length=length / excess)


@elementwise
def debias_rate(
    update: Tensor, *, step: Tensor, mom: Decay = 0.9, sqr_mom: Decay = 0.999
) -> dict[str, Tensor]:
    """Correct the bias of both of Adam's averages at once, in an update that was made of them.

    update = update * sqrt(1 - sqr_mom**step) / (1 - mom**step)

    Reads update, step, mom and sqr_mom in [0, 1). Source: the faster form in section 2 of Kingma
    and Ba 2015.

    >>> debias_rate(torch.tensor([1.0]), step=torch.tensor(1), mom=0.75, sqr_mom=0.75)
    {'update': tensor([2.])}
    """
    return dict(update=update * ((1 - sqr_mom**step).sqrt() / (1 - mom**step)))
