"""What comes out of a loader: a pass over the data, or batch after batch from wherever a state
says.
"""

from typing import Any

import torch
from torch.utils.data import DataLoader

from functional_sgd.tree import Tree
from loop.run.chance import key, seed_loader, seed_torch

TRAIN_DATA, VALID_DATA = 0, 1  # what a random number is for; stages.py has the others

# What no loader yields; None could be a batch.
_END = object()


class Pass:
    """One pass over a loader, from batch `start` on; its order is a function of (seed, number).

    A loader that has `set_position` begins there. Of others the first batches are read and dropped,
    and what they draw from torch's generators is seeded.
    """

    def __init__(
        self, loader: Any, purpose: int, seed: int, number: int, start: int, device: torch.device
    ) -> None:
        self.loader, self.device = loader, device
        self.name = "data.valid" if purpose == VALID_DATA else "data.train"
        self.order, self.number, self.start = key(seed, number, purpose), number, start
        self.index = self.fetched = 0  # the number of the next batch; how many came
        if loader is not None and hasattr(loader, "set_position"):  # it can begin in the middle
            loader.set_position(key(seed, purpose), number, start)
            self.index = start
        # Before iter(), in which a torch DataLoader draws the seed of its workers, and then its
        # sampler the order.
        seed_loader(loader, self.order)
        seed_torch(self.order, device)
        if isinstance(loader, DataLoader) and loader._iterator is not None:
            # Persistent workers have their seed, so it is not drawn again; but the order must not
            # depend on whether they are there already.
            torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
        self.iterator = iter(()) if loader is None else iter(loader)
        self.expected = length(loader)

    def __iter__(self) -> "Pass":
        return self

    def __next__(self) -> Tree:
        while True:
            # Before every batch, since a loader without workers draws its augmentations in here.
            seed_torch(key(self.order, self.index), self.device)
            batch = next(self.iterator, _END)
            if batch is _END:
                raise StopIteration
            self.index, self.fetched = self.index + 1, self.fetched + 1
            if self.index > self.start:
                return batch

    def check(self) -> None:
        """Raise ValueError if a pass that is over was shorter than it can have been."""
        if self.index < self.start:
            raise ValueError(
                f"Learner: {self.name} yielded {self.index} batches where the run had seen "
                f"{self.start} already: it is other data."
            )
        if self.index == 0:
            raise ValueError(
                f"Learner: {self.name} is empty: it yielded no batch. Check the data set, or "
                f"drop_last."
            )
        if self.expected is not None and self.index < self.expected:
            raise ValueError(
                f"Learner: {self.name} has len() {self.expected}, but yielded {self.index} "
                f"batches, so schedules would end too early. Does dataset[i] raise StopIteration? "
                f"Give the loader the right len(), or none."
            )

    def is_at(self, loader: object, seed: int, number: int, index: int) -> bool:
        """Whether what comes next is batch `index` of that pass."""
        # A torch DataLoader with persistent workers has one iterator, which whoever else iterates
        # over the loader starts anew.
        untouched = getattr(self.iterator, "_num_yielded", self.fetched) == self.fetched
        same = self.loader is loader and self.order == key(seed, number, TRAIN_DATA)
        return same and untouched and self.index == index


class Feed:
    """The training data of a run that counts steps: pass after pass, whatever its epochs are.

    Which batch comes is a function of (seed, position). The pass at hand stays open, so that an
    epoch that begins where the last one has ended reads nothing twice.
    """

    def __init__(self) -> None:
        self.open: Pass | None = None

    def batch(
        self, loader: Any, seed: int, position: tuple[int, int], device: torch.device
    ) -> tuple[Tree, tuple[int, int]]:
        """The batch at a position (passes, batches of the one at hand), and the position after it.

        Where the pass is over, it is the first of the next one. Raises ValueError if that is empty.
        """
        number, index = position
        if self.open is None or not self.open.is_at(loader, seed, number, index):
            self.open = Pass(loader, TRAIN_DATA, seed, number, index, device)
        batch = next(self.open, _END)
        if batch is _END:
            if self.open.index >= index:  # else the position is one in other, longer data
                self.open.check()
            self.open = Pass(loader, TRAIN_DATA, seed, number + 1, 0, device)
            batch = next(self.open, _END)
            if batch is _END:
                self.open.check()
        return batch, (self.open.number, self.open.index)

    def close(self) -> None:
        """Let the pass go, with the processes that it may have."""
        self.open = None


def length(loader: Any) -> int | None:
    """How many batches a loader says that a pass has, None if it cannot tell."""
    try:
        return len(loader)
    except TypeError:
        return None
