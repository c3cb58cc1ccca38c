"""Runs that count steps, and epochs of so many steps: where they end, what they see, how they
are resumed.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from functional_sgd import adamw, sgd
from functional_sgd.schedules import Linear
from loop import (
    CancelTrain,
    Checkpoint,
    DataLoaders,
    EarlyStopping,
    Learner,
    ParamScheduler,
    Recorder,
    SaveModel,
    State,
    fit,
    fit_flat_cos,
    fit_one_cycle,
    make_loader,
    trace,
)
from tests.comparing import assert_same
from tests.loop.helpers import (
    KINDS,
    X,
    Y,
    assert_same_run,
    batches,
    full,
    learned,
    learner,
    losses,
    net,
    on,
    raise_once,
)
from tests.loop.run.test_resume import Kept


class Unsized:
    """Three batches that do not say how many they are; counts those that were read."""

    def __init__(self, count: int = 3) -> None:
        self.count, self.read = count, 0

    def __iter__(self) -> Iterator[Any]:
        for batch in batches(self.count, seed=1):
            self.read += 1
            yield batch


def train_iters(state: State) -> list[int]:
    return [row["train_iter"] for row in state.history.rows]


class Noisy:
    """Samples that are random: what is drawn for one depends on the pass."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> Any:
        return X[index] + torch.randn(2), Y[index]


LOADERS = [*KINDS, "make_loader", "list", "unsized"]


def whole(kind: str) -> Learner:
    """Chance and memory everywhere; three batches in a pass."""
    if kind in KINDS:
        return full(kind)
    train = {"make_loader": make_loader(Noisy(), 8, shuffle=True), "list": batches(3, seed=1)}
    data = DataLoaders(train.get(kind) or Unsized(), batches(2, seed=2))
    return learner(net(), data, opt=adamw(lr=0.01))


# How long they are.


@pytest.mark.parametrize(("steps", "ends"), [(7, [3, 6, 7]), (6, [3, 6]), (2, [2]), (0, [])])
def test_a_run_ends_after_so_many_batches(steps: int, ends: list[int]) -> None:
    end = fit(learner(), learner().init(), steps=steps)
    assert (end.train_iter, end.n_epoch) == (steps, len(ends))
    assert train_iters(end) == ends


@pytest.mark.parametrize(("per_epoch", "ends"), [(2, [2, 4, 6, 7]), (5, [5, 7]), (100, [7])])
def test_an_epoch_has_as_many_steps_as_it_is_given(per_epoch: int, ends: list[int]) -> None:
    end = fit(learner(), learner().init(), steps=7, steps_per_epoch=per_epoch)
    assert train_iters(end) == ends
    assert all(row["valid_loss"] > 0 for row in end.history.rows)


def test_epochs_of_so_many_steps() -> None:
    assert train_iters(fit(learner(), learner().init(), 3, steps_per_epoch=4)) == [4, 8, 12]


def test_data_without_a_length_is_read_for_so_many_steps() -> None:
    mine = learner(data=DataLoaders(Unsized(), batches(2, seed=2)))
    assert train_iters(fit(mine, mine.init(), steps=7, steps_per_epoch=4)) == [4, 7]


