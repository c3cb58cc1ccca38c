"""Schedules made of schedules."""

from dataclasses import dataclass
from itertools import accumulate, pairwise

from functional_sgd.hyper import Hyper
from functional_sgd.schedules.position import (
    Counted,
    Position,
    Schedule,
    Shape,
    choose,
    clamp,
    logarithm,
    whole,
)

__all__ = ["Join", "Product", "Restarts", "Reverse", "Sequence", "Stretch", "Sum"]


@dataclass(frozen=True)
class Join(Shape):
    """Schedules one after the other: `parts[i]` runs over `shares[i]` of the way. At a border the
    later one counts.

    Parts get positions from 0 to 1; lengths that they have are shares of their part. Raises
    ValueError if the shares are negative, do not sum to 1 (within 1e-9), or are not as many as the
    parts, and for a part that counts steps: that goes into a Sequence.

    >>> from functional_sgd.schedules import Cosine
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
            raise ValueError(
                f"Join: shares must be at least 0 and sum to 1, got {self.shares}. A length in "
                f"steps is a share of the run: 100 steps of 1000 are 100 / 1000."
            )
        for part in self.parts:
            check_shares("Join", part)

    def __call__(self, position: Position) -> Hyper:
        """The value at this position; beyond the ends, the first and last value."""
        ends = [*accumulate(self.shares)]
        # Shares sum to 1 up to rounding, and the last part is to end at 1 exactly.
        ends[-1] = 1.0
        value = None
        for end, share, part in zip(ends, self.shares, self.parts, strict=True):
            if share == 0:
                continue
            start = end - share
            # Where the position is a tensor every part is computed, also outside of its share.
            local = clamp((position - start) / (end - start), 0.0, 1.0)
            if value is None:
                value = part(local)
            else:
                # A border is a sum, which may be some ulps above the k / n that it stands for.
                value = choose(position >= start - 1e-12, part(local), value)
        return value


@dataclass(frozen=True)
class Stretch(Counted):
    """A shape over another length than 1, after which its last value stays.

    part(min(position / length, 1)): so it is in steps, for `scheduled(opt, lr=...)` without
    `steps`. Raises ValueError unless length > 0, and for a part that counts steps already.

    >>> from functional_sgd.schedules import Linear
    >>> warm = Stretch(Linear(0.0, 1.0), 4)
    >>> [warm(step) for step in range(6)]
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """

    part: Schedule
    length: float

    def __post_init__(self) -> None:
        if not self.length > 0:
            raise ValueError(f"Stretch: length must be above 0, got {self.length}.")
        check_shares("Stretch", self.part)

    @property
    def lengths(self) -> tuple[float, ...]:
        """Its length."""
        return (self.length,)

    def __call__(self, position: Position) -> Hyper:
        """The value at this position."""
        return self.part(clamp(position / self.length, 0.0, 1.0))


@dataclass(frozen=True)
class Sequence(Counted):
    """Schedules one after the other, each counting from where it begins: parts[i] from borders[i -
    1] on.

    The borders are where the second and later parts begin; there is no end. Shapes have a length
    here only by `Stretch`. Raises ValueError if the borders do not rise, or are not one less than
    the parts. Source: torch.optim.lr_scheduler.SequentialLR, optax.join_schedules.

    >>> from functional_sgd.schedules import ExponentialDecay, Linear
    >>> parts = Stretch(Linear(0.0, 1.0), 2), ExponentialDecay(1.0, factor=0.5)
    >>> [Sequence((2,), parts)(step) for step in range(5)]
    [0.0, 0.5, 1.0, 0.5, 0.25]
    """

    borders: tuple[float, ...]
    parts: tuple[Schedule, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "borders", tuple(self.borders))
        object.__setattr__(self, "parts", tuple(self.parts))
        if len(self.parts) != len(self.borders) + 1:
            raise ValueError(
                f"Sequence: needs a border between any two parts, got {len(self.borders)} for "
                f"{len(self.parts)}."
            )
        check_borders("Sequence", self.borders)
        for part in self.parts:
            if is_shape(part):
                raise ValueError(
                    f"Sequence: {part!r} has no length here. Write Stretch(..., length), or use "
                    f"Join."
                )

    @property
    def lengths(self) -> tuple[float, ...]:
        """The borders, and the lengths of the parts."""
        return (*self.borders, *lengths_of(self.parts))

    def __call__(self, position: Position) -> Hyper:
        """The value at this position."""
        value = self.parts[0](position)
        for border, part in zip(self.borders, self.parts[1:], strict=True):
            # Where the position is a tensor it is computed before its border, too.
            later = part(clamp(position - border))
            value = choose(position >= border - 1e-12, later, value)
        return value


@dataclass(frozen=True)
class Restarts(Counted):
    """A shape again and again, each time `mult` times as long and `factor` times as high.

    cycle i begins at length * (mult**i - 1) / (mult - 1), or i * length if mult is 1

    There is no end. Raises ValueError unless length > 0 and mult >= 1, and for a part that counts
    steps itself. Source: SGDR (Loshchilov and Hutter 2017);
    torch.optim.lr_scheduler.CosineAnnealingWarmRestarts is
    `Restarts(Cosine(lr, eta_min), T_0, T_mult)`.

    >>> from functional_sgd.schedules import Linear
    >>> saw = Restarts(Linear(4.0, 0.0), length=2, mult=2, factor=0.5)
    >>> [saw(step) for step in range(7)]
    [4.0, 2.0, 2.0, 1.5, 1.0, 0.5, 1.0]
    """

    part: Schedule
    length: float
    mult: float = 1.0
    factor: float = 1.0

    def __post_init__(self) -> None:
        if not self.length > 0 or not self.mult >= 1:
            raise ValueError(
                f"Restarts: length must be above 0 and mult at least 1, got {self.length} and "
                f"{self.mult}."
            )
        check_shares("Restarts", self.part)

    @property
    def lengths(self) -> tuple[float, ...]:
        """The length of the first cycle."""
        return (self.length,)

    def __call__(self, position: Position) -> Hyper:
        """The value at this position."""
        passed = clamp(position / self.length)
        if self.mult == 1:
            cycle = whole(passed)
            local = passed - cycle
        else:
            growth = self.mult - 1
            cycle = whole(logarithm(passed * growth + 1) / logarithm(self.mult))
            size = self.mult**cycle
            local = (passed - (size - 1) / growth) / size
        # Where `whole` has rounded up, local is slightly negative.
        value = self.part(clamp(local, 0.0, 1.0))
        return value if self.factor == 1 else value * self.factor**cycle


@dataclass(frozen=True)
class Reverse(Shape):
    """A shape backwards: part(1 - position). Raises ValueError for a part that counts steps.

    >>> from functional_sgd.schedules import Linear, Polynomial
    >>> Reverse(Polynomial(0.0, 4.0, power=2))(0.5), Reverse(Linear(1.0, 3.0))(0.0)
    (1.0, 3.0)
    """

    part: Schedule

    def __post_init__(self) -> None:
        check_shares("Reverse", self.part)

    def __call__(self, position: Position) -> Hyper:
        """The value at this position."""
        return self.part(1 - position)


@dataclass(frozen=True)
class Sum:
    """The sum of schedules at each position.

    >>> from functional_sgd.schedules import Constant, Linear
    >>> Sum((Constant(1.0), Linear(0.0, 2.0)))(0.5)
    2.0
    """

    parts: tuple[Schedule, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))

    def __call__(self, position: Position) -> Hyper:
        """The value at this position."""
        return sum(part(position) for part in self.parts)


@dataclass(frozen=True)
class Product:
    """The product of schedules at each position: a rate, and factors that change it.

    Source: torch.optim.lr_scheduler.ChainedScheduler, whose schedulers each multiply lr.

    >>> from functional_sgd.schedules import Constant, Linear
    >>> Product((Constant(0.5), Linear(0.0, 2.0)))(0.5)
    0.5
    """

    parts: tuple[Schedule, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))

    def __call__(self, position: Position) -> Hyper:
        """The value at this position."""
        value: Hyper = 1.0
        for part in self.parts:
            value = value * part(position)
        return value


def is_shape(schedule: Schedule) -> bool:
    """Whether it runs over a length of 1, so that the length of the run must be known.

    >>> from functional_sgd.schedules import Linear
    >>> is_shape(Linear(0, 1)), is_shape(Stretch(Linear(0, 1), 100)), is_shape(lambda step: 1.0)
    (True, False, False)
    """
    if isinstance(schedule, (Sum, Product)):
        return any(map(is_shape, schedule.parts))
    return isinstance(schedule, Shape)


def counts_steps(schedule: Schedule) -> bool:
    """Whether it has a length above 1, which no share of a run is.

    >>> from functional_sgd.schedules import Linear
    >>> counts_steps(Stretch(Linear(0, 1), 100)), counts_steps(Stretch(Linear(0, 1), 0.1))
    (True, False)
    """
    return any(length > 1 for length in lengths_of((schedule,)))


def check_shares(who: str, part: Schedule) -> None:
    """Raise ValueError for a part that counts steps, where it would get positions from 0 to 1."""
    if counts_steps(part):
        raise ValueError(
            f"{who}: expected a shape, got {part!r}, which counts steps; here it would get "
            f"positions from 0 to 1. Leave out its Stretch, give its lengths as shares, or use "
            f"Sequence."
        )


def lengths_of(parts: tuple[Schedule, ...]) -> tuple[float, ...]:
    """The lengths that these schedules have of their own."""
    found: list[float] = []
    for part in parts:
        if isinstance(part, Counted):
            found += part.lengths
        elif isinstance(part, (Sum, Product)):
            found += lengths_of(part.parts)
    return tuple(found)


def check_borders(who: str, borders: tuple[float, ...]) -> None:
    """Raise ValueError unless they are above 0 and rise."""
    if any(not later > earlier for earlier, later in pairwise((0, *borders))):
        raise ValueError(f"{who}: borders must be above 0 and rise, got {borders}.")
