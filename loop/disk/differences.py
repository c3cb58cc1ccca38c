"""Where two states differ: whether a run that was stopped, forked or moved is the same, bit for
bit.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from functional_sgd.sharded import distributed
from loop.disk.files import digest_of, plainly, saved_fields, shaped
from loop.history import Log
from loop.state import State


def differences(one: State, other: State) -> dict[str, str]:
    """Where two states differ, and how; nothing if they are the same, bit for bit.

    Compared is what a checkpoint keeps: params, buffers, the optimizer's state, hypers, counters,
    the history, and what callbacks remember; but not on which devices tensors are. Raises TypeError
    for states in pieces, which `unshard` joins.

    >>> from loop import State
    >>> state = State({"w": torch.tensor([1.0, 2.0])}, {}, {}, {"lr": 0.1})
    >>> differences(state, state.replace(params={"w": torch.tensor([1.0, 2.5])}, epoch=3))
    {"params['w']": '1 of 2 elements, by 0.5 at most', 'epoch': '0 and 3'}
    >>> differences(state, state)
    {}
    """
    found: dict[str, str] = {}
    for name in saved_fields():
        found.update(_between(name, getattr(one, name), getattr(other, name)))
    return found


def _between(where: str, one: Any, other: Any) -> Iterator[tuple[str, str]]:
    """The differences within two values, each with its place."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        how = _of_tensors(where, one, other)
        if how:
            yield where, how
    elif type(one) is not type(other):
        yield where, f"{_shown(one)} and {_shown(other)}"
    elif isinstance(one, Log):
        yield from _of_logs(where, one, other)
    elif _is_container(one):
        mine, theirs = _parts(where, one), _parts(where, other)
        for place in dict.fromkeys((*mine, *theirs)):
            if place not in theirs:
                yield place, "only in the first"
            elif place not in mine:
                yield place, "only in the second"
            else:
                yield from _between(place, mine[place], theirs[place])
    elif not (one == other or (one != one and other != other)):  # NaN is like NaN
        yield where, f"{_shown(one)} and {_shown(other)}"


def _of_tensors(where: str, one: Tensor, other: Tensor) -> str:
    """How two tensors differ, if they do."""
    if distributed(one) or distributed(other):
        raise TypeError(
            f"differences: {where} is in pieces (a DTensor), of which this process has one. "
            f"Compare unshard(state), which is called on all ranks."
        )
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return f"{shaped(one.dtype, one.shape)} and {shaped(other.dtype, other.shape)}"
    count, pairs = one.numel(), one.is_complex()
    one, other = plainly(one.detach()), plainly(other.detach())
    if digest_of(one) == digest_of(other):
        return ""
    differing = (one != other) & ~(one.isnan() & other.isnan())
    if not differing.any():
        return "in bits alone: zeros of another sign, or another kind of NaN"
    far = (one.double() - other.double()).abs()
    if pairs:  # two numbers are one element
        far, differing = torch.hypot(*far.unbind(-1)), differing.any(-1)
    most = float(far[differing].max())
    return f"{int(differing.sum())} of {count} elements, by {most:.3g} at most"


def _of_logs(where: str, one: Log, other: Log) -> Iterator[tuple[str, str]]:
    """The differences of two columns of the history, in a line: they may have thousands."""
    said: list[str] = []
    if len(one) != len(other):
        said.append(f"{len(one)} and {len(other)} entries")
    found: list[int] = []
    for place, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if any(_between("", mine, theirs)):
            found.append(place)
    if found:
        first = found[0]
        shown = f"{_shown(one[first])} and {_shown(other[first])}"
        said.append(f"different in {len(found)}, first in number {first}: {shown}")
    if said:
        yield where, "; ".join(said)


def _is_container(value: object) -> bool:
    return isinstance(value, (Mapping, tuple, list)) or is_dataclass(value)


def _parts(where: str, value: Any) -> dict[str, Any]:
    """What is in a container, by its place."""
    if isinstance(value, Mapping):
        return {f"{where}[{key!r}]": part for key, part in value.items()}
    if isinstance(value, Sequence):
        return {f"{where}[{place}]": part for place, part in enumerate(value)}
    return {f"{where}.{entry.name}": getattr(value, entry.name) for entry in fields(value)}


def _shown(value: object, most: int = 60) -> str:
    """A value in a few characters."""
    text = shaped(value.dtype, value.shape) if isinstance(value, Tensor) else repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
