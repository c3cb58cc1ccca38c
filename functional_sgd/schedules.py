"""Schedules: functions of a position in [0, 1], as values that can be joined, compared, pickled and
traced.

Each takes a number, or a 0-d tensor if it is to be compiled or differentiated.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torch import Tensor

Position: TypeAlias = Any
"""A number or a 0-d tensor: 0 at the start, 1 at the end."""

Schedule: TypeAlias = Callable[[Position], Any]


@dataclass(frozen=True)
class Constant:
    """Always `value`.

    >>> Constant(0.1)(0.5)
    0.1
    """

    value: float

    def __call__(self, position: Position) -> Any:
        """The value at this position."""
        return self.value


@dataclass(frozen=True)
class Linear:
    """From start to end in a straight line: start + position * (end - start).

    >>> Linear(1, 2)(0.3)
    1.3
    """

    start: float
    end: float

    def __call__(self, position: Position) -> Any:
        """The value at this position."""
        return self.start + position * (self.end - self.start)


@dataclass(frozen=True)
class Cosine:
    """From start to end along half a cosine: level, steep, level.

    start + (1 - cos(pi * position)) / 2 * (end - start)

    >>> Cosine(0, 2)(1)
    2.0
    """

    start: float
    end: float

    def __call__(self, position: Position) -> Any:
        """The value at this position."""
        cosine = (
            torch.cos(math.pi * position)
            if isinstance(position, Tensor)
            else math.cos(math.pi * position)
        )
        return self.start + (1 - cosine) / 2 * (self.end - self.start)


@dataclass(frozen=True)
class Exponential:
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

    def __call__(self, position: Position) -> Any:
        """The value at this position."""
        return self.start * (self.end / self.start) ** position


@dataclass(frozen=True)
class Polynomial:
    """From start to end along a power: start + position**power * (end - start).

    >>> Polynomial(0.0, 2.0, power=2)(0.5)
    0.5
    """

    start: float
    end: float
    power: float = 1.0

    def __call__(self, position: Position) -> Any:
        """The value at this position."""
        return self.start + position**self.power * (self.end - self.start)


@dataclass(frozen=True)
class Join:
    """Schedules one after the other: `parts[i]` runs over `shares[i]` of the way. At a border the
    later one counts.

    Raises ValueError if the shares are negative, do not sum to 1 (within 1e-9), or are not as many
    as the parts.

    >>> Join((0.3, 0.7), (Cosine(0.3, 0.6), Cosine(0.6, 0.2)))(0.3)
    0.6
    """

    shares: tuple[float, ...]
    parts: tuple[Schedule, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shares", tuple(self.shares))
        object.__setattr__(self, "parts", tuple(self.parts))
        if not self.shares or len(self.shares) != len(self.parts):
            raise ValueError(
                f"Join: needs one share for each part, got {len(self.shares)} for "
                f"{len(self.parts)}."
            )
        if min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-9:
            raise ValueError(f"Join: shares must be at least 0 and sum to 1, got {self.shares}.")

    def __call__(self, position: Position) -> Any:
        """The value at this position; beyond the ends, the first and last value."""
        ends = [*accumulate(self.shares)]
        ends[-1] = 1.0
        value = None
        for end, share, part in zip(ends, self.shares, self.parts, strict=True):
            if share == 0:
                continue
            start = end - share
            local = _clamp((position - start) / (end - start))
            value = (
                part(local)
                if value is None
                else _choose(position >= start - 1e-12, part(local), value)
            )
        return value


def one_cycle(
    maximum: float, div: float = 25.0, div_final: float = 1e5, pct_start: float = 0.25
) -> Join:
    """Warm up along a cosine from maximum / div to maximum, then down to maximum / div_final.

    `pct_start` is the share of the warm-up. Source: Smith 2018, in fastai's form.

    >>> one_cycle(1e-3)(0.25)
    0.001
    """
    return three_cosines(pct_start, maximum / div, maximum, maximum / div_final)


def three_cosines(pct_start: float, start: float, middle: float, end: float) -> Join:
    """Along a cosine from start to middle over the first `pct_start`, and along another to the end.

    >>> three_cosines(0.25, 0.95, 0.85, 0.95)(0.25)
    0.85
    """
    return Join((pct_start, 1 - pct_start), (Cosine(start, middle), Cosine(middle, end)))


def flat_cosine(maximum: float, div_final: float = 1e5, pct_start: float = 0.75) -> Join:
    """Flat at the maximum for `pct_start` of the way, then along a cosine to maximum / div_final.

    >>> flat_cosine(0.1)(0.5)
    0.1
    """
    return three_cosines(pct_start, maximum, maximum, maximum / div_final)


def warm_restarts(maximum: float, cycles: int = 3, cycle_mult: float = 2.0) -> Join:
    """Cosines from the maximum to 0, one after the other, each `cycle_mult` times as long as the
    one before.

    Source: SGDR (Loshchilov and Hutter 2017).

    >>> warm_restarts(1.0, cycles=3)(1 / 7)
    1.0
    """
    lengths = [cycle_mult**i for i in range(cycles)]
    return Join(
        tuple(length / sum(lengths) for length in lengths), (Cosine(maximum, 0.0),) * cycles
    )


def _clamp(position: Position) -> Position:
    return position.clamp(0, 1) if isinstance(position, Tensor) else min(max(position, 0.0), 1.0)


def _choose(condition: Any, yes: Any, no: Any) -> Any:
    return (
        torch.where(condition, yes, no)
        if isinstance(condition, Tensor)
        else (yes if condition else no)
    )