def test_callbacks_see_how_long_an_epoch_is() -> None:
    seen = [
        (state.epoch, state.iter, state.n_iter)
        for event, state in trace(learner(), learner().init(), steps=5, steps_per_epoch=4)
        if event == "before_batch" and state.training
    ]
    assert seen == [(0, 0, 4), (0, 1, 4), (0, 2, 4), (0, 3, 4), (1, 0, 1)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "expected epochs or steps, got neither"),
        ({"epochs": 1, "steps": 2}, "expected epochs or steps, got both: 1 and 2"),
        ({"steps": -1}, "steps must be a whole number, 0 or more, got -1"),
        ({"steps": 1.5}, "steps must be a whole number, 0 or more, got 1.5"),
        ({"epochs": 1, "steps_per_epoch": 0}, "steps_per_epoch must be a whole number, 1 or more"),
    ],
)
def test_lengths_that_make_no_sense(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^fit: {words}"):
        fit(learner(), learner().init(), **arguments)


def test_steps_of_data_without_a_length_need_the_size_of_an_epoch() -> None:
    mine = learner(data=DataLoaders(Unsized()))
    with pytest.raises(ValueError, match=r"data\.train has no len\(\).*steps_per_epoch too: 9"):
        fit(mine, mine.init(), steps=9)


def test_empty_data_is_an_error() -> None:
    mine = learner(data=DataLoaders([]))
    with pytest.raises(ValueError, match=r"data\.train is empty"):
        fit(mine, mine.init(), steps=1)


# What they see.


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_steps_as_some_epochs_have_are_these_epochs(kind: str) -> None:
    mine = full(kind)
    found, expected = fit(mine, mine.init(), steps=6), fit(mine, mine.init(), 2)
    assert_same_run(found, expected)
    assert (found.position, found.done) == ((1, 3), ())


@pytest.mark.parametrize("kind", LOADERS)
def test_how_often_is_validated_changes_nothing_that_is_learned(kind: str) -> None:
    mine = whole(kind)
    schedule = [ParamScheduler({"lr": Linear(0.05, 0.0)})]
    expected = fit(mine, mine.init(), callbacks=schedule, steps=8, steps_per_epoch=8)
    for per_epoch in (1, 2, 3, 5):
        found = fit(mine, mine.init(), callbacks=schedule, steps=8, steps_per_epoch=per_epoch)
        assert_same(learned(found), learned(expected))
        assert losses(found) == losses(expected)
        assert found.position == expected.position


@pytest.mark.parametrize("kind", LOADERS)
def test_runs_of_steps_add_up(kind: str) -> None:
    mine = whole(kind)
    expected = fit(mine, mine.init(), steps=8, steps_per_epoch=8)
    found = fit(mine, mine.init(), steps=4, steps_per_epoch=8)
    found = fit(mine, found, steps=4, steps_per_epoch=2)
    assert_same(learned(found), learned(expected))
    assert losses(found) == losses(expected)


def test_steps_begin_with_the_pass_after_the_epochs_that_were_seen() -> None:
    mine = full()
    found = fit(mine, fit(mine, mine.init(), 1), steps=3)
    assert_same_run(found.replace(epoch=0), fit(mine, fit(mine, mine.init(), 1), 1))


def test_nothing_is_read_twice() -> None:
    data = Unsized()
    mine = learner(data=DataLoaders(data, batches(2, seed=2)))
    fit(mine, mine.init(), steps=7, steps_per_epoch=2)
    assert data.read == 7


def test_every_schedule_is_spread_over_the_steps() -> None:
    schedule = ParamScheduler({"lr": Linear(0.7, 0.0)})
    end = fit(learner(), learner().init(), steps=7, steps_per_epoch=2, callbacks=[schedule])
    assert list(end.history.hypers["lr"]) == [Linear(0.7, 0.0)(k / 7) for k in range(7)]
    assert end.pct_train == 1.0


@pytest.mark.parametrize("run", [fit_one_cycle, fit_flat_cos])
def test_recipes_of_schedules_take_steps(run: Any) -> None:
    mine = learner(opt=sgd(lr=0.5))
    by_steps = run(mine, mine.init(), steps=6)
    by_epochs = run(mine, mine.init(), 2, 0.5)
    assert list(by_steps.history.hypers["lr"]) == pytest.approx(
        list(by_epochs.history.hypers["lr"]), rel=1e-12
    )
    assert by_steps.train_iter == 6


@pytest.mark.parametrize("run", [fit_one_cycle, fit_flat_cos])
def test_the_highest_lr_is_that_of_the_state_before_a_schedule(run: Any) -> None:
    mine, bug = learner(opt=sgd(lr=0.5)), on("bug", after_step=raise_once(ZeroDivisionError, 3))
    with pytest.raises(ZeroDivisionError) as caught:
        run(mine, mine.init(), steps=6, callbacks=[bug])
    again = run(mine, caught.value.state, steps=6, resume=True)  # type: ignore[attr-defined]
    assert_same_run(again, run(mine, mine.init(), steps=6))


def test_a_state_without_lr_needs_one() -> None:
    mine = learner(opt=sgd())
    bare = mine.init().replace(hyper={})
    with pytest.raises(ValueError, match="^fit_one_cycle: lr is not given, and the state has none"):
        fit_one_cycle(mine, bare, steps=1)


def test_a_donated_state_sees_the_same() -> None:
    mine = full()
    end = fit(mine, mine.init(), steps=7, steps_per_epoch=2, donate=True)
    assert_same_run(end, fit(mine, mine.init(), steps=7, steps_per_epoch=2))


# What watches epochs.


def test_every_so_many_steps_are_compared_and_the_best_are_kept() -> None:
    """lr falls well at first, and then is far too high: the second measurement is the best."""
    schedule = ParamScheduler({"lr": lambda share: 0.1 if share < 0.5 else 9.0})
    mine = learner(opt=sgd())
    watching = [schedule, SaveModel(None), EarlyStopping()]
    end = fit(mine, mine.init(), steps=8, steps_per_epoch=2, callbacks=watching)
    assert train_iters(end) == [2, 4, 6]  # patience 1: the first that is worse ends it
    assert end.memory["save_model"]["epoch"] == 2
    assert_same(end.params, fit(mine, mine.init(), steps=4, lr=0.1).params)


# Going on.


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("per_epoch", [2, 4])
def test_a_run_resumed_from_every_place_ends_the_same(kind: str, per_epoch: int) -> None:
    mine = replace(whole(kind), callbacks=(Recorder(train_metrics=True),))
    length: dict[str, Any] = dict(steps=7, steps_per_epoch=per_epoch)
    kept = Kept()
    end = fit_one_cycle(mine, mine.init(seed=3), lr=0.05, callbacks=[kept], **length)
    for state in kept.states:
        again = fit_one_cycle(mine, state, lr=0.05, resume=True, **length)
        assert_same_run(again, end)
        assert again.position == end.position


def test_a_run_on_disk_goes_on(tmp_path: Path) -> None:
    mine = full()
    callbacks = [Checkpoint(tmp_path, batches=1)]
    bug = on("bug", after_step=raise_once(ZeroDivisionError, at=5))
    with pytest.raises(ZeroDivisionError):
        fit_one_cycle(mine, mine.init(), steps=8, lr=0.1, callbacks=[*callbacks, bug])
    end = fit_one_cycle(mine, mine.init(), steps=8, lr=0.1, callbacks=callbacks, resume=tmp_path)
    assert_same_run(end, fit_one_cycle(mine, mine.init(), steps=8, lr=0.1))


def test_a_run_of_another_length_is_refused() -> None:
    mine, kept = learner(), Kept()
    fit(mine, mine.init(), steps=7, steps_per_epoch=2, callbacks=[kept])
    state = kept.states[5]
    told = r"in a run of 7 steps in epochs of 2, so it cannot be resumed as one of {}\. "
    told += r"Pass steps=7, steps_per_epoch=2,"
    for length, words in (
        (dict(steps=8, steps_per_epoch=2), "8 steps in epochs of 2"),
        (dict(steps=7), "7 steps in epochs of 3"),
        (dict(epochs=4), "4 epochs"),
    ):
        with pytest.raises(ValueError, match=told.format(words)):
            fit(mine, state, resume=True, **length)  # type: ignore[arg-type]


def test_after_a_phase_that_was_cut_short_the_data_go_on_where_they_were() -> None:
    """A cancelled epoch leaves the pass where it is: no batch is left out."""
    seen: list[Any] = []

    def cancel(state: State) -> None:
        if state.training:
            seen.append(state.x)
            if state.iter == 1:
                raise CancelTrain

    mine = learner()
    fit(mine, mine.init(), steps=8, steps_per_epoch=4, callbacks=[on("c", after_loss=cancel)])
    xs = [x for x, _ in batches(3, seed=1)]
    assert_same(seen, [xs[0], xs[1], xs[2], xs[0]])


# Loaders that others use.


class OneIterator:
    """As a torch DataLoader with persistent workers: who iterates over it takes the iterator of
    all.
    """

    def __init__(self) -> None:
        self.batches, self._num_yielded = batches(3, seed=1), 0

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> "OneIterator":
        self._num_yielded = 0
        return self

    def __next__(self) -> Any:
        if self._num_yielded == 3:
            raise StopIteration
        self._num_yielded += 1
        return self.batches[self._num_yielded - 1]


def test_a_pass_whose_iterator_was_taken_is_opened_again() -> None:
    both = OneIterator()
    mine = learner(data=DataLoaders(both, both))
    other = learner(data=DataLoaders(batches(3, seed=1), batches(3, seed=1)))
    found = fit(mine, mine.init(), steps=8, steps_per_epoch=2)
    assert_same_run(found, fit(other, other.init(), steps=8, steps_per_epoch=2))


def test_persistent_workers() -> None:
    data = DataLoader(TensorDataset(X, Y), 8, num_workers=1, persistent_workers=True)
    mine = learner(net(), DataLoaders(data, data), opt=adamw(lr=0.01))
    alone = replace(mine, data=DataLoaders(DataLoader(TensorDataset(X, Y), 8)))
    expected = fit(alone, mine.init(), steps=5, steps_per_epoch=5)
    assert losses(fit(mine, mine.init(), steps=5, steps_per_epoch=2)) == losses(expected)


def test_the_pass_is_let_go_when_the_run_ends() -> None:
    closed = []

    class Watched:
        def __iter__(self) -> Iterator[Any]:
            try:
                yield from batches(3, seed=1)
            finally:
                closed.append(True)

    mine = learner(data=DataLoaders(Watched()))
    fit(mine, mine.init(), steps=2, steps_per_epoch=1)
    assert closed == [True]
