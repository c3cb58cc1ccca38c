"""Whole runs by name: flat then cosine, warm restarts, one batch over and over."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from functional_sgd import adamw, sgd
from functional_sgd.schedules import Linear, flat_cosine, warm_restarts
from loop import (
    DataLoaders,
    ParamScheduler,
    SingleBatch,
    State,
    fit,
    fit_flat_cos,
    fit_sgdr,
    overfit_one_batch,
    trace,
)
from loop.training.batch import first_batch
from tests.comparing import assert_same
from tests.loop.helpers import (
    KINDS,
    Kept,
    full,
    learned,
    learner,
    loaders,
    losses,
    on,
    raiser,
    shuffled,
)

FOUR = learner(data=loaders(train=4, valid=None))


def lrs(state: State) -> list[float]:
    return list(state.history.hypers["lr"])


def test_flat_then_cosine_as_fastai_records_it() -> None:
    """2 epochs of 4 batches."""
    assert lrs(fit_flat_cos(FOUR, FOUR.init(), 2, lr=0.1)) == pytest.approx(
        [0.1] * 7 + [0.0500005], rel=1e-6
    )


def test_flat_then_cosine_leaves_momentum_alone() -> None:
    assert set(fit_flat_cos(FOUR, FOUR.init(), 2, lr=0.1).history.hypers["mom"]) == {0.9}


def test_flat_then_cosine_is_a_schedule_like_any_other() -> None:
    expected = fit(FOUR, FOUR.init(), 3, [ParamScheduler({"lr": flat_cosine(0.1, 10.0, 0.5)})])
    found = fit_flat_cos(FOUR, FOUR.init(), 3, 0.1, div_final=10.0, pct_start=0.5)
    assert_same(learned(found), learned(expected))
    assert lrs(found)[6:8] == pytest.approx([0.1, 0.1 - 0.09 * (1 - math.cos(math.pi / 6)) / 2])


def test_warm_restarts_as_fastai_records_them() -> None:
    """Cycles of 1 and 2 epochs of 4 batches."""
    expected = [
        0.1, 0.08535534, 0.05, 0.01464466,
        0.1, 0.09619398, 0.08535534, 0.06913418, 0.04999999, 0.03086583, 0.01464466, 0.00380602,
    ]  # fmt: skip
    end = fit_sgdr(FOUR, FOUR.init(), cycles=2, cycle_length=1, lr=0.1)
    assert lrs(end) == pytest.approx(expected, rel=1e-6)
    assert lrs(end)[4] == 0.1
    assert end.n_epoch == 3


@pytest.mark.parametrize(
    ("cycles", "length", "mult", "epochs"), [(1, 3, 2, 3), (3, 1, 2, 7), (2, 2, 3, 8), (3, 2, 1, 6)]
)
def test_how_many_epochs_warm_restarts_take(
    cycles: int, length: int, mult: int, epochs: int
) -> None:
    end = fit_sgdr(FOUR, FOUR.init(), cycles, length, 0.1, cycle_mult=mult)
    assert end.n_epoch == end.epochs_seen == epochs
    tops = [index // 4 for index, lr in enumerate(lrs(end)) if lr == 0.1]
    assert tops == [sum(length * mult**i for i in range(cycle)) for cycle in range(cycles)]


@pytest.mark.parametrize(("cycles", "first", "mult"), [(1, 5, 2), (3, 3, 2), (2, 7, 3), (4, 6, 1)])
def test_cycles_may_be_counted_in_steps(cycles: int, first: int, mult: int) -> None:
    end = fit_sgdr(FOUR, FOUR.init(), cycles, lr=0.1, cycle_mult=mult, cycle_steps=first)
    assert end.n_step == end.train_iter == sum(first * mult**cycle for cycle in range(cycles))
    tops = [index for index, lr in enumerate(lrs(end)) if lr == 0.1]
    assert tops == [sum(first * mult**i for i in range(cycle)) for cycle in range(cycles)]


def test_the_lr_of_warm_restarts_is_by_default_that_of_the_state() -> None:
    start = FOUR.init()
    start = start.replace(hyper={**start.hyper, "lr": 0.3})
    assert lrs(fit_sgdr(FOUR, start, 1, 1))[0] == 0.3


@pytest.mark.parametrize(("length", "steps"), [(None, None), (1, 5)])
def test_cycles_have_one_length(length: int | None, steps: int | None) -> None:
    with pytest.raises(ValueError, match="fit_sgdr: expected one of cycle_length .* and cycle_st"):
        fit_sgdr(FOUR, FOUR.init(), 2, length, 0.1, cycle_steps=steps)


def test_warm_restarts_of_equal_length() -> None:
    end = fit_sgdr(FOUR, FOUR.init(), 2, 1, lr=0.1, cycle_mult=1)
    assert lrs(end) == pytest.approx([0.1, 0.08535534, 0.05, 0.01464466] * 2, rel=1e-6)


def test_warm_restarts_are_a_schedule_like_any_other() -> None:
    expected = fit(FOUR, FOUR.init(), 3, [ParamScheduler({"lr": warm_restarts(0.1, 2, 2)})])
    assert_same(learned(fit_sgdr(FOUR, FOUR.init(), 2, 1, 0.1)), learned(expected))


@pytest.mark.parametrize(
    ("cycles", "length", "mult", "name"),
    [(0, 1, 2, "cycles"), (1, 0.5, 2, "cycle_length"), (2, 1, 0, "cycle_mult")],
)
def test_cycles_are_whole_numbers(cycles: Any, length: Any, mult: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"fit_sgdr: {name} must be a whole number"):
        fit_sgdr(FOUR, FOUR.init(), cycles, length, 0.1, mult)


RECIPES = [
    lambda lr, **options: fit_flat_cos(FOUR, FOUR.init(), 3, lr, **options),
    lambda lr, **options: fit_sgdr(FOUR, FOUR.init(), 2, 1, lr, **options),
]


@pytest.mark.parametrize("run", RECIPES, ids=["flat_cos", "sgdr"])
def test_a_learning_rate_for_each_layer(run: Any) -> None:
    values = run({"weight": 0.1, "bias": 0.5}).history.hypers["lr"]
    assert [value["bias"] / value["weight"] for value in values] == pytest.approx([5.0] * 12)


@pytest.mark.parametrize("run", RECIPES, ids=["flat_cos", "sgdr"])
def test_callbacks_and_hypers_are_handed_on(run: Any) -> None:
    """And lr is put back after the run, while a hyper given stays."""
    end = run(0.1, callbacks=[SingleBatch()], mom=0.5)
    assert lrs(end) == [0.1]
    assert end.hyper == {"lr": 0.1, "mom": 0.5}
    assert list(end.history.hypers["mom"]) == [0.5]


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_batch_is_the_one_that_a_run_begins_with(kind: str) -> None:
    mine = learner(data=shuffled(kind))
    state = mine.init(seed=4).replace(epochs_seen=2)
    seen: list[Any] = []
    fit(
        mine,
        state,
        1,
        [on(before_batch=lambda state: seen.append((state.xb, state.yb))), SingleBatch()],
    )
    before = torch.get_rng_state()
    found = first_batch(mine, state)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(found, seen[0])


def test_the_first_batch_is_that_of_epochs_wherever_steps_have_ended() -> None:
    """A run of epochs begins a pass; one of steps goes on with the pass at hand."""
    middle = fit(FOUR, FOUR.init(), steps=3)
    seen: list[Any] = []
    look = [on(before_batch=lambda state: seen.append((state.xb, state.yb))), SingleBatch()]
    fit(FOUR, middle, 1, look)
    fit(FOUR, middle, steps=1, callbacks=look)
    batches = [((x,), (y,)) for x, y in FOUR.data.train]
    assert_same([first_batch(FOUR, middle), *seen], [batches[0], batches[0], batches[3]])


def test_the_first_batch_is_that_of_the_data() -> None:
    """No callback of the learner is called."""
    mine = learner(callbacks=[on(before_fit=raiser(ValueError))])
    x, y = mine.data.train[0]  # type: ignore[index]
    assert_same(first_batch(mine, mine.init()), ((x,), (y,)))


def test_the_first_batch_of_empty_data_is_an_error() -> None:
    mine = learner(data=DataLoaders([]))
    with pytest.raises(ValueError, match="data.train is empty"):
        first_batch(mine, mine.init())


def test_n45_one_batch_over_and_over() -> None:
    """Every step sees the same samples; nothing is validated; the net learns them by heart."""
    seen: list[tuple[Tensor, Tensor]] = []
    spy = on(before_batch=lambda state: seen.append((state.x, state.y)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wide = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 2))
    mine = learner(wide, shuffled("Batches"), opt=adamw(lr=0.03, wd=0.0))
    end = overfit_one_batch(mine, mine.init(), steps=150, callbacks=[spy])
    assert len(seen) == len(losses(end)) == end.train_iter == 150
    assert all(torch.equal(x, seen[0][0]) and torch.equal(y, seen[0][1]) for x, y in seen)
    assert losses(end)[-1] < 0.01 * losses(end)[0]
    assert "valid_loss" not in end.history.rows[0]


def test_one_batch_is_plain_training_on_it() -> None:
    mine = learner(opt=sgd())
    alone = replace(mine, data=DataLoaders([mine.data.train[0]] * 5))  # type: ignore[index]
    found = overfit_one_batch(mine, mine.init(), steps=5, lr=0.3)
    assert_same(learned(found), learned(fit(alone, alone.init(), 1, lr=0.3)))


def test_one_batch_with_a_schedule() -> None:
    end = overfit_one_batch(
        FOUR, FOUR.init(), 4, callbacks=[ParamScheduler({"lr": Linear(0.0, 1.0)})]
    )
    assert lrs(end) == [0, 0.25, 0.5, 0.75]


def test_one_batch_leaves_the_state_alone() -> None:
    mine = full()
    state = mine.init()
    kept, before = Kept(state), torch.get_rng_state()
    overfit_one_batch(mine, state, steps=3)
    kept.check()
    assert torch.equal(torch.get_rng_state(), before)
    assert next(iter(trace(mine, state)))[1].train_iter == 0


@pytest.mark.parametrize("steps", [0, 1.5])
def test_one_batch_no_times(steps: Any) -> None:
    with pytest.raises(ValueError, match="steps must be a whole number"):
        overfit_one_batch(FOUR, FOUR.init(), steps)
