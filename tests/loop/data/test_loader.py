"""make_loader and Prefetch: a batch is a function of (seed, epoch, number), whoever loads it,
wherever one begins.
"""

import random
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from functional_sgd import sgd
from loop import DataLoaders, Learner, fit
from loop.data import Batches
from loop.data.loader import dataloaders, generators_kept, make_loader
from loop.data.prefetch import Prefetch, one_ahead
from tests.comparing import assert_same
from tests.loop.helpers import one_weight


def drawn() -> Tensor:
    """A number from each of the global generators."""
    return torch.tensor(
        [torch.rand(()).item(), random.random(), np.random.rand()], dtype=torch.float64
    )


class Noisy:
    """Samples that are made new each time: (index, three random numbers)."""

    def __init__(self, size: int = 11) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, drawn()


class NoisyStream(IterableDataset[Any]):
    """The same without an index, or a length."""

    def __iter__(self) -> Iterator[Any]:
        return ((index, drawn()) for index in range(11))


def stream() -> Iterator[Any]:
    """The same as a generator."""
    for index in range(11):
        yield index, drawn()


def at(loader: Any, seed: int = 0, epoch: int = 0, skip: int = 0) -> list[Any]:
    """The batches of one pass."""
    loader.set_position(seed, epoch, skip)
    return list(loader)


def by_index(batches: list[Any]) -> dict[int, list[float]]:
    """Sample -> its random numbers."""
    return {
        int(index): row.tolist()
        for indices, noise in batches
        for index, row in zip(indices, noise, strict=True)
    }


OPTIONS: list[dict[str, Any]] = [
    dict(workers=1),
    dict(workers=2),
    dict(workers=2, ahead=1, keep_workers=True),
    dict(workers=1, context="forkserver", keep_workers=True),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_batches_do_not_depend_on_the_workers(options: dict[str, Any]) -> None:
    alone, helped = make_loader(Noisy(), 3, True), make_loader(Noisy(), 3, True, **options)
    for epoch, skip in ((0, 0), (1, 2)):
        assert_same(at(helped, 5, epoch, skip), at(alone, 5, epoch, skip))


def test_workers_that_stay_begin_anew_after_a_pass_that_was_left() -> None:
    loader = make_loader(Noisy(), 3, True, workers=2, keep_workers=True)
    loader.set_position(0, 0)
    next(iter(loader))
    assert_same(at(loader, 0, 1), at(make_loader(Noisy(), 3, True), 0, 1))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_skipping_gives_the_tail_of_a_whole_pass(shuffle: bool, drop_last: bool) -> None:
    loader = make_loader(Noisy(), 3, shuffle, drop_last=drop_last)
    whole = at(loader)
    for skip in range(len(whole) + 2):
        assert_same(at(loader, skip=skip), whole[skip:])
        assert len(loader) == len(whole) == (3 if drop_last else 4)


def test_batches_in_memory_skip_too() -> None:
    loader = Batches((torch.arange(11), torch.arange(11)), 3, shuffle=True)
    whole = at(loader, 3, 1)
    assert_same(at(loader, 3, 1, skip=2), whole[2:])
    assert (at(loader, 3, 1, skip=4), len(loader)) == ([], 4)


def test_a_position_is_for_one_pass() -> None:
    for loader in (make_loader(Noisy(), 3), Batches((torch.arange(11),), 3)):
        assert (len(at(loader, skip=3)), len(list(loader))) == (1, 4)


def test_what_is_skipped_is_not_loaded() -> None:
    read: list[int] = []

    class Watched(Noisy):
        def __getitem__(self, index: int) -> tuple[int, Tensor]:
            read.append(index)
            return super().__getitem__(index)

    at(make_loader(Watched(), 3), skip=2)
    assert read == [6, 7, 8, 9, 10]


def test_the_noise_of_a_sample_depends_on_seed_epoch_and_index_only() -> None:
    in_order, other = (
        by_index(at(make_loader(Noisy(), size, shuffle), 1, 2))
        for size, shuffle in ((3, False), (4, True))
    )
    assert in_order == other
    for seed, epoch in ((1, 3), (2, 2)):
        changed = by_index(at(make_loader(Noisy(), 3), seed, epoch))
        assert not any(set(changed[index]) & set(in_order[index]) for index in range(11))
    assert len({number for row in in_order.values() for number in row}) == 33


@pytest.mark.parametrize(
    "make", [lambda: make_loader(Noisy(), 3, True), lambda: make_loader(stream, 3)]
)
def test_a_pass_at_a_position_leaves_the_global_generators_alone(make: Any) -> None:
    loader = make()
    with generators_kept():
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        expected = drawn()
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        at(loader)
        assert torch.equal(drawn(), expected)


def test_the_global_generators_are_put_back_after_an_error() -> None:
    class Broken(Noisy):
        def __getitem__(self, index: int) -> tuple[int, Tensor]:
            if index == 4:
                raise KeyError("lost")
            return super().__getitem__(index)

    with generators_kept():
        torch.manual_seed(0)
        expected = torch.rand(2)
        torch.manual_seed(0)
        with pytest.raises(KeyError, match="lost") as caught:
            at(make_loader(Broken(), 3))
        assert torch.equal(torch.rand(2), expected)
    assert caught.value.__notes__ == ["make_loader: raised by dataset[4]."]


@pytest.mark.parametrize("source", [NoisyStream(), stream], ids=["dataset", "generator"])
@pytest.mark.parametrize("workers", [0, 1])
def test_streams(source: Any, workers: int) -> None:
    loader = make_loader(source, 3, workers=workers)
    whole = at(loader, 1, 2)
    assert [indices.tolist() for indices, _ in whole] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]
    assert_same(at(make_loader(stream, 3), 1, 2), whole)
    assert_same(at(loader, 1, 2, skip=2), whole[2:])
    assert by_index(at(loader, 1, 3)) != by_index(whole)
    assert len(at(make_loader(source, 3, workers=workers, drop_last=True))) == 3


