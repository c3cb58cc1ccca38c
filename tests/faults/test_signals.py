"""Signals at every event of a run: it ends with a checkpoint, and goes on to the same end."""

import os
import signal
from pathlib import Path

import pytest

from loop import Checkpoint, State, fit, load_latest
from loop.disk.store import checkpoints
from tests.faults.places import LONG
from tests.loop.helpers import everywhere, full
from tests.loop.saving import identical

MINE = full()
START = MINE.init()
END = fit(MINE, START, 2)
EVENTS = 78  # of a run of two epochs of three and two batches


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", range(0, EVENTS, 1 if LONG else 3))
def test_a_run_that_gets_a_signal_at_an_event_goes_on_to_the_same_end(
    tmp_path: Path, at: int, number: int
) -> None:
    count = 0

    def press(event: str, state: State) -> None:
        nonlocal count
        count += 1
        if count - 1 == at:
            os.kill(os.getpid(), number)

    spy = everywhere(press)
    spy.reports = True
    stopped = fit(MINE, START, 2, [Checkpoint(tmp_path), spy], stop="return")
    assert stopped.stopped == signal.Signals(number).name
    if checkpoints(tmp_path):
        assert identical(vars(load_latest(tmp_path)), vars(stopped.replace(stopped="")))
    assert identical(vars(fit(MINE, START, 2, resume=tmp_path)), vars(END))


def test_the_events_are_all_of_them() -> None:
    count = 0

    def see(event: str, state: State) -> None:
        nonlocal count
        count += 1

    fit(MINE, START, 2, [everywhere(see)])
    assert count == EVENTS
