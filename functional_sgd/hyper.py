"""Hypers: numbers, 0-d tensors, or tree prefixes of them; checked, and handed to each leaf."""

import fnmatch
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from functional_sgd.errors import did_you_mean
from functional_sgd.precision import widest
from functional_sgd.ranges import Range, check_number
from functional_sgd.signature import REQUIRED
from functional_sgd.tree import Spec, Tree, flatten, paths, prefix_difference, unflatten

Scalar: TypeAlias = float | Tensor
Hyper: TypeAlias = Any
"""A Scalar, or a tree prefix of params with Scalars at its leaves."""

T = TypeVar("T")


def by_path(params: Tree, values: Mapping[str, Hyper]) -> Tree:
    """A value for every leaf, chosen by the leaf's name: `by_path(params, {"head.*": 1e-2, "*":
    1e-3})`.

    Names are dotted paths ("head.weight"), patterns are those of the shell (*, ?, [abc]); the first
    that matches wins. Returns a tree like params, to be used as a hyper. Raises ValueError when a
    leaf matches no pattern, or a pattern no leaf that an earlier one leaves, and TypeError for a
    module.

    >>> import torch
    >>> by_path({"body": torch.zeros(2), "head": torch.zeros(2)}, {"head*": 1e-2, "*": 1e-3})
    {'body': 0.001, 'head': 0.01}
    """
    if isinstance(params, torch.nn.Module):
        raise TypeError(
            f"by_path: expected a tree of tensors, got a module, {type(params).__name__}. Pass "
            f"dict(module.named_parameters()), or state.params."
        )
    names = paths(params)
    return unflatten(flatten(params)[1], first_matches("by_path", names, values))


def first_matches(
    who: str,
    names: Sequence[str],
    values: Mapping[str, T],
    fits: Callable[[str, str], bool] | None = None,
    hidden: bool = False,
) -> list[T]:
    """For each name the value of the first pattern that it fits (by `matches`, or another
    fits(name, pattern)).

    Raises ValueError when a name matches no pattern, or a pattern no name; and unless patterns may
    be `hidden`, when earlier ones with other values take all names of one. A "*" is for what is
    left, if anything.
    """
    fits = matches if fits is None else fits
    check_patterns(who, names, values, fits)
    chosen = []
    for name in names:
        first = next((pattern for pattern in values if fits(name, pattern)), None)
        if first is None:
            raise ValueError(
                f"{who}: no pattern matches leaf {name!r}. End with '*' to cover the rest."
            )
        chosen.append(first)
    for pattern, value in values.items():
        if pattern in chosen or pattern == "*" or hidden:
            continue
        taken = {first for name, first in zip(names, chosen, strict=True) if fits(name, pattern)}
        if any(values[first] is not value and values[first] != value for first in taken):
            raise ValueError(
                f"{who}: pattern {pattern!r} decides nothing, since the first match wins and "
                f"earlier patterns match all of its leaves. Put it before them."
            )
    return [values[pattern] for pattern in chosen]


def check_patterns(
    who: str, names: Sequence[str], patterns: Iterable[str], fits: Callable[[str, str], bool]
) -> None:
    """Raise ValueError if one of the patterns matches no name."""
    for pattern in patterns:
        if not any(fits(name, pattern) for name in names):
            raise ValueError(
                f"{who}: pattern {pattern!r} matches no leaf. Leaves: {', '.join(names)}."
            )


def matches(name: str, pattern: str) -> bool:
    """Whether a dotted path fits a pattern of the shell (*, ?, [abc]); compilers take the answer as
    it is.

    >>> matches("head.weight", "head.*")
    True
    """
    return fnmatch.fnmatchcase(name, pattern)


matches._dynamo_marked_constant = True  # type: ignore[attr-defined] # torch.compiler.assume_constant_result, unloaded


