"""Ctrl-C and SIGTERM end a run between two events, with whole batches only, and the script unless
it asks for the state; handlers are as before afterwards.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from loop import DataLoaders, Progress, State, fit, predict, trace, validate
from tests.comparing import assert_same
from tests.loop.helpers import (
    assert_at_rest,
    assert_same_run,
    batches,
    everywhere,
    learned,
    learner,
    losses,
    on,
)

MINE = learner()
START = MINE.init()
SIGNALS = [signal.SIGINT, signal.SIGTERM]
halted = partial(fit, stop="return")


def send(number: int, at_batch: int = 1, times: int = 1) -> Callable[[State], None]:
    """A handler that sends this process a signal, in one training batch."""

    def act(state: State) -> None:
        if state.train_iter == at_batch:
            for _ in range(times):
                os.kill(os.getpid(), number)

    return act


@pytest.fixture(autouse=True)
def _handlers_are_put_back() -> Iterator[None]:
    every = [*SIGNALS, signal.SIGCHLD]
    before = [signal.getsignal(number) for number in every]
    yield
    assert [signal.getsignal(number) for number in every] == before


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("event", ["before_batch", "after_loss", "after_step"])
def test_the_run_ends_at_the_next_transition(event: str, number: int) -> None:
    seen: list[str] = []
    spy = everywhere(lambda name, state: seen.append(name), "all", order=100)
    end = halted(MINE, START, 3, [on(**{event: send(number)}), spy])
    assert seen[-1] == event
    assert end.train_iter == 1
    assert len(end.history.losses) == 1


@pytest.mark.parametrize("number", SIGNALS)
def test_the_state_of_the_last_whole_batch_is_returned(number: int) -> None:
    """Stopped in the second batch, after the step: the state of a trace up to the end of
    the first.
    """
    expected = next(state for event, state in trace(MINE, START, 3) if event == "after_batch")
    end = halted(MINE, START, 3, [on(after_step=send(number))])
    assert_same(learned(end), learned(expected))
    assert losses(end) == losses(expected)
    assert_at_rest(end)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_state_says_what_stopped_it(number: int) -> None:
    assert (
        halted(MINE, START, 3, [on(after_step=send(number))]).stopped == signal.Signals(number).name
    )


def test_a_run_that_was_not_stopped_says_so() -> None:
    stopped = halted(MINE, START, 3, [on(after_step=send(signal.SIGINT))])
    assert fit(MINE, stopped, 1).stopped == fit(MINE, START, 1).stopped == ""


def test_a_stopped_run_can_be_gone_on_with() -> None:
    stopped = halted(MINE, START, 3, [on(after_batch=send(signal.SIGINT, at_batch=3))])
    assert stopped.train_iter == 2
    assert fit(MINE, stopped, 1).train_iter == 5


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(MINE, START, 3, [on(after_step=send(signal.SIGINT, times=2))])


def test_brackets_close_when_a_run_is_stopped() -> None:
    log: list[str] = []

    @contextmanager
    def around(state: State) -> Iterator[None]:
        log.append("open")
        yield
        log.append("never here when stopped")

    @contextmanager
    def closing(state: State) -> Iterator[None]:
        try:
            yield
        finally:
            log.append("closed")

    halted(
        MINE,
        START,
        3,
        [
            on("a", around_fit=around),
            on("b", around_step=closing),
            on(before_step=send(signal.SIGINT)),
        ],
    )
    assert log == ["open", "closed", "closed"]


def test_the_model_keeps_its_mode_when_a_run_is_stopped() -> None:
    MINE.model.eval()
    halted(MINE, START, 3, [on(after_step=send(signal.SIGINT)), Progress()])
    assert not MINE.model.training


def test_handlers_are_put_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError):
        fit(MINE, START, 3, [on(after_step=lambda state: 1 / 0)])


@pytest.mark.parametrize("look", [validate, predict])
def test_numbers_that_are_not_finished_are_not_returned(look: Callable[..., object]) -> None:
    """A mean over half of the data must not look like one over all of it."""
    mine = learner(callbacks=[on(before_batch=send(signal.SIGINT, at_batch=0))])
    with pytest.raises(KeyboardInterrupt):
        look(mine, START)


def test_a_run_in_another_thread_is_the_same_run() -> None:
    ends: list[State] = []
    thread = threading.Thread(target=lambda: ends.append(fit(MINE, START, 1)))
    thread.start()
    thread.join()
    assert_same_run(ends[0], fit(MINE, START, 1))


def test_a_trace_does_not_listen_to_signals() -> None:
    before = signal.getsignal(signal.SIGINT)
    running = trace(MINE, START, 1)
    next(running)
    assert signal.getsignal(signal.SIGINT) is before
    running.close()


@pytest.mark.parametrize("event", ["before_batch", "after_loss", "after_step", "committed"])
def test_what_fails_after_the_signal_is_not_raised(event: str) -> None:
    """Such as a loader whose processes got the signal too: the state of the last whole batch is
    returned.
    """

    def act(state: State) -> None:
        if state.train_iter == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            raise OSError("a worker is gone")

    end = halted(MINE, START, 3, [on(**{event: act})])
    assert (end.train_iter, end.stopped) == (1, "SIGTERM")
    assert_same_run(fit(MINE, end, 3, resume=True), fit(MINE, START, 3))


def test_what_failed_before_the_signal_is_raised() -> None:
    """Ctrl-C, pressed while brackets close, must not hide why they do."""

    @contextmanager
    def closing(state: State) -> Iterator[None]:
        try:
            yield
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(ZeroDivisionError):
        fit(MINE, START, 3, [on(around_fit=closing, after_step=lambda state: 1 / 0)])


def test_a_bracket_that_fails_to_close_after_the_signal_is_an_error() -> None:
    @contextmanager
    def closing(state: State) -> Iterator[None]:
        try:
            yield
        finally:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fit(MINE, START, 3, [on(around_fit=closing, after_step=send(signal.SIGINT))])


@pytest.mark.parametrize("stopped", [False, True])
def test_the_end_of_a_worker_is_an_error_only_if_the_run_was_not_stopped(stopped: bool) -> None:
    """torch raises it from a handler of SIGCHLD, whatever is being done."""
    calls: list[int] = []

    def heard(*_: object) -> None:
        calls.append(1)
        raise RuntimeError("DataLoader worker is killed by signal: Terminated.")

    def act(state: State) -> None:
        if stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGCHLD)

    before = signal.signal(signal.SIGCHLD, heard)
    try:
        if stopped:
            assert halted(MINE, START, 3, [on(after_step=act)]).stopped == "SIGTERM"
        else:
            with pytest.raises(RuntimeError, match="worker is killed"):
                fit(MINE, START, 3, [on(after_step=act)])
        assert signal.getsignal(signal.SIGCHLD) is heard
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert calls == [1]


RAISED = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}


@pytest.mark.parametrize("number", SIGNALS)
def test_fit_raises_what_the_signal_stands_for_with_the_state_on_it(number: signal.Signals) -> None:
    """So that one Ctrl-C ends a script of several fits, and nothing that was learned is lost."""
    act = on(after_step=send(number))
    with pytest.raises(RAISED[number]) as caught:
        fit(MINE, START, 3, [act])
    state: State = caught.value.state  # type: ignore[attr-defined]
    assert state.stopped == number.name
    assert_same_run(state, halted(MINE, START, 3, [act]))
    assert_same_run(fit(MINE, state, 3, resume=True), fit(MINE, START, 3))


def test_sigterm_ends_the_process_with_143() -> None:
    with pytest.raises(SystemExit) as caught:
        fit(MINE, START, 3, [on(after_step=send(signal.SIGTERM))])
    assert caught.value.code == 128 + signal.SIGTERM == 143


def test_an_unknown_way_to_stop() -> None:
    with pytest.raises(ValueError, match="fit: stop must be 'raise' or 'return', got 'no'"):
        fit(MINE, START, 3, stop="no")  # type: ignore[arg-type]


def inside(**options: Any) -> Callable[[State], None]:
    """A handler that trains another learner, and is interrupted in there, at the second batch."""

    def act(state: State) -> None:
        if state.train_iter == 1:
            fit(MINE, START, 2, [on(after_step=send(signal.SIGINT))], **options)

    return act


@pytest.mark.parametrize("options", [{}, {"stop": "return"}], ids=["raise", "return"])
def test_a_signal_in_a_fit_within_a_fit_ends_both(options: dict[str, Any]) -> None:
    """Whatever the inner one does: it is the same Ctrl-C. The state is that of the outer run."""
    end = halted(MINE, START, 3, [on(before_batch=inside(**options))])
    assert (end.stopped, end.train_iter, end.n_epoch) == ("SIGINT", 1, 3)
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(MINE, START, 3, [on(before_batch=inside(**options))])
    assert_same_run(caught.value.state, end)  # type: ignore[attr-defined]


def test_brackets_of_the_outer_fit_close_too() -> None:
    log: list[str] = []

    @contextmanager
    def around(state: State) -> Iterator[None]:
        try:
            yield
        finally:
            log.append("closed")

    with pytest.raises(KeyboardInterrupt):
        fit(MINE, START, 3, [on("a", around_fit=around), on(before_batch=inside())])
    assert log == ["closed"]


@pytest.mark.parametrize("number", SIGNALS)
def test_an_ignored_signal_stays_ignored(number: int) -> None:
    """As nohup has it for SIGINT, and a shell for its background jobs."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert fit(MINE, START, 1, [on(after_step=send(number))]).train_iter == 3
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_handler_that_python_did_not_set_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python says None for a handler of C code, and could not put it back: TypeError
    after the run.
    """
    set_by_fit: list[int] = []
    real = signal.signal
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(
        signal, "signal", lambda number, handler: set_by_fit.append(number) or real(number, handler)
    )
    assert fit(MINE, START, 1).train_iter == 3
    assert set_by_fit == []
    monkeypatch.undo()


class Hanging:
    """Two batches, and then nothing, for a long time."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Any]:
        yield from batches(2, seed=1)
        threading.Event().wait(60)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_loader_that_hangs_is_left_at_once(number: signal.Signals) -> None:
    mine = learner(data=DataLoaders(Hanging()))
    timer = threading.Timer(0.3, os.kill, (os.getpid(), number))
    timer.start()
    began = time.monotonic()
    end = halted(mine, mine.init(), 1)
    timer.join()
    assert time.monotonic() - began < 20
    assert (end.stopped, end.train_iter) == (number.name, 2)
    assert_at_rest(end)


class Asleep(Dataset[Any]):
    """Samples of which the fifth does not come."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        if index == 4:
            time.sleep(60)
        return torch.ones(2), torch.ones(2)


def test_so_is_one_whose_process_hangs() -> None:
    data = DataLoader(Asleep(), batch_size=2, num_workers=1)
    mine = learner(data=DataLoaders(data))
    child = signal.getsignal(signal.SIGCHLD)
    timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    began = time.monotonic()
    end = halted(mine, mine.init(), 1)
    timer.join()
    signal.signal(signal.SIGCHLD, child)  # torch sets its own for good, with the first process
    assert time.monotonic() - began < 30
    assert end.stopped == "SIGTERM"
    assert end.train_iter <= 2
