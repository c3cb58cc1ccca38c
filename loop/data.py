"""Where batches come from: two loaders, and the simplest loader there is."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class DataLoaders:
    """The data of a Learner: a loader for training and, perhaps, one for validation.

    A loader is anything that can be iterated over again and again, such as torch.utils.data.DataLoader or Batches, and
    yields tuples (inputs..., targets...). Shuffling draws from torch's global generator, which the machine seeds by
    (seed, epoch), so the order is a function of both.
    """

    train: Iterable[Any]
    valid: Iterable[Any] | None = None


@dataclass(frozen=True, eq=False)
class Batches:
    """Tensors that fit in memory, in batches: the first axis is cut, in order or shuffled anew for every epoch.

    The last batch is as large as what is left, unless `drop_last`. Raises ValueError if the tensors are not equally
    long or batch_size is below 1.

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
            raise ValueError(f"Batches: tensors must be equally long, got {lengths}. Cut them to one length.")
        if self.batch_size < 1:
            raise ValueError(f"Batches: batch_size must be at least 1, got {self.batch_size}.")

    def __len__(self) -> int:
        count = len(self.tensors[0])
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        count = len(self.tensors[0])
        order = torch.randperm(count).to(self.tensors[0].device) if self.shuffle else None
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            stop = min(start + self.batch_size, count)
            if order is None:
                yield tuple(tensor[start:stop] for tensor in self.tensors)
            else:
                yield tuple(tensor[order[start:stop]] for tensor in self.tensors)