def collect(
    who: str,
    defaults: Mapping[str, object],
    hyper: Mapping[str, Hyper] | None,
    extras: Mapping[str, object],
    ranges: Mapping[str, tuple[Range, ...]] = MappingProxyType({}),
) -> dict[str, Any]:
    """The value of every hyper and extra for this call.

    Raises ValueError for a name that no rule reads, for one given twice, for one without a value,
    and for a number out of its range.
    """
    hyper = {} if hyper is None else hyper
    if not isinstance(hyper, Mapping):
        raise TypeError(
            f"{who}: hyper must be a dict such as dict(lr=0.1), got {type(hyper).__name__}."
        )
    for name in (*hyper, *extras):
        if name not in defaults:
            raise ValueError(f"{who}: no rule reads {name!r}. {did_you_mean(name, defaults)}")
        if name in hyper and name in extras:
            raise ValueError(
                f"{who}: {name!r} is given both in hyper and by keyword. Give it once."
            )
        value = hyper[name] if name in hyper else extras[name]
        # Text is checked too: if given by keyword, per_leaf would pass it on as an extra.
        if isinstance(value, (int, float, str)):
            for allowed in ranges.get(name, (None,)):
                check_number(who, name, value, allowed)
    values = {**defaults, **hyper, **extras}
    for name, value in values.items():
        if value is REQUIRED:
            raise ValueError(
                f"{who}: {name!r} has no default, so it must be passed: "
                f"opt(params, grads, state, dict({name}=...)) for a hyper, "
                f"opt(params, grads, state, {name}=...) for anything else."
            )
    return values


def with_hypers(hyper: Mapping[str, Hyper], new: Mapping[str, Hyper]) -> dict[str, Hyper]:
    """The hypers with new ones. A new `lr` is for all parts of a partition, so it replaces theirs.

    >>> with_hypers({"body.lr": 0.1, "head.lr": 0.5, "mom": 0.9}, {"lr": 0.3})
    {'mom': 0.9, 'lr': 0.3}
    """
    others = {name: value for name, value in hyper.items() if not is_replaced(name, new)}
    return {**others, **new}


def is_replaced(name: str, new: Container[str]) -> bool:
    """Whether a hyper is that of one part of a partition, and one for all parts is new.

    >>> is_replaced("body.norms.lr", ["body.lr"]), is_replaced("body.lr", ["body.norms.lr"])
    (True, False)
    """
    if name in new:
        return False
    *parts, last = name.split(".")
    for count in range(len(parts)):
        wider = ".".join((*parts[:count], last))
        if wider in new:
            return True
    return False


def per_leaf(
    who: str,
    values: Mapping[str, Any],
    given: Mapping[str, Hyper],
    params: Tree,
    spec: Spec,
    ranges: Mapping[str, tuple[Range, ...]] = MappingProxyType({}),
) -> tuple[dict[str, Any], dict[str, list[Scalar]]]:
    """(values that all leaves share, values that differ by leaf), ready for the rules.

    Numbers stay numbers; tensors become float64, so that scalar arithmetic is never the less
    precise part. `given` are those that the caller passed as hypers; of all others, what is no
    number is an extra, and handed over as it is.
    """
    shared: dict[str, Any] = {}
    separate: dict[str, list[Scalar]] = {}
    for name, value in values.items():
        if isinstance(value, (int, float)):
            shared[name] = value
        elif isinstance(value, Tensor) and (name in given or value.dim() == 0):
            # In `hyper` a tensor with axes is a mistake, which scalar names. By keyword it is an
            # extra.
            shared[name] = scalar(who, name, value)
        elif name not in given and not _is_tree_of_scalars(value):
            shared[name] = value
        elif is_tree(value):
            leaves = broadcast(who, name, value, params, spec)
            separate[name] = [scalar(who, name, leaf) for leaf in leaves]
            # A set, since a prefix repeats one number for many leaves.
            numbers = {leaf for leaf in separate[name] if not isinstance(leaf, Tensor)}
            for number in numbers:
                for allowed in ranges.get(name, ()):
                    check_number(who, name, number, allowed)
        else:
            shared[name] = scalar(who, name, value)
            # collect has not checked this number, which is of another library, such as NumPy.
            for allowed in ranges.get(name, ()):
                check_number(who, name, shared[name], allowed)
    return shared, separate


