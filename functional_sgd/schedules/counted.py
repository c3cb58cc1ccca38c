"""Schedules with lengths of their own, in whatever the caller counts, and without an end."""

from dataclasses import dataclass
from itertools import pairwise

import torch

from functional_sgd.hyper import Hyper
from functional_sgd.schedules.joining import (
    Join,
    Product,
    Restarts,
    Sequence,
    Stretch,
    Sum,
    check_borders,
)
from functional_sgd.schedules.position import (
    Between,
    Counted,
    Position,
    Schedule,
    choose,
    clamp,
    whole,
)
from functional_sgd.schedules.shapes import Constant, Linear

__all__ = [
    "DecayWarmUp",
    "ExponentialDecay",
    "InverseSqrt",
    "Piecewise",
    "cyclic",
    "interpolate",
    "inverse_sqrt",
    "multi_step",
    "step_decay",
    "warm_up",
]


@dataclass(frozen=True)
class ExponentialDecay(Counted):
    """Times `factor` with every `every`, from `begin` on; all at once if it is a staircase.

    start * factor**n;  n = max(position - begin, 0) / every, rounded down in a staircase

    With a `limit`, no further than that. Raises ValueError unless factor > 0 and every > 0.
    Source: torch.optim.lr_scheduler.ExponentialLR, optax.exponential_decay.

    >>> ExponentialDecay(1.0, factor=0.25, every=10)(5)
    0.5
    >>> ExponentialDecay(1.0, factor=0.25, every=10, staircase=True)(19)
    0.25
    """

    start: float
    factor: float
    every: float = 1.0
    staircase: bool = False
    begin: float = 0.0
    limit: float | None = None

    def __post_init__(self) -> None:
        if not self.factor > 0 or not self.every > 0:
            raise ValueError(
                f"ExponentialDecay: factor and every must be above 0, got {self.factor} and "
                f"{self.every}."
            )

    @property
    def lengths(self) -> tuple[float, ...]:
        """When it begins, and how often it is multiplied."""
        return self.begin, self.every

    def __call__(self, position: Position) -> Hyper:
        """The value at this position."""
        times = clamp(position - self.begin) / self.every
        if self.staircase:
            times = whole(times)
        value = self.start * self.factor**times
        if self.limit is None:
            return value
        beyond = value < self.limit if self.factor < 1 else value > self.limit
        return choose(beyond, self.limit, value)


@dataclass(frozen=True)
class Piecewise(Counted):
    """One value until the first border, the next from there on, and so on.

    Raises ValueError if the borders do not rise, or are not one less than the values.
    Source: optax.piecewise_constant_schedule; torch.optim.lr_scheduler.ConstantLR is
    `Piecewise((total_iters,), (factor * lr, lr))`.

    >>> [Piecewise((2, 3), (1.0, 0.5, 0.1))(step) for step in range(5)]
    [1.0, 1.0, 0.5, 0.1, 0.1]
    """

    borders: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "borders", tuple(self.borders))
        object.__setattr__(self, "values", tuple(self.values))
        if len(self.values) != len(self.borders) + 1:
            raise ValueError(
                f"Piecewise: needs a border between any two values, got {len(self.borders)} for "
                f"{len(self.values)}."
            )
        check_borders("Piecewise", self.borders)

    @property
    def lengths(self) -> tuple[float, ...]:
        """The borders."""
        return self.borders

    def __call__(self, position: Position) -> Hyper:
        """The value at this position."""
        value: Hyper = self.values[0]
        for border, later in zip(self.borders, self.values[1:], strict=True):
            # A border in shares may be some ulps above the k / n that it stands for.
            value = choose(position >= border - 1e-12, later, value)
        return value


@dataclass(frozen=True)
class InverseSqrt(Counted):
    """Falls as one over the root of the steps: start / sqrt(1 + position / length).

    Raises ValueError unless length > 0. Source: see `inverse_sqrt`.

    >>> InverseSqrt(1.0, length=100)(300)
    0.5
    """

    start: float
    length: float

    def __post_init__(self) -> None:
        if not self.length > 0:
            raise ValueError(f"InverseSqrt: length must be above 0, got {self.length}.")

    @property
    def lengths(self) -> tuple[float, ...]:
        """Its length."""
        return (self.length,)

    def __call__(self, position: Position) -> Hyper:
        """The value at this position."""
        return self.start / (1 + position / self.length) ** 0.5


@dataclass(frozen=True)
class DecayWarmUp(Counted):
    """For the decay of an average: short at first, then longer until it is `limit`.

    min(limit, (1 + position) / (offset + position))

    The position is in steps. Source: tf.train.ExponentialMovingAverage(num_updates=...), where the
    offset is 10.

    >>> [DecayWarmUp(0.5, offset=4)(step) for step in (0, 1, 2, 9)]
    [0.25, 0.4, 0.5, 0.5]
    """

    limit: float
    offset: float = 10.0

    @property
    def lengths(self) -> tuple[float, ...]:
        """The offset."""
        # A length in steps, so that `scheduled` refuses to give it shares of the run.
        return (self.offset,)

    def __call__(self, position: Position) -> Hyper:
        """The value at this position."""
        value = (1 + position) / (self.offset + position)
        return choose(value > self.limit, self.limit, value)


