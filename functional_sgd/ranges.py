"""What values a hyper may have: declared with its annotation, checked when a number is given."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias, get_args, get_origin

import optree
from torch import Tensor, nn


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`; an open end is not among them.

    >>> Range(0, 1, open_high=True), 1 in Range(0, 1, open_high=True)
    (in [0, 1), False)
    """

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    whole: bool = False  # whether it must be a whole number

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below and (not self.whole or float(value).is_integer())

    def __repr__(self) -> str:
        kind = "a whole number, " if self.whole else ""
        if self.high == math.inf:
            return f"{kind}{'above' if self.open_low else 'at least'} {self.low:g}"
        left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"{kind}in {left}{self.low:g}, {self.high:g}{right}"


Share: TypeAlias = Annotated[float, Range(0, 1)]
"""A number in [0, 1]."""

Decay: TypeAlias = Annotated[float, Range(0, 1, open_high=True)]
"""How much of an average is kept at each step: a number in [0, 1)."""

Fraction: TypeAlias = Annotated[float, Range(0, 1, open_low=True, open_high=True)]
"""A number above 0 and below 1."""

NonNegative: TypeAlias = Annotated[float, Range(0)]
"""A number that is not below 0."""

Positive: TypeAlias = Annotated[float, Range(0, open_low=True)]
"""A number above 0."""

AtLeastOne: TypeAlias = Annotated[float, Range(1)]
"""A number that is not below 1."""

AboveOne: TypeAlias = Annotated[float, Range(1, open_low=True)]
"""A number above 1."""

Count: TypeAlias = Annotated[float, Range(1, whole=True)]
"""A whole number, 1 or more."""


def range_of(annotation: Any) -> Range | None:
    """The range in an annotation, None if there is none."""
    if get_origin(annotation) is not Annotated:
        return None
    return next((part for part in get_args(annotation) if isinstance(part, Range)), None)


def check_number(who: str, name: str, value: Any, allowed: Range | None = None) -> None:
    """Raise an error unless a number that was given as a hyper is one, and in its range.

    Text, booleans, schedules and NaN are never hypers. Tensors are not looked at: their values may
    be on a device, or not known yet.
    """
    if callable(value) and not isinstance(value, type):
        raise TypeError(
            f"{who}: hyper {name!r} must be a number, got a function: {value!r}. To compute it at "
            f"every step: scheduled(opt, steps=n, {name}=...), or in the loop the callback "
            f"ParamScheduler({{{name!r}: ...}})."
        )
    if isinstance(value, (bool, str)):
        raise TypeError(
            f"{who}: hyper {name!r} must be a number, got {value!r} ({type(value).__name__}). "
            f"Write a number such as {name}=0.1."
        )
    if not isinstance(value, (int, float)):
        return
    if value != value:
        raise ValueError(f"{who}: hyper {name!r} is NaN. Where was it computed?")
    if allowed is not None and value not in allowed:
        raise ValueError(f"{who}: hyper {name!r} must be {allowed!r}, got {value!r}.")


def check_no_params(who: str, name: str, value: Any, is_hyper: bool) -> None:
    """Raise TypeError for a default that holds parameters, as those of torch.optim get; an extra
    may be a module.
    """
    if isinstance(value, Iterator) or (is_hyper and any(map(_has_axes, optree.tree_leaves(value)))):
        raise TypeError(
            f"{who}: hyper {name!r} must be a number, got {type(value).__name__}. An optimizer has "
            f"no parameters in it: opt(params, grads, state, hyper) is given them, and "
            f"to_torch(opt, model.parameters()) makes one that holds them."
        )


def _has_axes(leaf: object) -> bool:
    return isinstance(leaf, (nn.Module, Iterator)) or (isinstance(leaf, Tensor) and leaf.dim() > 0)
