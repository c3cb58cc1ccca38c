"""Loaders of which every rank reads its part."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple

import optree
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from functional_sgd.outputs import with_fields
from functional_sgd.tree import Tree
from loop.data.batches import WHOLE, Batches, DataLoaders, batch_slice
from loop.data.loader import EpochLoader, EpochSampler
from loop.data.prefetch import Prefetch
from loop.data.samples import one_each, plain
from loop.remembered import tensors_in


class Cut:
    """A loader whose batch k is one of so many parts of batch k of another: parts differ by one
    sample at most, and one may be empty.

    Of Batches and of what `make_loader` makes, only the samples of the part are read; the batches
    of any other loader are read whole, and cut: every tensor as long as the first, and every list
    or tuple of that length with no tensor in it, such as the names that torch's collate makes.
    All other attributes are the loader's.

    >>> import torch
    >>> [batch.tolist() for batch in Cut([torch.arange(5), torch.arange(2)], 1, 2)]
    [[2, 3, 4], [1]]
    """

    def __init__(self, loader: Iterable[Tree], which: int, parts: int) -> None:
        _check_uncut(loader)
        self.whole: Any = loader
        self.which, self.parts = which, parts
        own = _reading_part(loader, which, parts)
        self.loader: Any = loader if own is None else own
        self.cuts = own is None  # batches that have been read
        self.lengths: dict[int, int] = {}  # of batches that were read whole
        self.skip = 0

    def __len__(self) -> int:
        return len(self.loader)  # a TypeError, if it has none, is right

    def __getattr__(self, name: str) -> Any:
        # copy and pickle ask an object without attributes: to look for `whole` would never end.
        if name.startswith("__") or name in ("loader", "whole"):
            raise AttributeError(name)
        # Asked before the name is looked at: without set_position there, there is none here.
        found = getattr(self.whole, name)
        return self._set_position if name == "set_position" else found

    def __iter__(self) -> Iterator[Tree]:
        if not self.cuts:
            return iter(self.loader)
        # A position holds for one pass.
        begin, self.skip = self.skip, 0
        self.lengths = {}
        return self._pieces(begin)

    def length(self, index: int) -> int:
        """How many samples the whole batch has; of one that is cut when it is read, when it is."""
        if index in self.lengths:
            return self.lengths[index]
        sizes = _sizes(self.whole)
        return min(sizes.batch, sizes.samples - index * sizes.batch)

    def length_of_part(self, length: int) -> int:
        """How many of so many samples are in this part."""
        place = self._place(length)
        return int(place.stop - place.start)

    def _place(self, length: int) -> slice:
        return batch_slice(0, length, length, (self.which, self.parts))

    def _set_position(self, seed: int, epoch: int, skip: int = 0) -> None:
        self.skip = skip
        self.loader.set_position(seed, epoch, skip)

    def _pieces(self, begin: int) -> Iterator[Tree]:
        for index, batch in enumerate(self.loader, begin):
            length = _length(batch)
            self.lengths[index] = length
            yield _piece(batch, self._place(length), length)


@dataclass(frozen=True, repr=False)
class Cuts(DataLoaders):
    """The data of a rank: every loader is cut, also one that takes the place of another."""

    which: int = 0
    parts: int = 1
    members: frozenset[int] = frozenset()  # the processes that have the parts, by their numbers

    def __post_init__(self) -> None:
        super().__post_init__()
        # dataclasses.replace comes here again, with loaders that are cut already.
        for name in ("train", "valid"):
            loader = getattr(self, name)
            if loader is not None and not isinstance(loader, Cut):
                object.__setattr__(self, name, Cut(loader, self.which, self.parts))

    def whole(self) -> DataLoaders:
        """The loaders that are cut."""
        train, valid = _whole(self.train), _whole(self.valid)
        assert train is not None, "DataLoaders has checked it"
        return DataLoaders(train, valid)


def _whole(loader: Iterable[Tree] | None) -> Iterable[Tree] | None:
    whole: Iterable[Tree] | None = loader.whole if isinstance(loader, Cut) else loader
    return whole


def _reading_part(loader: object, which: int, parts: int) -> Iterable[Tree] | None:
    """A loader that reads no more than the part; None where there is no such."""
    if isinstance(loader, Batches):
        return replace(loader, part=(which, parts))
    if isinstance(loader, EpochLoader) and isinstance(loader.plan, EpochSampler):
        return loader.part(which, parts)
    if isinstance(loader, Prefetch):
        inner = _reading_part(loader.loader, which, parts)
        return None if inner is None else Prefetch(inner, loader.device)
    return None


class _Sizes(NamedTuple):
    """How much data a loader has, whole."""

    samples: int  # in a pass
    batch: int  # samples in a batch; the last may have fewer


def _sizes(loader: Any) -> _Sizes:
    """Those of a loader that can read a part."""
    if isinstance(loader, Prefetch):
        return _sizes(loader.loader)
    if isinstance(loader, Batches):
        return _Sizes(len(loader.tensors[0]), loader.batch_size)
    plan: EpochSampler = loader.plan
    return _Sizes(plan.size, plan.batch_size)


def _check_uncut(loader: object) -> None:
    sampler = getattr(loader, "sampler", None)
    if getattr(sampler, "num_replicas", 1) > 1:
        raise ValueError(
            f"parallel: the loader has a {type(sampler).__name__}, which cuts the data already. "
            f"Give parallel a loader of all data: it cuts every batch itself."
        )
    if isinstance(loader, Batches) and loader.part != WHOLE:
        raise ValueError(
            f"parallel: {loader!r} is a part already. Give parallel the Batches of all data."
        )


def _length(batch: Tree) -> int:
    """How many samples a batch has: as many as its first tensor is long."""
    for leaf in optree.tree_leaves(plain(batch)):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return len(leaf)
    for inner in tensors_in(batch):
        if inner.dim():
            return len(inner)
    raise ValueError(
        "parallel: the batch has no tensor, so it cannot be cut. Give it a collate function that "
        "makes tensors."
    )


def _piece(batch: Tree, place: slice, length: int) -> Tree:
    if isinstance(batch, Tensor):
        of_samples = batch.dim() > 0 and len(batch) == length
        return batch[place] if of_samples else batch
    if isinstance(batch, Mapping):
        return {name: _part(one, place, length) for name, one in batch.items()}
    if isinstance(batch, PackedSequence):
        raise TypeError(
            "parallel: expected batches of samples, got a PackedSequence, in which those of a "
            "batch are mixed, so it cannot be cut. Let the loader pad (pad_sequence), give the "
            "lengths as a tensor of the batch, and pack in the model's forward."
        )
    if isinstance(batch, (tuple, list)):
        pieces = [_part(one, place, length) for one in batch]
        if hasattr(batch, "_fields"):  # a namedtuple, which takes its fields one by one
            return type(batch)(*pieces)
        return type(batch)(pieces)
    if is_dataclass(batch) and not isinstance(batch, type):
        named = {one.name: getattr(batch, one.name) for one in fields(batch)}
        return with_fields(batch, _piece(named, place, length))
    return batch


def _part(one: Tree, place: slice, length: int) -> Tree:
    """The piece of one entry of a batch."""
    if one_each(one, length):
        return one[place]
    return _piece(one, place, length)
