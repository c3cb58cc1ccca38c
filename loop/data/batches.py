"""Where batches come from: two loaders, and the simplest loader there is."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from loop.run.chance import key

Position: TypeAlias = tuple[int, int, int]
"""(seed, epoch, skip): which pass over the data, and how many of its batches to leave out at the
beginning.
"""

_ORDER = 0  # what a random number is for; loader.py has the others


@dataclass(frozen=True)
class DataLoaders:
    """The data of a Learner: a loader for training and, perhaps, one for validation.

    A loader is anything that can be iterated over again and again (what `make_loader` makes,
    Batches, or any torch DataLoader) and yields tuples (inputs..., targets...), or dicts (see
    Learner). If it has a len(), that many batches must come. If it has a method
    `set_position(seed, epoch, skip)`, that says which pass comes next, and how many batches to
    leave out; else what it draws from torch's global generator is a function of (seed, epoch) too,
    since the machine seeds that, and the batches to be left out are read and dropped.
    """

    train: Iterable[Any]
    valid: Iterable[Any] | None = None


@dataclass(frozen=True, eq=False)
class Batches:
    """Tensors that fit in memory, in batches: the first axis is cut, in order or shuffled again for
    every epoch.

    The last batch is as large as what is left, unless `drop_last`. The order of a pass is a
    function of (seed, epoch) where `set_position` has said which pass it is; else it is drawn from
    torch's global generator. Raises ValueError if the tensors are not equally long or batch_size is
    below 1.

    >>> x = torch.arange(5)
    >>> [batch[0].tolist() for batch in Batches((x, x), batch_size=2)]
    [[0, 1], [2, 3], [4]]
    """

    tensors: tuple[Tensor, ...]
    batch_size: int = 64
    shuffle: bool = False
    drop_last: bool = False

    def __post_init__(self) -> None:
        lengths = [len(tensor) for tensor in self.tensors]
        if len(set(lengths)) != 1:
            raise ValueError(
                f"Batches: tensors must be equally long, got {lengths}. Cut them to one length."
            )
        check_batch_size("Batches", self.batch_size)
        object.__setattr__(self, "_position", None)

    def set_position(self, seed: int, epoch: int, skip: int = 0) -> None:
        """Let the next pass be that of (seed, epoch), from batch `skip` on."""
        object.__setattr__(self, "_position", (seed, epoch, skip))

    def __len__(self) -> int:
        return batch_count(len(self.tensors[0]), self.batch_size, self.drop_last)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        position: Position | None = self.__dict__["_position"]
        object.__setattr__(self, "_position", None)
        order, count = None, len(self.tensors[0])
        if self.shuffle:
            order = torch.randperm(count) if position is None else shuffled(count, *position[:2])
            order = order.to(self.tensors[0].device)
        return self._batches(order, 0 if position is None else position[2])

    def _batches(self, order: Tensor | None, skip: int) -> Iterator[tuple[Tensor, ...]]:
        for index in range(skip, len(self)):
            part = slice(index * self.batch_size, (index + 1) * self.batch_size)
            if order is None:
                yield tuple([tensor[part] for tensor in self.tensors])
            else:
                chosen = order[part]
                yield tuple([tensor.index_select(0, chosen) for tensor in self.tensors])


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


def check_batch_size(what: str, batch_size: int) -> None:
    """Raise ValueError if there cannot be such batches."""
    if batch_size < 1:
        raise ValueError(f"{what}: batch_size must be at least 1, got {batch_size}.")


def one_batch(source: Any) -> Any:
    """The first batch of a loader, or of the training data of a Learner or DataLoaders: to look at.

    Raises ValueError if there is none.

    >>> one_batch(Batches((torch.arange(5),), batch_size=2))
    (tensor([0, 1]),)
    """
    data = getattr(source, "data", source)
    for batch in data.train if isinstance(data, DataLoaders) else source:
        return batch
    raise ValueError("one_batch: the loader is empty. Check the data set, or drop_last.")


def class_count(source: Any) -> int:
    """How many classes the targets have: the largest of them in one pass over the loader, plus 1.

    `source` is what one_batch takes; targets are the last part of a batch, or its "labels". Raises
    ValueError if they are no integers, or there are none.

    >>> x = torch.zeros(2, 8)
    >>> class_count([(x, torch.tensor([0, 4])), (x[:1], torch.tensor([3]))])
    5
    """
    data = getattr(source, "data", source)
    largest = -1
    for batch in data.train if isinstance(data, DataLoaders) else source:
        target = batch.get("labels") if isinstance(batch, Mapping) else batch[-1]
        if not isinstance(target, Tensor) or target.is_floating_point() or target.is_complex():
            found = str(target.dtype) if isinstance(target, Tensor) else type(target).__name__
            raise ValueError(f"class_count: targets must be tensors of classes, got {found}.")
        largest = max(largest, int(target.max()))
    if largest < 0:
        raise ValueError("class_count: there is no target that is 0 or more. Check the data set.")
    return largest + 1
