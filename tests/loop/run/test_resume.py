"""A run that is stopped anywhere and gone on with ends as if it had never been stopped, bit for
bit.
"""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from functional_sgd.schedules import one_cycle
from loop import (
    Callback,
    CancelBatch,
    CancelEpoch,
    CancelTrain,
    CancelValidate,
    DataLoaders,
    Learner,
    ParamScheduler,
    Recorder,
    State,
    fit,
    trace,
)
from loop.run.machine import Run
from tests.loop.helpers import (
    KINDS,
    assert_at_rest,
    assert_same_run,
    batches,
    everywhere,
    full,
    learner,
    on,
)

EPOCHS = 2


@dataclass(frozen=True)
class Counting(Callback):
    """Remembers how often each event has been delivered."""

    def __getattr__(self, event: str) -> Any:
        if not event.startswith(("before_", "after_")):
            raise AttributeError(event)

        def count(state: State) -> State:
            counts = state.memory.get("counting", {})
            return state.remember("counting", {**counts, event: counts.get(event, 0) + 1})

        return count


class Kept(Callback):
    """Keeps every committed state."""

    reports = True

    def __init__(self) -> None:
        self.states: list[State] = []

    def committed(self, state: State) -> None:
        self.states.append(state.at_rest())


def callbacks() -> list[Any]:
    return [ParamScheduler({"lr": one_cycle(0.05)}), Counting()]


def committed(mine: Learner, start: State, extra: Any = ()) -> tuple[list[State], State]:
    """Every state that the run can be resumed from, and its end."""
    kept = Kept()
    end = fit(mine, start, EPOCHS, [*callbacks(), *extra, kept])
    return kept.states, end


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumed_from_every_place_ends_the_same(kind: str) -> None:
    mine = full(kind, callbacks=[Recorder(train_metrics=True)])
    start = mine.init(seed=3)
    states, end = committed(mine, start)
    # before_fit; for each of 2 epochs: before_epoch, before_train, 3 batches, train,
    # before_validate, 2 batches, validate, epoch
    assert len(states) == 1 + EPOCHS * 11
    for state in states:
        again = fit(mine, state, EPOCHS, callbacks(), resume=True)
        assert_same_run(again, end)
        assert again.memory["counting"] == end.memory["counting"]
        assert again.done == ()


def test_what_is_done_says_where_the_run_is() -> None:
    states, _ = committed(learner(), learner().init())
    paths = [state.done for state in states]
    epoch = [(0,), (0, 0), (0, 1), (0, 2), (0, 3), (1,), (1, 0), (1, 1), (1, 2), (2,)]
    assert paths == [
        (0,),
        *((0, *rest) for rest in epoch),
        (1,),
        *((1, *rest) for rest in epoch),
        (2,),
    ]


def test_the_sequence_of_events_goes_on_where_it_stopped() -> None:
    mine = learner()
    whole = [event for event, _ in trace(mine, mine.init(), EPOCHS)]
    for state in committed(mine, mine.init())[0]:
        rest = [event for event, _ in trace(mine, state, EPOCHS, callbacks(), resume=True)]
        assert rest == whole[len(whole) - len(rest) :]
        assert 0 < len(rest) < len(whole)


@pytest.mark.parametrize("signal", [CancelBatch, CancelTrain, CancelValidate, CancelEpoch])
def test_cancelled_scopes_are_resumed_too(signal: type[Exception]) -> None:
    def cancel(state: State) -> None:
        if state.iter == 1 and (state.training is not (signal is CancelValidate)):
            raise signal

    mine = full()
    extra = [on("canceller", after_loss=cancel)]
    states, end = committed(mine, mine.init(), extra)
    for state in states:
        assert_same_run(fit(mine, state, EPOCHS, [*callbacks(), *extra], resume=True), end)


def test_after_every_event_that_stops_a_run_it_goes_on_the_same() -> None:
    mine = full()
    start = mine.init()
    end = fit(mine, start, EPOCHS, callbacks())
    events = len(list(trace(mine, start, EPOCHS, callbacks())))
    for count in range(1, events):
        left = iter(range(count))
        run = Run(mine, replace(start, n_epoch=EPOCHS), callbacks=[Recorder(), *callbacks()])
        stopped = run.to_end(lambda left=left: next(left, None) is None)
        assert_at_rest(stopped)
        if stopped.done:
            assert_same_run(fit(mine, stopped, EPOCHS, callbacks(), resume=True), end)
        else:
            assert stopped.train_iter == 0


