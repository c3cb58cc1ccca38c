"""A torch DataLoader whose batches are a function of (seed, epoch, batch): of no worker, and of
nothing before it.
"""

import copy
import random
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, islice
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from functional_sgd.tree import Tree
from loop.data.batches import (
    WHOLE,
    DataLoaders,
    Part,
    Position,
    batch_count,
    batch_slice,
    check_batch_size,
    check_part,
    shuffled,
)
from loop.run.chance import key

_SAMPLE, _STREAM = 1, 2  # what a random number is for; batches.py has the other

Seeded: TypeAlias = tuple[int, int]
"""The index of a sample, and the seed of its randomness."""

Sample: TypeAlias = Any
"""What a data set or a stream is made of; usually a tuple (inputs..., targets...)."""


def make_loader(
    dataset: Any,
    batch_size: int = 64,
    shuffle: bool = False,
    *,
    workers: int = 0,
    collate: Callable[[list[Sample]], Tree] | None = None,
    drop_last: bool = False,
    ahead: int = 2,
    keep_workers: bool = False,
    pin: bool = False,
    context: str | None = None,
    timeout: float = 0,
) -> "EpochLoader":
    """A torch DataLoader that can begin anywhere: `loader.set_position(seed, epoch, skip)` says
    where.

    The order is a function of (seed, epoch). What dataset[index] draws from the global generators
    of torch, Python and numpy is a function of (seed, epoch, index): not of the number of workers,
    nor of the batch that the sample is in. So batch k is the same wherever a pass began, and
    batches that are left out are not loaded. A pass without a position draws its seed from torch's
    global generator. Samples are fetched one at a time: 10 microseconds each are for the seeds.

    `dataset` has `len` and `dataset[index]`; or it is a stream: an IterableDataset, or anything
    that can be iterated over again and again, or a function that returns an iterator, such as a
    generator function. A stream has its own order, is read by at most one worker, and is read from
    its beginning wherever a pass begins.

    Args:
        dataset: Samples; usually tuples (inputs..., targets...).
        batch_size: Samples in a batch; the last may have fewer.
        shuffle: A new order for every epoch. Not for streams.
        workers: Processes that fetch samples; 0 fetches in this one.
        collate: Makes a batch of a list of samples; torch's default_collate if None.
        drop_last: Leave out a last batch that is not full.
        ahead: Batches that each worker has ready before they are asked for.
        keep_workers: Keep the processes from one pass to the next. Not for streams.
        pin: Put batches into pinned memory, where there is an accelerator; for `Prefetch`.
        context: How processes are started: "fork", "forkserver" or "spawn". By default as Python
            does, but where its way is to fork and to warn of it (Linux, Python 3.12 and 3.13) by
            "forkserver". All but "fork" need a data set that can be pickled, and seconds to start:
            keep the workers.
        timeout: Seconds that a worker may take for a batch; then RuntimeError, which a stopped run
            needs to end where a worker hangs. 0 waits for ever.

    Raises ValueError for a batch_size below 1, an iterator that can be read only once, and for what
    streams cannot do; TypeError for a dataset that is none of these.

    >>> loader = make_loader(range(10), 3, shuffle=True)
    >>> loader.set_position(seed=0, epoch=0, skip=0)
    >>> batches = [batch.tolist() for batch in loader]
    >>> loader.set_position(seed=0, epoch=0, skip=2)
    >>> [batch.tolist() for batch in loader] == batches[2:], len(loader)
    (True, 4)
    """
    check_batch_size("make_loader", batch_size)
    if isinstance(dataset, type):
        raise TypeError(
            f"make_loader: dataset must be an object, got the class {dataset.__name__}. Call it."
        )
    shared: dict[str, Any] = dict(
        num_workers=workers,
        collate_fn=collate,
        # With a generator of its own, torch does not draw the workers' seed from the global one.
        generator=torch.Generator(),
        # torch warns about pinned memory where there is no accelerator.
        pin_memory=pin and torch.accelerator.is_available(),
    )
    # torch refuses some of these options without workers.
    if workers:
        shared |= dict(
            prefetch_factor=ahead,
            persistent_workers=keep_workers,
            timeout=timeout,
            multiprocessing_context=context or _context(),
            worker_init_fn=ignore_interrupts,
        )
    if _is_stream(dataset):
        _check_stream(shuffle, workers, keep_workers)
        stream = SeededStream(_source(dataset), batch_size)
        return EpochLoader(stream, stream, batch_size=batch_size, drop_last=drop_last, **shared)
    sampler = EpochSampler(len(dataset), batch_size, shuffle, drop_last)
    return EpochLoader(sampler, SeededDataset(dataset), batch_sampler=sampler, **shared)