def step_decay(start: float, factor: float = 0.1, every: float = 30) -> ExponentialDecay:
    """Times `factor` at once, every `every` steps.

    Source: torch.optim.lr_scheduler.StepLR.

    >>> [step_decay(1.0, factor=0.5, every=2)(step) for step in range(5)]
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    return ExponentialDecay(start, factor, every, staircase=True)


def multi_step(start: float, at: tuple[float, ...], factor: float = 0.1) -> Piecewise:
    """Times `factor` at each of the positions `at`, which rise.

    Source: torch.optim.lr_scheduler.MultiStepLR.

    >>> [multi_step(1.0, at=(1, 3), factor=0.5)(step) for step in range(4)]
    [1.0, 0.5, 0.5, 0.25]
    """
    at = tuple(at)
    return Piecewise(at, tuple(start * factor**times for times in range(len(at) + 1)))


def interpolate(
    points: tuple[float, ...], values: tuple[float, ...], shape: Between = Linear
) -> Sequence:
    """Through a value at each of the points, along a shape from each to the next, and flat outside.

    `shape(start, end)` makes the pieces: Linear, Cosine, Exponential. Raises ValueError if there
    are fewer than 2 points, or not one value for each, or if the points do not rise from 0 or
    above. Source: optax.piecewise_interpolate_schedule; torch.optim.lr_scheduler.LinearLR is
    `interpolate((0, total_iters), (start_factor * lr, end_factor * lr))`.

    >>> [interpolate((0, 2, 4), (0.0, 1.0, 0.5))(step) for step in range(6)]
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.5]
    """
    points, values = tuple(points), tuple(values)
    if len(points) < 2 or len(points) != len(values):
        raise ValueError(
            f"interpolate: needs 2 points or more and a value for each, got {len(points)} points "
            f"and {len(values)} values."
        )
    if points[0] < 0 or any(not later > earlier for earlier, later in pairwise(points)):
        raise ValueError(
            f"interpolate: points must rise, from 0 or above, got {points}. Nothing comes before "
            f"position 0: let the first be 0, with the value there."
        )
    pieces: list[Schedule] = []
    for place, (point, following) in enumerate(pairwise(points)):
        pieces.append(Stretch(shape(values[place], values[place + 1]), following - point))
    if points[0] > 0:
        return Sequence(points[:-1], (Constant(values[0]), *pieces))
    return Sequence(points[1:-1], tuple(pieces))


def warm_up(length: float, then: Schedule, start: float = 0.0) -> Sequence:
    """From start in a straight line to the first value of another schedule, which goes on from
    there.

    position < length: start + position / length * (then(0) - start);  else then(position - length)

    Raises ValueError unless length > 0, and TypeError for a schedule of several values.
    Source: Goyal et al. 2017. `warm_up(100, ExponentialDecay(...))` is
    optax.warmup_exponential_decay_schedule, `warm_up(100, Constant(0.1))` a warm-up alone.

    >>> [warm_up(2, ExponentialDecay(1.0, factor=0.5))(step) for step in range(5)]
    [0.0, 0.5, 1.0, 0.5, 0.25]
    """
    if not length > 0:
        raise ValueError(
            f"warm_up: length must be above 0, got {length}. Without a warm-up, take "
            f"{then!r} alone."
        )
    # A tensor, as `scheduled` gives it: a schedule of one's own is written with torch's operators.
    first = then(torch.zeros((), dtype=torch.float64, device="cpu"))
    if isinstance(first, (dict, list, tuple)):
        raise TypeError(
            f"warm_up: expected a schedule of one number, which a line goes to, got {first!r} from "
            f"{then!r}. Warm up each value by itself, and return all of them from one function."
        )
    return Sequence((length,), (Stretch(Linear(start, float(first)), length), then))


def inverse_sqrt(peak: float, warmup: float, start: float = 0.0) -> Sequence:
    """Up in a straight line over `warmup`, then down as one over the root of the steps.

    peak * min(step / warmup, sqrt(warmup / step)), for start = 0

    Raises ValueError unless warmup > 0. Source: Vaswani et al. 2017, where peak =
    (width * warmup)**-0.5.

    >>> [inverse_sqrt(1.0, warmup=4)(step) for step in (2, 4, 16)]
    [0.5, 1.0, 0.5]
    """
    if not warmup > 0:
        raise ValueError(
            f"inverse_sqrt: warmup must be above 0, got {warmup}. It is how long the rate rises, "
            f"and how slowly it falls: 1000, say."
        )
    return warm_up(warmup, InverseSqrt(peak, warmup), start)


def cyclic(
    low: float,
    high: float,
    up: float = 2000,
    down: float | None = None,
    factor: float = 1.0,
    gamma: float = 1.0,
) -> Sum:
    """Up from low to high in a straight line over `up`, down over `down`, again and again.

    low + (high - low) * height * factor**cycle * gamma**position;  height goes 0, 1, 0 in a cycle

    `down` is `up` if it is not given. Raises ValueError for lengths below 0, or if both are 0.
    Source: Smith 2017; torch.optim.lr_scheduler.CyclicLR, whose
    mode "triangular2" is factor = 0.5, and "exp_range" is gamma.

    >>> [cyclic(1.0, 3.0, up=2, factor=0.5)(step) for step in range(8)]
    [1.0, 2.0, 3.0, 2.0, 1.0, 1.5, 2.0, 1.5]
    """
    down = up if down is None else down
    if not (up >= 0 and down >= 0 and up + down > 0):
        raise ValueError(
            f"cyclic: up and down must be 0 or above, and not both 0, got {up} and {down}. They "
            f"are the two lengths of a cycle: 2000 and 2000, say."
        )
    shares = (up / (up + down), down / (up + down))
    triangle = Join(shares, (Linear(0.0, high - low), Linear(high - low, 0.0)))
    cycles = Restarts(triangle, up + down, factor=factor)
    return Sum((Constant(low), Product((cycles, ExponentialDecay(1.0, gamma)))))
