"""The scalars of a kernel, by its names for them: numbers for a CPU, and for a GPU what needs no
waiting.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from functional_sgd.call import Leaves
from functional_sgd.fusion import device
from functional_sgd.fusion.group import Group
from functional_sgd.rule import COUNTER

Numbers = Mapping[str, Mapping[int, Tensor] | Tensor]
"""What leaves have been reduced to: a number by name and leaf, or a tensor with those of a whole
group.
"""


def rows(names: Sequence[str], leaves: Leaves, numbers: Numbers, group: Group) -> list[list[float]]:
    """A row of numbers for all leaves of a group, or one for each leaf."""
    if not (numbers or leaves.separate):
        return [[float(leaves.step if name == COUNTER else leaves.shared[name]) for name in names]]
    columns = [[float(value) for value in _values(name, leaves, numbers, group)] for name in names]
    if max(map(len, columns), default=1) == 1:
        return [[column[0] for column in columns]]
    whole = [column * len(group.indices) if len(column) == 1 else column for column in columns]
    return [list(row) for row in zip(*whole, strict=True)]


def on_device(
    names: Sequence[str], leaves: Leaves, numbers: Numbers, group: Group
) -> list[device.Hyper]:
    """For each scalar a number, or a tensor on the group's device, or an array of numbers, one for
    each leaf.
    """
    where = group.device

    def find(name: str) -> device.Hyper:
        known = numbers.get(name)
        if isinstance(known, Tensor):
            return known
        return _together(
            [_here(value, where) for value in _values(name, leaves, numbers, group)], where
        )

    return list(map(find, names))


def separate(
    names: Sequence[str], leaves: Leaves, numbers: Numbers, group: Group
) -> dict[str, list[float | Tensor]]:
    """For each scalar one value for all leaves, or one for each: numbers, or tensors on the group's
    GPU.
    """
    where = group.device
    if not device.treats(where):
        return {
            name: [float(value) for value in _values(name, leaves, numbers, group)]
            for name in names
        }
    return {
        name: [_here(value, where) for value in _values(name, leaves, numbers, group)]
        for name in names
    }


def _values(name: str, leaves: Leaves, numbers: Numbers, group: Group) -> list[Any]:
    """One value for all leaves, or one for each."""
    if name in numbers or name in leaves.separate:
        source = numbers[name] if name in numbers else leaves.separate[name]
        if isinstance(source, Tensor):
            return source.tolist() if source.device.type == "cpu" else list(source.unbind())
        values = [source[index] for index in group.indices]
        return values[:1] if all(value is values[0] for value in values) else values
    return [leaves.step if name == COUNTER else leaves.shared[name]]


def _here(value: Any, where: torch.device) -> float | Tensor:
    """A value that a kernel can read: a tensor where it is, if that is its device, else a number."""
    if not isinstance(value, Tensor) or (value.device.type == "cpu" and where.type != "cpu"):
        return float(value)
    here = value.to(where)
    return here if here.dtype in (torch.float64, torch.float32, torch.int64) else here.double()


def _together(values: Sequence[float | Tensor], where: torch.device) -> device.Hyper:
    if len(values) == 1:
        return values[0]
    if any(isinstance(value, Tensor) for value in values):
        return torch.stack([_tensor(value, where) for value in values])
    return np.array(values)


def _tensor(value: float | Tensor, where: torch.device) -> Tensor:
    return (
        value.double()
        if isinstance(value, Tensor)
        else torch.full((), value, dtype=torch.float64, device=where)
    )
