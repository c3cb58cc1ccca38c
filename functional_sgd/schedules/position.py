"""What a schedule is a function of, and what schedules are written with."""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from functional_sgd.hyper import Hyper
from functional_sgd.precision import widest

Position: TypeAlias = Any
"""How far the run has come, as a number or a 0-d tensor: a share from 0 to 1, or steps."""

Schedule: TypeAlias = Callable[[Position], Hyper]

Between: TypeAlias = Callable[[float, float], Schedule]
"""What makes a shape of its first and last value, such as Linear and Cosine."""

TOLERANCE = 1e-9  # k / n * n counts as k


class Shape:
    """A schedule over a length of 1: a share of the run, or what `Stretch` makes longer."""


class Counted:
    """A schedule with lengths of its own, in whatever the caller counts: steps, or shares."""

    @property
    def lengths(self) -> tuple[float, ...]:
        """Every length that it has; one above 1 is in steps."""
        return ()


def clamp(position: Position, low: float = 0.0, high: float = math.inf) -> Position:
    """The position, or the end that it is beyond."""
    if isinstance(position, Tensor):
        return position.clamp(low, high)
    return min(max(position, low), high)


def choose(condition: bool | Tensor, yes: Hyper, no: Hyper) -> Hyper:
    """`yes` if the condition holds, else `no`; without a branch, if it is a tensor."""
    if not isinstance(condition, Tensor):
        return yes if condition else no
    if not isinstance(yes, Tensor) and not isinstance(no, Tensor):  # torch would make it float32
        no = torch.full_like(condition, no, dtype=widest(condition.device))
    return torch.where(condition, yes, no)


def whole(number: Position) -> Position:
    """The number rounded down, unless it is next to the whole number above it."""
    if isinstance(number, Tensor):
        return (number + TOLERANCE).floor()
    return float(math.floor(number + TOLERANCE))


def logarithm(number: Position) -> Position:
    """The natural logarithm."""
    return number.log() if isinstance(number, Tensor) else math.log(number)
