"""What modules return: tensors in tuples, dicts, dataclasses and dicts of other classes."""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any

import optree
from torch import Tensor


def map_output(function: Callable[..., Any], first: Any, *others: Any) -> Any:
    """An output built like the first, with `function` of the leaves in the same places.

    Unlike in a tree of params, dataclasses and mappings of any class are taken apart, such as the
    ModelOutput of Hugging Face; None is a leaf.

    >>> map_output(lambda one, other: one + other, {"a": (1, 2)}, {"a": (3, 4)})
    {'a': (4, 6)}
    """
    if isinstance(first, (Tensor, int)):
        return function(first, *others)
    # Before dataclasses: a ModelOutput is both, and its values are its items.
    if isinstance(first, Mapping):
        parts = {}
        for key, value in first.items():
            beside = [other[key] for other in others]
            parts[key] = map_output(function, value, *beside)
        return with_items(first, parts)
    if is_dataclass(first) and not isinstance(first, type):
        parts = {}
        for name in [field.name for field in fields(first)]:
            beside = [getattr(other, name) for other in others]
            parts[name] = map_output(function, getattr(first, name), *beside)
        return with_fields(first, parts)
    if isinstance(first, (tuple, list)):
        items = [map_output(function, *each) for each in zip(first, *others, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    return optree.tree_map(function, first, *others, none_is_leaf=True)


def with_items(mapping: Any, parts: dict[Any, Any]) -> Any:
    """A mapping of the same class with these values; a dict, if there can be none."""
    if type(mapping) is dict:
        return parts
    made = copy(mapping)
    try:
        for key, value in parts.items():
            made[key] = value
    except TypeError:  # one that cannot be changed
        return parts
    return made


def with_fields(record: Any, parts: dict[str, Any]) -> Any:
    """A dataclass of the same class with these values."""
    made = copy(record)
    for name, value in parts.items():
        # object's own __setattr__ also works on frozen dataclasses.
        object.__setattr__(made, name, value)
    return made
