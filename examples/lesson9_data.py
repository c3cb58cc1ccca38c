"""Batches from scratch: data set, sampler, collate, loader; then the same from torch and us."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from functional_sgd import sgd
from loop import (
    DataLoaders,
    Learner,
    dataloaders,
    make_loader,
    one_batch,
    padding_collate,
    validate,
)


@dataclass(frozen=True)
class Dataset:
    """Inputs and targets that belong together. An index may be a slice, too."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


def sampler(count: int, batch_size: int, shuffle: bool = False) -> Iterator[list[int]]:
    """The indices of every batch."""
    order = (torch.randperm(count) if shuffle else torch.arange(count)).tolist()
    for start in range(0, count, batch_size):
        yield order[start : start + batch_size]


def collate(samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Samples as one batch."""
    xs, ys = zip(*samples, strict=True)
    return torch.stack(xs), torch.stack(ys)


def batches(data: Any, indices: Iterable[list[int]], make: Callable[..., Any] = collate) -> Any:
    """A generator that asks another one: nothing is loaded before somebody wants the batch."""
    for batch in indices:
        yield make([data[index] for index in batch])


def stream(numbers: Iterable[int], batch_size: int) -> Iterator[list[int]]:
    """The same without a length: it would work for numbers that never end."""
    rest = iter(numbers)
    while batch := list(islice(rest, batch_size)):
        yield batch


def same(left: Iterable[Any], right: Iterable[Any]) -> bool:
    """Whether two loaders yield the same tensors."""
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


def main(batch_size: int = 3, workers: int = 2, seed: int = 0) -> None:
    """Print what each part does, and that all three loaders agree.

    Args:
        batch_size: Samples in a training batch.
        workers: Processes that fetch samples.
        seed: Decides the data and the orders.
    """
    torch.manual_seed(seed)
    train = Dataset(torch.randn(50, 784), torch.randint(10, (50,)))
    ten = Dataset(*train[:10])
    shapes = [tuple(part.shape) for part in train[0:5]]
    print(f"data set: {len(train)} samples; a slice of five has shapes {shapes}")
    scratch = list(batches(ten, sampler(10, batch_size)))
    print(f"batches of {batch_size} out of ten: {[len(y) for _, y in scratch]}")
    print(f"sampler in order: {list(sampler(10, batch_size))}")
    for epoch in range(2):
        print(f"sampler shuffled, epoch {epoch}: {list(sampler(10, batch_size, shuffle=True))}")
    print(f"stream: {list(stream(range(10), batch_size))}")
    sentences = [torch.arange(1, n + 1) for n in (3, 1, 2)]
    padded, mask = next(batches(sentences, [[0, 1, 2]], padding_collate))
    print(f"padded: {padded.tolist()}, {int(mask.sum())} of {mask.numel()} real")

    torchs = DataLoader(TensorDataset(*ten[:]), batch_size)
    print(f"torch's DataLoader yields the same: {same(scratch, torchs)}")
    for count in (0, workers):
        ours = make_loader(ten, batch_size, workers=count)
        print(f"ours with {count} workers yields the same: {same(scratch, ours)}")
    loader = make_loader(ten, batch_size, shuffle=True)
    loader.set_position(seed, epoch=3)
    whole = list(loader)
    loader.set_position(seed, epoch=3, skip=2)
    print(f"ours from batch 2 of epoch 3 on is the tail of epoch 3: {same(whole[2:], loader)}")
    data = dataloaders(train, ten, batch_size)
    first, second = (len(one_batch(loader)[1]) for loader in (data.train, data.valid))
    print(f"one batch of each: {first} samples to train on, {second} to validate on")

    x, errors = torch.zeros(5, 1), torch.tensor([[1.0], [1.0], [0.0], [2.0], [3.0]])
    uneven = [(x[:4], errors[:4]), (x[4:], errors[4:])]
    model, data = nn.Linear(1, 1, bias=False), DataLoaders(uneven, uneven)
    learner = Learner(model, data, mse_loss, sgd(lr=0.1))
    naive = sum(float(mse_loss(x, y)) for x, y in uneven) / len(uneven)
    right = f"{validate(learner, learner.init())['valid_loss']:.2f}"
    print(f"loss over batches of 4 and 1: {right}; the mean of the batches' means would be {naive}")


if __name__ == "__main__":
    tyro.cli(main)
