"""The tensors in what callbacks remember, however deep they lie in containers and records."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from functional_sgd.outputs import with_fields, with_items


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in containers and records."""
    if isinstance(value, Tensor):
        # Sparse tensors lie in no one place, so there is nothing to compare.
        if value.layout is torch.strided:
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)
    elif _is_record(value):
        for entry in fields(value):
            yield from tensors_in(getattr(value, entry.name))


def with_tensors(value: Any, change: Callable[[Tensor, Any], Tensor], key: object = None) -> Any:
    """The same containers and records with `change(tensor, key)` in place of every tensor, where
    `key` is that of the innermost dict that it lies in.

    >>> with_tensors({"w": [torch.ones(1)], "n": 3}, lambda tensor, key: tensor * len(key))
    {'w': [tensor([1.])], 'n': 3}
    """
    if isinstance(value, Tensor):
        return change(value, key)
    if isinstance(value, Mapping):
        parts = {name: with_tensors(part, change, name) for name, part in value.items()}
        # What is no dict may share what it keeps with its copy, which would then change it.
        return with_items(value, parts) if isinstance(value, dict) else parts
    if isinstance(value, (list, tuple)):
        each = [with_tensors(part, change, key) for part in value]
        is_namedtuple = hasattr(value, "_fields")
        return type(value)(*each) if is_namedtuple else type(value)(each)
    if _is_record(value):
        changed: dict[str, object] = {}
        for entry in fields(value):
            changed[entry.name] = with_tensors(getattr(value, entry.name), change, key)
        return with_fields(value, changed)
    return value


def _is_record(value: object) -> bool:
    return is_dataclass(value) and not isinstance(value, type)