@pytest.mark.parametrize("source", [stream, Noisy()], ids=["stream", "data set"])
def test_two_passes_at_once_have_each_their_own_position(source: Any) -> None:
    """Also if a pass is asked for its first batch after the other one has begun."""
    loader = make_loader(source, 3)
    loader.set_position(0, 0)
    first = iter(loader)
    loader.set_position(0, 1)
    second = iter(loader)
    fresh = make_loader(source, 3)
    assert_same([list(first), list(second)], [at(fresh, 0, 0), at(fresh, 0, 1)])


def test_a_stream_with_a_length() -> None:
    class Measured(NoisyStream):
        def __len__(self) -> int:
            return 11

    assert len(make_loader(Measured(), 3)) == len(at(make_loader(Measured(), 3))) == 4


def test_loaders_of_streams() -> None:
    data = dataloaders(stream, NoisyStream(), 4)
    assert [[len(batch[0]) for batch in loader] for loader in (data.train, data.valid)] == [
        [4, 4, 3],
        [8, 3],
    ]


@pytest.mark.parametrize(
    ("dataset", "options", "error", "message"),
    [
        (
            Noisy(),
            dict(batch_size=0),
            ValueError,
            "make_loader: batch_size must be at least 1, got 0",
        ),
        (stream, dict(shuffle=True), ValueError, "a stream has its own order"),
        (stream, dict(workers=2), ValueError, "Leave them out, or use workers=1"),
        (stream(), {}, ValueError, "generator can be read only once"),
        (Noisy, {}, TypeError, "got the class Noisy. Call it."),
        (3, {}, TypeError, "dataset must have dataset"),
    ],
)
def test_what_cannot_be_loaded(
    dataset: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_loader(dataset, **options)


@pytest.mark.parametrize("wrap", [lambda loader: loader, lambda loader: Prefetch(loader, "cpu")])
def test_runs_do_not_depend_on_the_workers(wrap: Any) -> None:
    """Noise included: losses are equal bit for bit."""
    found = []
    for workers in (0, 2):
        loader = wrap(make_loader(Pairs(), 3, True, workers=workers))
        mine = Learner(
            one_weight(),
            DataLoaders(loader, make_loader(Pairs(), 6)),
            torch.nn.functional.mse_loss,
            sgd(lr=0.1),
        )
        history = fit(mine, mine.init(seed=3), 2).history
        found.append(([float(loss) for loss in history.losses], history.column("valid_loss")))
    assert found[0] == found[1]
    assert len(set(found[0][0])) == 8


class Pairs(Noisy):
    """y = 2 x, with noise."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = torch.tensor([index / self.size])
        return x, 2 * x + 0.1 * torch.randn(1)


def test_one_ahead_sends_before_it_receives() -> None:
    log: list[str] = []

    def note(what: str) -> Any:
        return lambda item: log.append(f"{what} {item}") or item

    log.extend(f"use {item}" for item in one_ahead(iter("abc"), note("send"), note("receive")))
    assert log == (
        "send a,send b,receive a,use a,send c,receive b,use b,receive c,use c".split(",")
    )
    assert list(one_ahead(iter(""), note("send"), note("receive"))) == []


def test_prefetch_is_the_loader_elsewhere_than_on_cuda() -> None:
    inner = make_loader(Noisy(), 3, True)
    loader = Prefetch(inner, "cpu")
    assert_same(at(loader, 1, 2, skip=1), at(inner, 1, 2, skip=1))
    assert (len(loader), loader.batch_size, hasattr(Prefetch([1], "cpu"), "set_position")) == (
        4,
        inner.batch_size,
        False,
    )
    with pytest.raises(TypeError):
        len(Prefetch(make_loader(stream), "cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_prefetch_on_cuda() -> None:
    """Work on the present stream, between batches, does not disturb what is on its way."""
    data = torch.randn(64, 1000, 100)
    kept = [
        batch for (batch,) in Prefetch(Batches((data,), 4), "cuda") if (batch @ batch.mT).numel()
    ]
    assert all(batch.is_cuda for batch in kept)
    assert torch.equal(torch.cat(kept).cpu(), data)


def test_torchs_own_loader_has_no_position() -> None:
    """The machine then seeds torch, and drops what comes before."""
    assert not hasattr(DataLoader(Noisy(), 3), "set_position")  # type: ignore[arg-type]


class Listening:
    """Samples that say whether Ctrl-C would be ignored where they are made."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return int(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)


def test_workers_leave_ctrl_c_to_the_main_process() -> None:
    """A terminal sends it to all of them, and the main process may want batches until it ends."""
    assert torch.cat(list(make_loader(Listening(), 2, workers=1))).tolist() == [1, 1, 1, 1]
    assert torch.cat(list(make_loader(Listening(), 2))).tolist() == [0, 0, 0, 0]


def test_asking_for_the_length_of_a_stream_draws_nothing() -> None:
    loader = make_loader(lambda: iter([random.random() for _ in range(3)]), 2)
    before = random.getstate()
    with pytest.raises(TypeError, match="has no len"):
        len(loader)
    assert random.getstate() == before