def broadcast(who: str, name: str, prefix: Tree, params: Tree, spec: Spec) -> list[Any]:
    """The value of a tree prefix for every leaf of params. Raises ValueError if it is not one."""
    leaves, prefix_spec = flatten(prefix)
    # Which leaves of params each part covers, by number: a dict and an OrderedDict have the same
    # keys in other orders.
    numbers = unflatten(spec, range(spec.num_leaves))
    try:
        parts = prefix_spec.flatten_up_to(numbers)
    except (ValueError, TypeError) as error:
        found = [key for key in prefix if has_wildcard(key)] if isinstance(prefix, dict) else []
        if found:
            raise ValueError(
                f"{who}: {name!r} must be a number or a tree of them, got patterns such as "
                f"{found[0]!r}. by_path(params, {prefix!r}) makes a tree of these."
            ) from error
        raise ValueError(
            f"{who}: {name!r} must be a number, a 0-d tensor, or a tree prefix of params, but "
            f"{prefix_difference(params, prefix)}. by_path(params, {{...}}) makes such a tree."
        ) from error
    values: list[Any] = [None] * spec.num_leaves
    covered = 0
    for leaf, part in zip(leaves, parts, strict=True):
        for number in flatten(part)[0]:
            values[number] = leaf
            covered += 1
    if covered != spec.num_leaves:
        raise ValueError(f"{who}: {name!r} covers {covered} of {spec.num_leaves} leaves of params.")
    return values


def is_tree(value: Any) -> bool:
    """Whether it has leaves of its own; registered pytree nodes do as well.

    >>> is_tree({"w": 0.1}), is_tree(0.1)
    (True, False)
    """
    if isinstance(value, (int, float, Tensor)):
        return False
    return isinstance(value, (dict, list, tuple)) or flatten(value)[0] != [value]


def _is_tree_of_scalars(value: Tree) -> bool:
    leaves = flatten(value)[0]
    if not is_tree(value) or not leaves:
        return False
    return all(map(_is_scalar, leaves))


def has_wildcard(key: object) -> bool:
    """Whether this is a pattern of the shell, and no name."""
    return isinstance(key, str) and any(sign in key for sign in "*?[")


def _is_scalar(leaf: object) -> bool:
    return isinstance(leaf, (int, float)) or (isinstance(leaf, Tensor) and leaf.dim() == 0)


def scalar(who: str, name: str, value: Any) -> Scalar:
    """A hyper as rules get it: a number as it is, a 0-d tensor as float64.

    Raises an error for anything else.
    """
    check_number(who, name, value)
    if isinstance(value, Tensor):
        if value.dtype == torch.bool:
            raise TypeError(f"{who}: hyper {name!r} must be a number, got a tensor of booleans.")
        if value.dim() != 0:
            raise ValueError(
                f"{who}: hyper {name!r} must be a number or a 0-d tensor, got a tensor of shape "
                f"{tuple(value.shape)}. "
                f"One value for each leaf is a tree (by_path); one for each member of an ensemble "
                f"is vmap's axis."
            )
        return value.to(widest(value.device))
    if isinstance(value, (int, float)):
        return value
    try:
        # NumPy's numbers have an item, like those of most libraries of arrays.
        number = value.item() if hasattr(value, "item") else float(value)
    except (TypeError, ValueError):
        cure = ""
        if callable(value):
            cure = (
                f" A schedule goes around the optimizer, scheduled(opt, steps=1000, {name}=...), "
                f"or into the loop, ParamScheduler(dict({name}=...)); values by name are "
                f"by_path(params, {{...}})."
            )
        raise TypeError(
            f"{who}: hyper {name!r} must be a number, a 0-d tensor or a tree prefix of them, "
            f"got {type(value).__name__}: {value!r}.{cure}"
        ) from None
    check_number(who, name, number)
    return float(number)
