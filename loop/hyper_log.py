"""The log of a hyper that may be a tree, such as a learning rate for every parameter."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optree

from functional_sgd.hyper import Hyper, Scalar
from functional_sgd.tree import Tree
from loop.disk.encoding import storable
from loop.history import Log


@storable
@dataclass(frozen=True, eq=False)
class Stretch:
    """Batches in which the same leaves had equal values: their groups, and a log for each group.

    Layer groups have one learning rate each, so three logs say what a hundred leaves had. Written
    out, leaf by leaf, they were most of a checkpoint.
    """

    group_of: Tree  # built like the hyper, of the numbers of the groups
    logs: tuple[Log, ...]

    def __len__(self) -> int:
        return len(self.logs[0])

    def at(self, index: int) -> Hyper:
        """The hyper of one batch."""
        return optree.tree_map(lambda group: self.logs[group][index], self.group_of)

    def grown(self, value: Hyper) -> "Stretch | None":
        """The stretch with one more batch; None if the value does not fit into its groups."""
        leaves, spec = optree.tree_flatten(value, none_is_leaf=True)
        groups, known = optree.tree_flatten(self.group_of, none_is_leaf=True)
        if spec != known:
            return None
        of_group = dict(zip(groups, leaves, strict=True))
        for group, leaf in zip(groups, leaves, strict=True):
            if not _equal(of_group[group], leaf):
                return None
        logs = tuple(log.append(of_group[group]) for group, log in enumerate(self.logs))
        return Stretch(self.group_of, logs)


@storable
@dataclass(frozen=True, eq=False)
class HyperLog(Sequence[Hyper]):
    """An immutable sequence of trees, or of numbers and trees; `append` returns a new one.

    >>> log = HyperLog().append({"body": 0.1, "head": 0.2}).append({"body": 0.3, "head": 0.3})
    >>> list(log), len(log.stretches)
    ([{'body': 0.1, 'head': 0.2}, {'body': 0.3, 'head': 0.3}], 1)
    """

    stretches: tuple[Stretch, ...] = ()

    def append(self, value: Hyper) -> "HyperLog":
        """A log with one more item at the end."""
        if self.stretches:
            grown = self.stretches[-1].grown(value)
            if grown is not None:
                return HyperLog((*self.stretches[:-1], grown))
        return HyperLog((*self.stretches, _begun(value)))

    def __len__(self) -> int:
        return sum(map(len, self.stretches))

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return list(self)[index]
        place = index + len(self) if index < 0 else index
        for stretch in self.stretches:
            if 0 <= place < len(stretch):
                return stretch.at(place)
            place -= len(stretch)
        raise IndexError(f"HyperLog: index {index} is out of range for {len(self)} items.")

    def __iter__(self) -> Iterator[Hyper]:
        for stretch in self.stretches:
            yield from map(stretch.at, range(len(stretch)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def appended(log: Sequence[Hyper] | None, value: Hyper) -> Log | HyperLog:
    """The log of a hyper with one more value: a plain one for as long as no value is a tree.

    >>> appended(appended(None, 0.1), {"weight": 0.2})[:]
    [0.1, {'weight': 0.2}]
    """
    if type(log) is Log and type(value) is float:  # nearly always; the rest takes as long again
        return log.append(value)
    if isinstance(log, HyperLog):
        return log.append(value)
    before = Log() if log is None else log
    assert isinstance(before, Log)
    if optree.tree_is_leaf(value, none_is_leaf=True):
        return before.append(value)
    # To a Stretch, a number is a tree of one leaf.
    stretches = (Stretch(0, (before,)),) if before else ()
    return HyperLog(stretches).append(value)


def logged(
    logs: Mapping[str, Sequence[Hyper]], hyper: Mapping[str, Hyper], count: int
) -> dict[str, Log | HyperLog]:
    """The logs of hypers with one more batch, after `count` of them: None where it has no such
    hyper, or had none.

    >>> logged({"lr": Log([0.1, 0.2])}, {"mom": 0.9}, 2)
    {'lr': Log([0.1, 0.2, None]), 'mom': Log([None, None, 0.9])}
    """
    if hyper.keys() == logs.keys():  # in nearly every batch, so that none is too short
        return {name: appended(logs[name], value) for name, value in hyper.items()}
    grown = {}
    for name in dict.fromkeys((*logs, *hyper)):
        before = _as_long(logs.get(name, Log()), count)
        grown[name] = appended(before, hyper.get(name))
    return grown


def _as_long(log: Sequence[Hyper], count: int) -> Sequence[Hyper]:
    """A log of so many batches; what is missing is missing in front."""
    missing = count - len(log)
    if missing <= 0:
        return log
    return Log([None] * missing + list(log))


def _begun(value: Hyper) -> Stretch:
    """A stretch of one batch: leaves with equal values are a group."""
    leaves, spec = optree.tree_flatten(value, none_is_leaf=True)
    firsts: list[Scalar | None] = []
    groups: list[int] = []
    place_of: dict[object, int] = {}
    for leaf in leaves:
        # Tensors are told apart by identity: to look at their values would wait for the device.
        # Numbers by type too: 1 and 1.0 are equal, and each is to come back as it was.
        own = leaf if isinstance(leaf, (int, float)) else id(leaf)
        key = (type(leaf), own)
        if key not in place_of:
            place_of[key] = len(firsts)
            firsts.append(leaf)
        groups.append(place_of[key])
    logs = tuple(Log().append(leaf) for leaf in firsts)
    return Stretch(optree.tree_unflatten(spec, groups), logs)


def _equal(one: object, other: object) -> bool:
    if one is other:
        return True
    # Tensors that are not the same object are not compared: that would wait for the device.
    return isinstance(one, (int, float)) and type(one) is type(other) and one == other
