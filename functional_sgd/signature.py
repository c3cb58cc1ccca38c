"""What the signature of a rule's function says: columns, hypers, slots, numbers and reductions."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal, TypeAlias, get_type_hints

from torch import Tensor

from functional_sgd.errors import meant
from functional_sgd.ranges import Range, range_of
from functional_sgd.reduction import Reduction

Scope: TypeAlias = Literal["elementwise", "blockwise", "leafwise", "treewise"]
RuleFunction: TypeAlias = Callable[..., Mapping[str, Any]]
Initializer: TypeAlias = Callable[[Tensor], Tensor]
Slot: TypeAlias = Initializer | float

FROM_CALLER = ("param", "grad", "update")
"""Columns that are there before any rule has run; `update` is `grad` until a rule writes it."""

STEP = "step"
"""A scalar of every leaf: how many updates it has taken, this one included."""

KEY = "key"
"""What random numbers are drawn from."""

DTYPE = "dtype"
"""The dtype in which a leaf is kept, for rules that round."""

REQUIRED = inspect.Parameter.empty
"""Stands for "no default": the caller must pass this hyper or extra."""


@dataclass(frozen=True)
class Signature:
    """What the signature of a rule's function says, by the function's own names."""

    columns: tuple[str, ...]  # what it reads of every leaf
    optional: frozenset[str]  # the columns it can do without
    scalars: Mapping[str, Any]  # hypers, extras and the step -> default or REQUIRED
    numbers: tuple[str, ...]  # its own slots of the whole tree
    reductions: Mapping[str, Reduction]
    ranges: Mapping[str, Range]  # of hypers
    random: bool  # whether it draws from a key
    rounds: bool  # whether it asks in which dtype its leaf is kept


def read_signature(function: RuleFunction, starts: Mapping[str, Slot], scope: Scope) -> Signature:
    """What the signature of a function says. Raises TypeError if it cannot be a rule's."""
    who = f"rule {getattr(function, '__name__', function)!s}"
    if not callable(function):
        raise TypeError(f"{who}: expected a function, got {type(function).__name__}.")
    if not hasattr(function, "__name__"):
        raise TypeError(
            f"{who}: expected a function with a name, got a {type(function).__name__}. Write one "
            f"with def that calls it; numbers that may change are hypers, behind the '*'."
        )
    columns: list[str] = []
    optional: set[str] = set()
    scalars: dict[str, Any] = {}
    reductions: dict[str, Reduction] = {}
    ranges: dict[str, Range] = {}
    for name, parameter in inspect.signature(function, eval_str=False).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            if isinstance(parameter.default, Reduction):
                reductions[name] = parameter.default
            elif isinstance(parameter.default, (tuple, list, dict)):
                raise TypeError(
                    f"{who}: the default of {name!r} must be one number, got "
                    f"{parameter.default!r}. Write a keyword for each: mom=0.9, sqr_mom=0.99."
                )
            else:
                scalars[name] = parameter.default
            allowed = range_of(_annotation(function, parameter))
            if allowed is not None:
                ranges[name] = allowed
        elif parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            columns.append(name)
            if parameter.default is not REQUIRED:
                _check_optional(who, name, parameter.default)
                optional.add(name)
        else:
            raise TypeError(
                f"{who}: parameter {name!r} must have a plain name: no *args, **kwargs or '/'."
            )
    for name in (STEP, KEY, DTYPE):
        if name in columns:
            raise TypeError(f"{who}: {name!r} is a scalar; write it after a '*' in the signature.")
    _check_slots(who, starts, columns, optional, scalars)
    numbers = tuple(name for name in starts if name in scalars)
    required = [name for name in columns if name not in optional]
    _check_reductions(who, reductions, required, scalars)
    of_leaf = list(reductions)
    for name in (KEY, DTYPE):
        if name in scalars:
            of_leaf.append(name)
    if scope == "treewise" and of_leaf:
        raise TypeError(
            f"{who}: sees whole trees, so it has no {of_leaf[0]!r}: reductions, keys and dtypes "
            f"are of rules that see one leaf. Use @leafwise, or @elementwise."
        )
    apart = (*numbers, KEY, DTYPE)
    plain = {name: value for name, value in scalars.items() if name not in apart}
    return Signature(
        tuple(columns), frozenset(optional), plain, numbers, reductions, ranges,
        KEY in scalars, DTYPE in scalars,
    )  # fmt: skip


def _check_optional(who: str, name: str, default: object) -> None:
    """Raise TypeError for a hyper in front of the '*'; a column that may be missing has None, or a
    tensor.
    """
    if default is not None and not isinstance(default, Tensor):
        raise TypeError(
            f"{who}: {name!r} has a default, {default!r}, so it is a hyper: put it behind the '*'. "
            f"A column that may be missing has the default None."
        )


def _annotation(function: RuleFunction, parameter: inspect.Parameter) -> Any:
    """What a parameter is annotated with; all are texts after `from __future__ import
    annotations`.
    """
    found = parameter.annotation
    if not isinstance(found, str):
        return found
    known = getattr(inspect.unwrap(function), "__globals__", {})
    alone = SimpleNamespace(__annotations__={parameter.name: found})
    try:
        return get_type_hints(alone, known, include_extras=True)[parameter.name]
    except Exception:  # a name for type checkers only, which is no range
        return found


def _check_reductions(
    who: str,
    reductions: Mapping[str, Reduction],
    columns: list[str],
    scalars: Mapping[str, Any],
) -> None:
    for name, reduction in reductions.items():
        for column in reduction.columns:
            if column in scalars:
                raise TypeError(
                    f"{who}: {name!r} is made of {column!r}, which is a keyword: a reduction sees "
                    f"columns only. Use {column} with the number that comes out, or write what is "
                    f"reduced as a column in a rule before."
                )
            if column not in columns:
                raise TypeError(
                    f"{who}: {name!r} is made of {column!r}, which is not among its required "
                    f"columns {columns}. {meant(column, columns)}Write it before the '*', "
                    f"without a default."
                )


def _check_slots(
    who: str,
    starts: Mapping[str, Slot],
    columns: list[str],
    optional: set[str],
    scalars: Mapping[str, Any],
) -> None:
    for slot, start in starts.items():
        if slot in scalars and slot not in (STEP, KEY, DTYPE):
            number = isinstance(start, (int, float)) and not isinstance(start, bool)
            if not number or scalars[slot] is not REQUIRED:
                raise TypeError(
                    f"{who}: {slot!r} is a keyword, so as a slot it is one number of the whole "
                    f"tree: it needs a first value that is a number, and no default; got {start!r}."
                )
            continue
        if slot not in columns or slot in FROM_CALLER or slot in optional:
            raise TypeError(
                f"{who}: slot {slot!r} must be one of its own required columns, which are "
                f"{columns}, or a keyword."
            )
        if not callable(start):
            raise TypeError(
                f"{who}: slot {slot!r} needs a function param -> first value, got {start!r}. "
                f"A number of the whole tree is a keyword: write it after the '*'."
            )