def dataloaders(train: Any, valid: Any = None, batch_size: int = 64, **options: Any) -> DataLoaders:
    """Loaders for both: training data shuffled, validation data in order and in batches twice as
    large.

    Validation keeps no gradients, so twice as much fits. `options` are those of make_loader;
    drop_last and a stream's order are matters of the training data only.

    >>> data = dataloaders(range(10), range(5), batch_size=2)
    >>> len(data.train), len(data.valid)
    (5, 2)
    """
    options = {"shuffle": not _is_stream(train), **options}
    loader = make_loader(train, batch_size, **options)
    if valid is None:
        return DataLoaders(loader)
    whole = {**options, "shuffle": False, "drop_last": False}
    return DataLoaders(loader, make_loader(valid, 2 * batch_size, **whole))


def _is_stream(dataset: object) -> bool:
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")


def _check_stream(shuffle: bool, workers: int, keep_workers: bool) -> None:
    """Raise ValueError for what streams cannot do."""
    # Each worker would read the whole stream. One that is kept would not learn of a new position,
    # which it gets with its copy of the stream when it starts.
    if shuffle or workers > 1 or keep_workers:
        raise ValueError(
            f"make_loader: a stream has its own order and one reader, got shuffle={shuffle}, "
            f"workers={workers}, "
            f"keep_workers={keep_workers}. Leave them out, or use workers=1."
        )


class EpochLoader(DataLoader[Sample]):
    """torch's DataLoader, with a position. `make_loader` makes it."""

    def __init__(
        self, plan: "EpochSampler | SeededStream", dataset: Dataset[Sample], **options: Any
    ) -> None:
        super().__init__(dataset, **options)
        self.plan = plan
        self.position: Position | None = None

    def set_position(self, seed: int, epoch: int, skip: int = 0) -> None:
        """Let the next pass be that of (seed, epoch), from batch `skip` on; the length stays that
        of a whole pass.
        """
        self.position = Position(seed, epoch, skip)

    def part(self, which: int, parts: int) -> "EpochLoader":
        """A loader of the `which`-th of so many parts of every batch, counted from 0; samples of
        the other parts are not fetched.

        Raises ValueError for a stream, whose batches can only be cut when they are read.

        >>> loader = make_loader(range(10), 4)
        >>> [[batch.tolist() for batch in loader.part(k, 2)] for k in range(2)]
        [[[0, 1], [4, 5], [8]], [[2, 3], [6, 7], [9]]]
        """
        check_part("EpochLoader", (which, parts))
        if not isinstance(self.plan, EpochSampler):
            raise ValueError("EpochLoader: a stream has no parts. Cut the batches that it gives.")
        twin, plan = copy.copy(self), copy.copy(self.plan)
        plan.part = (which, parts)
        twin.plan = plan
        twin._iterator = None  # processes that are kept belong to the loader that has started them
        twin.generator = torch.Generator()
        vars(twin)["batch_sampler"] = plan  # which DataLoader lets nobody set
        return twin

    def __iter__(self) -> Any:
        position, self.position = self.position, None
        if position is None:
            position = Position(seed=int(torch.randint(2**62, ())), epoch=0, skip=0)
        self.plan.position = position
        return super().__iter__()


class EpochSampler(Sampler[list[Seeded]]):
    """Batches of (index, seed) in the order of a position: the seed travels with the index to
    whichever worker.
    """

    def __init__(
        self, size: int, batch_size: int, shuffle: bool = False, drop_last: bool = False
    ) -> None:
        self.size, self.batch_size = size, batch_size
        self.shuffle, self.drop_last = shuffle, drop_last
        self.position = Position(0, 0, 0)
        self.part: Part = WHOLE

    def __len__(self) -> int:
        return batch_count(self.size, self.batch_size, self.drop_last)

    def __iter__(self) -> Iterator[list[Seeded]]:
        return self.batches(*self.position)

    def batches(self, seed: int, epoch: int, skip: int) -> Iterator[list[Seeded]]:
        """The batches of a pass, from number `skip` on."""
        order: Sequence[int] = range(self.size)
        if self.shuffle:
            order = shuffled(self.size, seed, epoch).tolist()
        samples = key(seed, epoch, _SAMPLE)
        for number in range(skip, len(self)):
            place = batch_slice(number, self.size, self.batch_size, self.part)
            yield [(index, key(samples, index)) for index in order[place]]


