"""The same state gives the same next state, bit for bit; and a run leaves nothing behind but its
result.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from loop import CancelFit, Learner, State, fit, predict, trace, validate
from tests.comparing import Untouched, assert_same
from tests.loop.helpers import (
    KINDS,
    Kept,
    assert_at_rest,
    assert_same_run,
    full,
    learned,
    losses,
    on,
    raise_once,
)


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_from_one_state_are_equal(kind: str) -> None:
    mine = full(kind)
    start = mine.init(seed=1)
    first = fit(mine, start, 2)
    torch.rand(3)
    assert_same_run(fit(mine, start, 2), first)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_in_parts_is_the_run_in_one(kind: str) -> None:
    mine = full(kind)
    start = mine.init()
    whole, parts = fit(mine, start, 5), start
    for _ in range(5):
        parts = fit(mine, parts, 1)
    assert_same(learned(parts), learned(whole))
    assert losses(parts) == losses(whole)
    assert (parts.train_iter, parts.epochs_seen) == (whole.train_iter, whole.epochs_seen)


def test_equal_learners_made_twice_run_equally() -> None:
    first, second = full(), full()
    assert_same_run(fit(first, first.init(), 2), fit(second, second.init(), 2))


def test_the_first_state_is_untouched() -> None:
    mine = full()
    start = mine.init()
    kept = Kept(start)
    fit(mine, start, 2, lr=0.5)
    kept.check()


def test_a_state_in_the_middle_is_untouched_by_two_continuations() -> None:
    mine = full()
    middle = fit(mine, mine.init(), 1)
    kept = Kept(middle)
    first, second = fit(mine, middle, 1, lr=0.5), fit(mine, middle, 1)
    kept.check()
    assert losses(first)[:3] == losses(second)[:3] == losses(middle)
    assert losses(first) != losses(second)


def test_seeds_make_a_difference() -> None:
    mine = full()
    assert losses(fit(mine, mine.init(seed=0), 1)) != losses(fit(mine, mine.init(seed=1), 1))


def test_fit_is_trace_drained() -> None:
    mine = full()
    events: list[str] = []
    running = trace(mine, mine.init(), 2)
    while True:
        try:
            events.append(next(running)[0])
        except StopIteration as end:
            traced = end.value
            break
    assert_same_run(traced, fit(mine, mine.init(), 2))
    assert_at_rest(traced)
    assert events.count("after_step") == 6


def test_two_traces_in_turns_are_two_runs() -> None:
    mine = full()
    pair = [trace(mine, mine.init(seed), 2) for seed in (0, 1)]
    ends: list[State] = []
    while len(ends) < 2:
        for running in pair:
            try:
                next(running)
            except StopIteration as end:
                ends.append(end.value)
    for seed, end in enumerate(ends):
        assert_same_run(end, fit(mine, mine.init(seed), 2))


def test_random_numbers_drawn_by_a_callback_change_nothing() -> None:
    def draw(state: State) -> None:
        torch.rand(7)

    mine = full()
    assert_same_run(fit(mine, mine.init(), 2, [on(before_batch=draw)]), fit(mine, mine.init(), 2))


def outside(mine: Learner) -> tuple[Any, ...]:
    """Everything about the process and the model that a run might disturb."""
    return (
        torch.random.get_rng_state().tolist(),
        [layer.training for layer in mine.model.modules()],
        torch.is_grad_enabled(),
        [value.grad for value in mine.model.parameters()],
        [value.requires_grad for value in mine.model.parameters()],
    )


def normal(mine: Learner, start: State) -> None:
    fit(mine, start, 2)


def signalled(mine: Learner, start: State) -> None:
    fit(mine, start, 2, [on(after_loss=raise_once(CancelFit, at=1))])


def failing(mine: Learner, start: State) -> None:
    with pytest.raises(ZeroDivisionError):
        fit(mine, start, 2, [on(after_loss=raise_once(ZeroDivisionError, at=4))])


def traced(mine: Learner, start: State) -> None:
    running = trace(mine, start, 2)
    next(event for event, _ in running if event == "after_loss")
    running.close()


def validated(mine: Learner, start: State) -> None:
    validate(mine, start)


def predicted(mine: Learner, start: State) -> None:
    predict(mine, start)


WAYS = [normal, signalled, failing, traced, validated, predicted]


@pytest.mark.parametrize("way", WAYS)
def test_the_surroundings_are_as_before(way: Callable[..., None]) -> None:
    mine = full()
    mine.model.eval()
    mine.model[3].train()  # a mixture that no phase has
    before = outside(mine)
    way(mine, mine.init())
    assert outside(mine) == before


@pytest.mark.parametrize("way", WAYS)
def test_the_models_own_tensors_are_untouched(way: Callable[..., None]) -> None:
    mine = full()
    kept = Untouched(dict(mine.model.state_dict()))
    way(mine, mine.init())
    kept.check()


@pytest.mark.parametrize("way", WAYS)
def test_no_way_to_run_touches_its_state(way: Callable[..., None]) -> None:
    mine = full()
    start = fit(mine, mine.init(), 1)
    kept = Kept(start)
    way(mine, start)
    kept.check()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_a_run_does_not_depend_on_the_grad_mode_around_it(mode: Callable[[], Any]) -> None:
    mine = full()
    expected = fit(mine, mine.init(), 1)
    with mode():
        before = torch.is_grad_enabled()
        assert_same_run(fit(mine, mine.init(), 1), expected)
        assert torch.is_grad_enabled() == before
