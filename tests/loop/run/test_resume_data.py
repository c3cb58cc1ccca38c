"""Resuming within the data: loaders with and without a length or a position, and what cannot be
resumed.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import IterableDataset

from functional_sgd import sgd
from loop import Batches, Callback, DataLoaders, Learner, State, differences, fit
from tests.loop.helpers import assert_same_run, batches, learner
from tests.loop.run.test_resume import EPOCHS, Kept, callbacks, committed


class Stream(IterableDataset):
    """Batches without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(batches(3, seed=1))


def test_loaders_without_a_length_are_resumed() -> None:
    mine = learner(data=DataLoaders(Stream(), Stream()))
    kept = Kept()
    end = fit(mine, mine.init(), EPOCHS, [kept])
    for state in kept.states:
        assert_same_run(fit(mine, state, EPOCHS, resume=True), end)


class Positioned:
    """A loader that can begin in the middle; counts what it loads."""

    def __init__(self) -> None:
        self.positions: list[tuple[int, int]] = []
        self.skip = 0
        self.loaded = 0

    def set_position(self, seed: int, epoch: int, skip: int) -> None:
        self.positions.append((epoch, skip))
        self.skip = skip

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Any]:
        for batch in batches(3, seed=1)[self.skip :]:
            self.loaded += 1
            yield batch


def test_a_loader_that_can_begin_in_the_middle_loads_no_batch_twice() -> None:
    loader = Positioned()
    mine = learner(data=DataLoaders(loader))
    kept = Kept()
    end = fit(mine, mine.init(), EPOCHS, [kept])
    state = next(state for state in kept.states if state.done == (1, 0, 2))
    loader.positions, loader.loaded = [], 0
    assert_same_run(fit(mine, state, EPOCHS, resume=True), end)
    assert (loader.positions, loader.loaded) == ([(1, 2)], 1)


def test_a_state_in_no_run_cannot_be_resumed() -> None:
    mine = learner()
    with pytest.raises(ValueError, match="fit: the state is not within a run"):
        fit(mine, mine.init(), 1, resume=True)
    with pytest.raises(ValueError, match="fit: the state is not within a run"):
        fit(mine, fit(mine, mine.init(), 1), 1, resume=True)


def test_the_number_of_epochs_must_be_that_of_the_run() -> None:
    mine = learner()
    with pytest.raises(
        ValueError, match="in a run of 2 epochs, so it cannot be resumed as one of 3"
    ):
        fit(mine, committed(mine, mine.init())[0][4], 3, resume=True)


def iter_anew(count: int) -> Any:
    """Data that does not say how long it is."""

    class Unsized:
        def __iter__(self) -> Iterator[Any]:
            return iter(batches(count, seed=1))

    return Unsized()


def test_other_data_that_do_not_say_how_long_they_are_are_noticed_later() -> None:
    mine = learner()
    state = next(state for state in committed(mine, mine.init())[0] if state.done == (1, 0, 3))
    short = replace(mine, data=DataLoaders(iter_anew(2)))
    with pytest.raises(
        ValueError, match=r"data.train yielded 2 batches where the run had seen 3 already"
    ):
        fit(short, state, EPOCHS, callbacks(), resume=True)


class Crash(Callback):
    reports = True

    def after_batch(self, state: State) -> None:
        if state.train_iter == 2:
            raise RuntimeError("crash")


@pytest.mark.parametrize("in_place", [False, True])
def test_views_of_unshuffled_data_give_the_same_bits_where_the_run_goes_on(in_place: bool) -> None:
    """The first batch of a run is a copy; products of matrices depend on where memory begins."""
    x = torch.randn(38, 6, generator=torch.Generator().manual_seed(3))
    y = x[:, :3].argmax(1)
    torch.manual_seed(0)
    first = [nn.Dropout(0.5, inplace=True)] if in_place else []
    model = nn.Sequential(*first, nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    mine = Learner(model, DataLoaders(Batches((x, y), 5)), cross_entropy, sgd(lr=0.1))
    whole = fit(mine, mine.init(), 4)
    with pytest.raises(RuntimeError, match="crash") as caught:
        fit(mine, mine.init(), 4, [Crash()])
    error: Any = caught.value
    assert not differences(whole, fit(mine, error.state, 4, resume=True))
    part = fit(mine, mine.init(), steps=7)
    whole = fit(mine, mine.init(), steps=32)
    again = fit(mine, part, steps=25)
    assert all(torch.equal(whole.params[name], again.params[name]) for name in whole.params)