def test_after_an_error_the_run_can_go_on() -> None:
    mine = full()
    end = fit(mine, mine.init(), EPOCHS, callbacks())

    def fail(state: State) -> None:
        if state.train_iter == 4:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        fit(mine, mine.init(), EPOCHS, [*callbacks(), on(after_step=fail)])
    assert caught.value.state.train_iter == 4  # type: ignore[attr-defined]
    assert_same_run(fit(mine, caught.value.state, EPOCHS, callbacks(), resume=True), end)  # type: ignore[attr-defined]


def test_brackets_are_open_in_a_resumed_run() -> None:
    log: list[str] = []

    def bracket(name: str) -> Callable[[State], Any]:
        @contextmanager
        def around(state: State) -> Iterator[None]:
            log.append(f"open {name}")
            yield
            log.append(f"close {name}")

        return around

    mine = learner()
    state = next(state for state in committed(mine, mine.init())[0] if state.done == (1, 0, 2))
    fit(
        mine,
        state,
        EPOCHS,
        [*callbacks(), on("b", around_fit=bracket("fit"), around_train=bracket("train"))],
        resume=True,
    )
    assert log == ["open fit", "open train", "close train", "close fit"]


def test_while_a_learner_is_lent_the_run_cannot_be_resumed_there() -> None:
    """Other data for the second epoch: nobody would lend them again, so the epoch begins anew."""
    mine = learner()
    other = replace(mine, data=DataLoaders(batches(2, seed=9)))
    lend = on(
        "lender",
        before_epoch=lambda state: state.replace(learner=other) if state.epoch == 1 else None,
    )
    states, end = committed(mine, mine.init(), [lend])
    assert [state.done for state in states if state.done[0] == 1 and len(state.done) > 1] == []
    for state in states:
        assert_same_run(fit(mine, state, EPOCHS, [*callbacks(), lend], resume=True), end)


def test_states_within_a_batch_are_in_no_run() -> None:
    """A traced state in the middle of a batch must not be gone on with as if the batch had not
    begun.
    """
    mine = full()
    start = mine.init()
    end = fit(mine, start, EPOCHS, callbacks())
    for _, state in trace(mine, start, EPOCHS, callbacks()):
        if state.xb is not None:
            assert state.done == ()
        elif state.done:
            assert_same_run(fit(mine, state.at_rest(), EPOCHS, callbacks(), resume=True), end)


def test_observers_see_what_a_run_can_be_resumed_from_and_only_that() -> None:
    seen: list[str] = []
    order: list[str] = []
    spy = everywhere(lambda event, state: order.append(event))
    observer = on("observer", committed=lambda state: seen.append(order[-1]))
    fit(learner(), learner().init(), 1, [spy, observer])
    assert (
        seen
        == (
            "before_fit before_epoch before_train after_batch after_batch after_batch after_train "
            "before_validate after_batch after_batch after_validate after_epoch"
        ).split()
    )


def test_the_error_of_an_observer_says_where() -> None:
    def bad(state: State) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full") as caught:
        fit(learner(), learner().init(), 1, [on("observer", committed=bad)])
    assert "by callback 'observer' in committed" in caught.value.__notes__[0]


def test_old_states_do_not_live_as_long_as_the_run() -> None:
    """Within a run, the machine holds the state at hand and the committed one, not that of the
    epoch's start.
    """
    mine = full()
    alive: list[tuple[int, int]] = []
    refs: list[Any] = []

    def look(state: State) -> None:
        if not state.training:
            return
        refs.append(weakref.ref(state.params["0.weight"]))
        gc.collect()
        alive.append((len(refs), sum(ref() is not None for ref in refs)))

    fit(mine, mine.init(), 2, [on(after_batch=look)])
    assert max(count for _, count in alive) <= 3, alive


def test_torch_is_seeded_by_place_not_by_history() -> None:
    mine = full()
    state = next(state for state in committed(mine, mine.init())[0] if state.done == (1, 0, 1))
    torch.manual_seed(99)
    first = fit(mine, state, EPOCHS, callbacks(), resume=True)
    torch.manual_seed(7)
    assert_same_run(first, fit(mine, state, EPOCHS, callbacks(), resume=True))
