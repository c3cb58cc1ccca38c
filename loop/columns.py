"""Long sequences in little memory: runs of values that are alike, kept as arrays."""

from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, repeat
from typing import Any, Self, TypeAlias

import optree
import torch
from torch import Tensor

from functional_sgd.tree import Tree

Kind: TypeAlias = object
"""What values that can be in one run have in common: kinds are compared, and nothing else."""

_FEWEST = 8  # numbers that are worth an array


class Run(ABC):
    """Values that are alike, in order; what comes out equals what went in, in type and value."""

    __slots__ = ()

    @property
    @abstractmethod
    def kind(self) -> Kind:
        """Runs of one kind can be joined."""

    @abstractmethod
    def join(self, others: Sequence[Self]) -> Self:
        """This one and others of its kind as one."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> object: ...

    @abstractmethod
    def __iter__(self) -> Iterator[object]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Items(Run):
    """Anything, as it is."""

    values: tuple[object, ...]

    @property
    def kind(self) -> Kind:
        """One for all."""
        return Items

    def join(self, others: Sequence["Items"]) -> "Items":
        """One tuple."""
        values = list(self.values)
        for other in others:
            values += other.values
        return Items(tuple(values))

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> object:
        return self.values[index]

    def __iter__(self) -> Iterator[object]:
        return iter(self.values)


@dataclass(frozen=True, slots=True, eq=False)
class Numbers(Run):
    """Floats (an array of "d") or whole numbers of 64 bits ("q"): 8 bytes each."""

    values: "array[float]"

    @property
    def kind(self) -> Kind:
        """Floats or whole numbers."""
        return self.values.typecode

    def join(self, others: Sequence["Numbers"]) -> "Numbers":
        """One array."""
        # A copy, since other logs see this run without the others.
        values = self.values[:]
        for other in others:
            values.extend(other.values)
        return Numbers(values)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> float:
        return self.values[index]

    def __iter__(self) -> Iterator[float]:
        return iter(self.values)


@dataclass(frozen=True, slots=True, eq=False)
class Scalars(Run):
    """0-d tensors as one of a dimension more: 4 bytes each, where one alone takes 600."""

    values: Tensor

    @property
    def kind(self) -> Kind:
        """The dtype, and the device."""
        return self.values.dtype, self.values.device

    def join(self, others: Sequence["Scalars"]) -> "Scalars":
        """One tensor, on the same device: nothing waits for it."""
        return Scalars(torch.cat([self.values, *(other.values for other in others)]))

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Tensor:
        return self.values[index]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.values.unbind())


@dataclass(frozen=True, slots=True, eq=False)
class Repeated(Run):
    """One object again and again, such as a hyper that nothing changes: it takes no room."""

    value: object
    count: int

    @property
    def kind(self) -> Kind:
        """The very object."""
        # Runs that are compared hold their objects, so no number is used twice meanwhile.
        return Repeated, id(self.value)

    def join(self, others: Sequence["Repeated"]) -> "Repeated":
        """The same object, more often."""
        return Repeated(self.value, self.count + sum(map(len, others)))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> object:
        return self.value

    def __iter__(self) -> Iterator[object]:
        return repeat(self.value, self.count)


@dataclass(frozen=True, slots=True, eq=False)
class Trees(Run):
    """Dicts, lists and tuples of floats, all of one structure: 8 bytes for each leaf."""

    structure: optree.PyTreeSpec
    columns: tuple[Run, ...]

    @property
    def kind(self) -> Kind:
        """The structure, and what its leaves are kept as."""
        return self.structure, tuple(column.kind for column in self.columns)

    def join(self, others: Sequence["Trees"]) -> "Trees":
        """Column by column."""
        joint = []
        for at, column in enumerate(self.columns):
            rest = [other.columns[at] for other in others]
            joint.append(column.join(rest))
        return Trees(self.structure, tuple(joint))

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, index: int) -> Tree:
        return self._tree([column[index] for column in self.columns])

    def __iter__(self) -> Iterator[Tree]:
        return map(self._tree, zip(*self.columns, strict=True))

    def _tree(self, leaves: Iterable[object]) -> Tree:
        return optree.tree_unflatten(self.structure, leaves)


def packed(items: Sequence[object]) -> list[Run]:
    """The items in runs of what is alike.

    >>> [type(run).__name__ for run in packed(["a", *(0.1 * n for n in range(9))])]
    ['Items', 'Numbers']
    """
    runs = []
    for kind, group in groupby(_with_kinds(items), lambda pair: pair[0]):
        alike = [item for _, item in group]
        runs.append(_run(kind, alike))
    return joined(runs)


def joined(runs: Iterable[Run]) -> list[Run]:
    """The same values in as few runs as can be."""
    done = []
    for _, group in groupby(runs, lambda run: run.kind):
        first, *others = group
        whole = first.join(others) if others else first
        done.append(whole)
    return done


def _with_kinds(items: Sequence[object]) -> Iterator[tuple[Kind, object]]:
    """Each item with its kind, which is found out once where the same comes again and again."""
    previous, kind = None, None
    for item in items:
        if item is not previous:
            previous, kind = item, _kind(item)
        yield kind, item


def _kind(item: Any) -> Kind:
    """The code of an array for a number, a tuple for a 0-d tensor or a tree, None for the rest."""
    cls = type(item)
    # By exact type: isinstance takes True for an int, and it would come back as 1.
    if cls is float:
        return "d"
    if cls is int and -(2**63) <= item < 2**63:
        return "q"
    if cls is Tensor and _is_scalar(item):
        return Scalars, item.dtype, item.device
    if cls in (dict, list, tuple):
        leaves, structure = optree.tree_flatten(item)
        # Without a leaf there is no column to tell how many trees there are.
        if leaves and all(type(leaf) is float for leaf in leaves):
            return Trees, structure
    return None


def _run(kind: Kind, items: list[Any]) -> Run:
    name = kind[0] if isinstance(kind, tuple) else kind
    # Before the number of items is asked for: at 600 bytes a tensor, two are worth it.
    if name is Scalars:
        with torch.no_grad():
            return Scalars(torch.stack(items))
    if len(items) < _FEWEST:
        return Items(tuple(items))
    if all(item is items[0] for item in items):
        return Repeated(items[0], len(items))
    if name is Trees:
        return _trees(items)
    if isinstance(name, str):
        return Numbers(array(name, items))
    return Items(tuple(items))


def _trees(items: Sequence[Tree]) -> Trees:
    """Trees of one structure, column by column."""
    structure = optree.tree_structure(items[0])
    rows = map(optree.tree_leaves, items)
    columns = [Numbers(array("d", column)) for column in zip(*rows, strict=True)]
    return Trees(structure, tuple(columns))


def _is_scalar(tensor: Tensor) -> bool:
    """Whether it can be stacked with others: 0-d, dense, not tracked, of no transform's level."""
    return (
        tensor.dim() == 0
        and not tensor.requires_grad
        and tensor.layout == torch.strided
        and tensor.device.type != "meta"
        and not tensor.is_quantized
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )
