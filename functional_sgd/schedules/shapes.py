"""Schedules over a length of 1: how to get from a first value to a last one."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from functional_sgd.hyper import Hyper
from functional_sgd.schedules.joining import Reverse
from functional_sgd.schedules.position import Position, Shape

__all__ = [
    "Constant",
    "Cosine",
    "Exponential",
    "Linear",
    "Polynomial",
    "Rex",
    "one_minus_sqrt",
    "polynomial_decay",
]


# No Shape, as it has no end: shares and steps are the same to it.
@dataclass(frozen=True)
class Constant:
    """Always `value`.

    >>> Constant(0.1)(0.5)
    0.1
    """

    value: float

    def __call__(self, position: Position) -> Hyper:
        """The value at this position."""
        return self.value


@dataclass(frozen=True)
class Linear(Shape):
    """From start to end in a straight line: start + position * (end - start).

    >>> Linear(1, 2)(0.3)
    1.3
    """

    start: float
    end: float

    def __call__(self, position: Position) -> Hyper:
        """The value at this position."""
        return self.start + position * (self.end - self.start)


@dataclass(frozen=True)
class Cosine(Shape):
    """From start to end along half a cosine: level, steep, level.

    start + (1 - cos(pi * position)) / 2 * (end - start)

    >>> Cosine(0, 2)(1)
    2.0
    """

    start: float
    end: float

    def __call__(self, position: Position) -> Hyper:
        """The value at this position."""
        angle = math.pi * position
        cosine = torch.cos(angle) if isinstance(position, Tensor) else math.cos(angle)
        return self.start + (1 - cosine) / 2 * (self.end - self.start)


@dataclass(frozen=True)
class Exponential(Shape):
    """From start to end by equal factors: start * (end / start)**position. Both have the same sign
    and are not 0.

    >>> Exponential(1.0, 100.0)(0.5)
    10.0
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        if not self.start * self.end > 0:
            raise ValueError(
                f"Exponential: start and end must have one sign and not be 0, got {self.start} and "
                f"{self.end}. "
                f"Use Linear or Cosine to reach 0."
            )

    def __call__(self, position: Position) -> Hyper:
        """The value at this position."""
        return self.start * (self.end / self.start) ** position


@dataclass(frozen=True)
class Polynomial(Shape):
    """From start to end along a power: start + position**power * (end - start).

    >>> Polynomial(0.0, 2.0, power=2)(0.5)
    0.5
    """

    start: float
    end: float
    power: float = 1.0

    def __call__(self, position: Position) -> Hyper:
        """The value at this position."""
        return self.start + position**self.power * (self.end - self.start)


@dataclass(frozen=True)
class Rex(Shape):
    """From start to end, slowly first and then ever faster: the reflected exponential.

    end + (start - end) * (1 - position) / (1 - position / 2)

    Source: Chen et al. 2022, "REX: Revisiting Budgeted Training with an Improved Schedule".

    >>> Rex(3.0, 0.0)(0.5)
    2.0
    """

    start: float
    end: float = 0.0

    def __call__(self, position: Position) -> Hyper:
        """The value at this position."""
        return self.end + (self.start - self.end) * (1 - position) / (1 - position / 2)


def polynomial_decay(start: float, end: float = 0.0, power: float = 1.0) -> Reverse:
    """From start to end, flat at the end for a power above 1.

    end + (1 - position)**power * (start - end)

    Source: torch.optim.lr_scheduler.PolynomialLR and optax.polynomial_schedule, over their steps:
    `Stretch(polynomial_decay(lr, 0.0, power), steps)`.

    >>> polynomial_decay(4.0, power=2)(0.5)
    1.0
    """
    return Reverse(Polynomial(end, start, power))


def one_minus_sqrt(start: float, end: float = 0.0) -> Polynomial:
    """From start to end, steep at the start: the decay that suits a long stable phase.

    end + (1 - sqrt(position)) * (start - end)

    Source: Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training
    Durations".

    >>> one_minus_sqrt(2.0)(0.25)
    1.0
    """
    return Polynomial(start, end, power=0.5)