class SeededDataset(Dataset[Sample]):
    """A data set asked by (index, seed): the global generators are seeded before, and put back
    after.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, which: Seeded) -> Sample:
        return self.__getitems__([which])[0]

    def __getitems__(self, which: Iterable[Seeded]) -> list[Sample]:
        # torch asks for a whole batch here, so the generators are read and put back once a batch.
        with generators_kept():
            return [self._sample(index, seed) for index, seed in which]

    def _sample(self, index: int, seed: int) -> Sample:
        seed_all(seed)
        try:
            return self.dataset[index]
        except StopIteration as error:  # which would end the epoch, and nobody would notice
            raise RuntimeError(f"make_loader: dataset[{index}] raised StopIteration.") from error
        except Exception as error:
            error.add_note(f"make_loader: raised by dataset[{index}].")
            raise


class SeededStream(IterableDataset[Sample]):
    """A stream from its beginning; what it draws before its n-th sample is a function of (seed,
    epoch, n).
    """

    def __init__(self, source: Callable[[], Iterable[Sample]], batch_size: int) -> None:
        self.source, self.batch_size = source, batch_size
        self.position = Position(0, 0, 0)

    def __len__(self) -> int:
        with generators_kept():  # a function may draw before it returns a stream
            return len(self.source())  # type: ignore[arg-type]  # a TypeError, if it has none, is right

    def __iter__(self) -> Iterator[Sample]:
        # A generator would read the position with its first sample, which may be that of a later
        # pass.
        return self.samples(*self.position)

    def samples(self, seed: int, epoch: int, skip: int) -> Iterator[Sample]:
        """The samples of a pass, from batch `skip` on."""
        reader = self._read(key(seed, epoch, _STREAM))
        for number in count():
            # Not around the yield: what the consumer draws between batches is its own.
            with generators_kept():
                batch = list(islice(reader, self.batch_size))
            if number >= skip:
                yield from batch
            if len(batch) < self.batch_size:
                return

    def _read(self, seed: int) -> Iterator[Sample]:
        # The function that makes the stream may draw as well.
        seed_all(key(seed, 0))
        iterator = iter(self.source())
        for index in count():
            seed_all(key(seed, index))
            try:
                sample = next(iterator)
            except StopIteration:
                return
            yield sample


def seed_all(seed: int) -> None:
    """Seed the global generators of torch (the CPU's), Python and numpy."""
    # torch.manual_seed would also seed every device.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    # numpy takes seeds of 32 bits.
    np.random.seed(seed % 2**32)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Give the global generators of torch (the CPU's), Python and numpy back as they were."""
    of_torch = torch.get_rng_state()
    of_python = random.getstate()
    of_numpy = np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(of_torch)
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def ignore_interrupts(worker: int = 0) -> None:
    """Leave Ctrl-C, which a terminal sends to every process, to the main one: it may still want
    batches.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Same:
    """A function that returns the same stream each time; unlike a lambda, other processes can be
    sent it.
    """

    def __init__(self, stream: Iterable[Sample]) -> None:
        self.stream = stream

    def __call__(self) -> Iterable[Sample]:
        return self.stream


def _source(stream: object) -> Callable[[], Iterable[Sample]]:
    """A function that returns something to iterate over."""
    if isinstance(stream, Iterator):
        raise ValueError(
            f"make_loader: {type(stream).__name__} can be read only once, but there is a pass for "
            f"every epoch. "
            f"Pass the function that makes it."
        )
    if isinstance(stream, Iterable):
        return _Same(stream)
    if callable(stream):
        return stream
    raise TypeError(
        f"make_loader: dataset must have dataset[index], or be a stream, got "
        f"{type(stream).__name__}."
    )


def _context() -> str | None:
    forks_and_warns = sys.platform == "linux" and (3, 12) <= sys.version_info < (3, 14)
    return "forkserver" if forks_and_warns else None
