"""Where batches come from: two loaders, and the simplest loader there is."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from functional_sgd.notebook import html_table
from functional_sgd.tree import Tree
from loop.run.chance import key


class Position(NamedTuple):
    """Where a pass over the data begins."""

    seed: int
    epoch: int  # which pass it is
    skip: int  # how many batches to leave out at the beginning


Part: TypeAlias = tuple[int, int]
"""(k, n): the k-th of n parts of every batch, counted from 0."""

WHOLE: Part = (0, 1)
"""The one part that is all of it."""

_ORDER = 0  # what a random number is for; loader.py has the others


@dataclass(frozen=True, repr=False)
class DataLoaders:
    """The data of a Learner: a loader for training and, perhaps, one for validation.

    A loader is anything that can be iterated over again and again (what `make_loader` makes,
    Batches, or any torch DataLoader) and yields tuples (inputs..., targets...), or dicts (see
    Learner). If it has a len(), that many batches must come. If it has a method
    `set_position(seed, epoch, skip)`, that says which pass comes next, and how many batches to
    leave out; else what it draws from torch's global generator is a function of (seed, epoch) too,
    since the machine seeds that, and the batches to be left out are read and dropped.

    Raises TypeError for data that are no batches yet: tensors, or a data set of samples.
    """

    train: Iterable[Tree]
    valid: Iterable[Tree] | None = None

    def __post_init__(self) -> None:
        check_loader("DataLoaders: train", self.train)
        if self.valid is not None:
            check_loader("DataLoaders: valid", self.valid)

    def whole(self) -> "DataLoaders":
        """The same data in whole batches, where `parallel` cuts them."""
        return self

    def __repr__(self) -> str:
        return f"DataLoaders(train={loader_text(self.train)}, valid={loader_text(self.valid)})"

    def _repr_html_(self) -> str:
        """Both loaders, a row for each."""
        rows = [_loader_row("train", self.train), _loader_row("valid", self.valid)]
        return html_table(rows, ("", "loader", "samples", "batches"), left=2)


@dataclass(frozen=True, eq=False, repr=False)
class Batches:
    """Tensors that fit in memory, in batches: the first axis is cut, in order or shuffled again for
    every epoch. Arrays of numpy become tensors, which share their memory.

    The last batch is as large as what is left, unless `drop_last`. The order of a pass is a
    function of (seed, epoch) where `set_position` has said which pass it is; else it is drawn from
    torch's global generator. With `part=(k, n)` it is the k-th of n parts of every batch, counted
    from 0. Raises TypeError for what is no tuple of tensors, ValueError if the tensors are not
    equally long, batch_size is below 1, or there is no such part.

    >>> x = torch.arange(5)
    >>> [batch[0].tolist() for batch in Batches((x, x), batch_size=2)]
    [[0, 1], [2, 3], [4]]
    """

    tensors: tuple[Tensor, ...]
    batch_size: int = 64
    shuffle: bool = False
    drop_last: bool = False
    part: Part = WHOLE

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", _as_tensors(self.tensors))
        lengths = [len(tensor) for tensor in self.tensors]
        if len(set(lengths)) != 1:
            raise ValueError(
                f"Batches: tensors must be equally long, got {lengths}. Cut them to one length."
            )
        check_batch_size("Batches", self.batch_size)
        check_part("Batches", self.part)
        # A position is for one pass and not part of what the loader is, so it is no field.
        object.__setattr__(self, "_position", None)

    def set_position(self, seed: int, epoch: int, skip: int = 0) -> None:
        """Let the next pass be that of (seed, epoch), from batch `skip` on."""
        object.__setattr__(self, "_position", Position(seed, epoch, skip))

    def __len__(self) -> int:
        return batch_count(len(self.tensors[0]), self.batch_size, self.drop_last)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        # Not a generator: order and position are taken now, not when the first batch is read.
        position: Position | None = self.__dict__["_position"]
        object.__setattr__(self, "_position", None)
        order, count = None, len(self.tensors[0])
        if self.shuffle:
            if position is None:
                order = torch.randperm(count)
            else:
                order = shuffled(count, position.seed, position.epoch)
            # Drawn on the CPU, so that the order is the same wherever the tensors are.
            order = order.to(self.tensors[0].device)
        skip = 0 if position is None else position.skip
        return self._batches(order, skip)

    def __repr__(self) -> str:
        parts = ", ".join(f"{_dtype(tensor)} {_shape(tensor)}" for tensor in self.tensors)
        options = ""
        if self.shuffle:
            options += ", shuffle=True"
        if self.drop_last:
            options += ", drop_last=True"
        if self.part != WHOLE:
            options += f", part={self.part}"
        return f"Batches(({parts}), batch_size={self.batch_size}{options})"

    def _repr_html_(self) -> str:
        """The tensors, a row for each."""
        rows = [_tensor_row(index, tensor) for index, tensor in enumerate(self.tensors)]
        order = "shuffled" if self.shuffle else "in order"
        caption = f"Batches: {len(self)} of {self.batch_size}, {order}"
        return html_table(rows, ("tensor", "shape", "dtype", "device"), caption=caption)

    def _batches(self, order: Tensor | None, skip: int) -> Iterator[tuple[Tensor, ...]]:
        count = len(self.tensors[0])
        for index in range(skip, len(self)):
            place = batch_slice(index, count, self.batch_size, self.part)
            if order is None:
                # Views: where a model writes to its inputs, the machine gives it copies.
                yield tuple([tensor[place] for tensor in self.tensors])
            else:
                chosen = order[place]
                yield tuple([tensor.index_select(0, chosen) for tensor in self.tensors])


def check_loader(who: str, loader: object) -> None:
    """Raise TypeError, on behalf of `who`, for data whose entries are samples, or all samples."""
    what = type(loader).__name__
    if isinstance(loader, (Tensor, np.ndarray)):
        raise TypeError(
            f"{who} must be a loader, which yields batches, got {what}, which yields its rows. "
            f"Pass Batches((x, y), batch_size=64), or [x] if it is one batch."
        )
    # A list of tensors is one of batches without targets, and so may a tuple of one be.
    parts = loader if isinstance(loader, tuple) else ()
    if len(parts) > 1 and all(isinstance(part, (Tensor, np.ndarray)) for part in parts):
        raise TypeError(
            f"{who} must be a loader, which yields batches, got a tuple of {len(parts)} tensors, "
            f"each of which would be a batch. Pass Batches((x, y), batch_size=64), or [(x, y)] if "
            f"it is one batch."
        )
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise TypeError(
            f"{who} must be a loader, which yields batches, got {what}, which yields samples. Pass "
            f"make_loader(dataset, batch_size=64), or torch's DataLoader(dataset, "
            f"batch_size=None) if these are batches."
        )


def _as_tensors(given: object) -> tuple[Tensor, ...]:
    """What Batches are of. Raises TypeError for anything but tensors and arrays, in a tuple."""
    if not isinstance(given, (tuple, list)):
        raise TypeError(
            f"Batches: tensors must be a tuple of tensors, got {type(given).__name__}. Put them in "
            f"one: Batches((x, y), batch_size=64)."
        )
    tensors: list[Tensor] = []
    for one in given:
        if isinstance(one, np.ndarray):
            tensors.append(torch.as_tensor(one))
        elif isinstance(one, Tensor):
            tensors.append(one)
        else:
            raise TypeError(
                f"Batches: tensors must be tensors or numpy arrays, got {type(one).__name__}. "
                f"Convert it: torch.as_tensor(...)."
            )
    return tuple(tensors)


def loader_text(loader: object) -> str:
    """A loader in a few words, without its tensors: what Batches say, else the class and length.

    >>> loader_text([torch.zeros(5)])
    'list of 1 batch'
    """
    if loader is None or isinstance(loader, Batches):
        return repr(loader)
    name, count = type(loader).__name__, _length(loader)
    if count is None:
        return name
    batches = "batch" if count == 1 else "batches"
    return f"{name} of {count} {batches}"


def _loader_row(name: str, loader: object) -> tuple[str, str, str, str]:
    """A row of the table of DataLoaders: name, loader, samples and batches."""
    if loader is None:
        return name, "-", "", ""
    samples: object
    if isinstance(loader, Batches):
        shown, samples = repr(loader), loader.tensors[0]
    else:
        shown, samples = type(loader).__name__, getattr(loader, "dataset", None)
    return name, shown, _count(samples), _count(loader)


def _tensor_row(index: int, tensor: Tensor) -> tuple[str, str, str, str]:
    """A row of the table of Batches: number, shape, dtype and device."""
    return f"{index}", _shape(tensor), _dtype(tensor), f"{tensor.device}"


def _count(value: object) -> str:
    length = _length(value)
    return "-" if length is None else f"{length:,}"


def _length(value: Any) -> int | None:
    with suppress(Exception):  # of a user's class, which is no reason not to show the rest
        return len(value)
    return None


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def shuffled(count: int, seed: int, epoch: int) -> Tensor:
    """The numbers below `count` in the order of (seed, epoch), the same for every loader of this
    library.

    >>> sorted(shuffled(4, seed=0, epoch=0).tolist())
    [0, 1, 2, 3]
    """
    return torch.randperm(count, generator=torch.Generator().manual_seed(key(seed, epoch, _ORDER)))


def batch_count(count: int, batch_size: int, drop_last: bool) -> int:
    """How many batches so many samples give.

    >>> batch_count(10, 3, drop_last=False), batch_count(10, 3, drop_last=True)
    (4, 3)
    """
    return count // batch_size if drop_last else -(-count // batch_size)


def batch_slice(index: int, count: int, batch_size: int, part: Part = WHOLE) -> slice:
    """Which of `count` samples the batch has; or a part of it: parts differ by one sample at most.

    >>> batch_slice(1, 10, 4), [batch_slice(1, 10, 4, part=(k, 3)) for k in range(3)]
    (slice(4, 8, None), [slice(4, 5, None), slice(5, 6, None), slice(6, 8, None)])
    """
    begin, (which, parts) = index * batch_size, part
    size = min(begin + batch_size, count) - begin
    return slice(begin + size * which // parts, begin + size * (which + 1) // parts)


def check_part(what: str, part: Part) -> None:
    """Raise ValueError if there is no such part of a batch."""
    which, parts = part
    if not 0 <= which < parts:
        raise ValueError(
            f"{what}: part must be (k, n) with 0 <= k < n, the k-th of n parts, got {part!r}."
        )


def check_batch_size(what: str, batch_size: int) -> None:
    """Raise ValueError if there cannot be such batches."""
    if batch_size < 1:
        raise ValueError(f"{what}: batch_size must be at least 1, got {batch_size}.")


def one_batch(source: Any) -> Tree:
    """The first batch of a loader, or of the training data of a Learner or DataLoaders: to look at.

    Raises ValueError if there is none.

    >>> one_batch(Batches((torch.arange(5),), batch_size=2))
    (tensor([0, 1]),)
    """
    for batch in _loader_in(source):
        return batch
    raise ValueError("one_batch: the loader is empty. Check the data set, or drop_last.")


def _loader_in(source: Any) -> Iterable[Tree]:
    """The loader itself; that of the training data of a Learner or DataLoaders."""
    data = getattr(source, "data", source)
    loader: Iterable[Tree] = data.train if isinstance(data, DataLoaders) else source
    return loader


def class_count(source: Any) -> int:
    """How many classes the targets have: the largest of them in one pass over the loader, plus 1.

    `source` is what one_batch takes; targets are the last part of a batch, or its "labels". Raises
    ValueError if they are no integers, or there are none.

    >>> x = torch.zeros(2, 8)
    >>> class_count([(x, torch.tensor([0, 4])), (x[:1], torch.tensor([3]))])
    5
    """
    largest = -1
    for batch in _loader_in(source):
        target = batch.get("labels") if isinstance(batch, Mapping) else batch[-1]
        if not isinstance(target, Tensor) or target.is_floating_point() or target.is_complex():
            found = str(target.dtype) if isinstance(target, Tensor) else type(target).__name__
            raise ValueError(f"class_count: targets must be tensors of classes, got {found}.")
        largest = max(largest, int(target.max()))
    if largest < 0:
        raise ValueError("class_count: there is no target that is 0 or more. Check the data set.")
    return largest + 1
