"""Loaders that yield fewer batches than they say."""

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from loop import DataLoaders, ShortEpoch, dataloaders, fit, make_loader, validate
from tests.loop.helpers import batches, learner


class Ends:
    """Twelve samples, of which the sixth does not exist."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        if index == 5:
            raise StopIteration
        return torch.zeros(2), torch.zeros(2)


class Short(list[Any]):
    """A loader that says one more than it has."""

    def __len__(self) -> int:
        return super().__len__() + 1


def test_a_loader_that_is_shorter_than_it_says_is_an_error() -> None:
    mine = learner(data=DataLoaders(Short(batches(2, seed=1)), Short(batches(1, seed=2))))
    with pytest.raises(ValueError, match=r"data.train has len\(\) 3, but yielded 2 batches"):
        fit(mine, mine.init(), 1)
    with pytest.raises(ValueError, match=r"data.valid has len\(\) 2, but yielded 1 batches"):
        validate(mine, mine.init())


def test_an_epoch_that_is_cut_short_on_purpose_is_none() -> None:
    mine = learner(data=DataLoaders(Short(batches(2, seed=1))), callbacks=[ShortEpoch(0.3)])
    assert fit(mine, mine.init(), 1).train_iter == 1


def test_a_sample_that_raises_stop_iteration_is_an_error() -> None:
    mine = learner(data=dataloaders(Ends(), batch_size=2))
    with pytest.raises(RuntimeError, match=r"dataset\[5\] raised StopIteration"):
        fit(mine, mine.init(), 1)
    with pytest.raises(RuntimeError, match=r"dataset\[5\] raised StopIteration"):
        list(make_loader(Ends(), 2))


def test_so_it_is_with_the_loader_of_torch() -> None:
    mine = learner(data=DataLoaders(DataLoader(Ends(), batch_size=2)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"has len\(\) 6, but yielded 2 batches.*StopIteration"):
        fit(mine, mine.init(), 1)


def test_a_loader_that_is_longer_than_it_says_does_not_drive_schedules_beyond_the_epoch() -> None:
    class Long(list[Any]):
        def __len__(self) -> int:
            return 1

    mine = learner(data=DataLoaders(Long(batches(3, seed=1))))
    assert fit(mine, mine.init(), 1).pct_train == 1
