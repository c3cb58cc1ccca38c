"""Processes that train with a Checkpoint are killed and stopped; those that follow them go on, to
the same end.
"""

import json
import os
import signal
from typing import Any

import pytest

from tests.processes import python

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script says; a process of its own, since this one may have threads, and fork."""
    folder = tmp_path_factory.mktemp("runs")
    done = python("-W", "error", "-m", "tests.loop.checkpoint_script", folder)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results


def test_a_run_killed_again_and_again_ends_the_same(found: dict[str, Any]) -> None:
    """kill -9 at random moments, after one to four batches each time: within batches and within
    writing.
    """
    killed = found["killed"]
    assert killed["kills"] >= 20
    assert killed["same"]


def test_nothing_that_was_kept_is_lost_by_killing(found: dict[str, Any]) -> None:
    done = found["killed"]["done"]
    assert done == sorted(done)
    assert done[-1] > 90


def test_killed_processes_leave_nothing_behind(found: dict[str, Any]) -> None:
    assert (found["killed"]["left over"], found["killed"]["kept"]) == ([], 3)


def test_a_process_that_is_stopped_exits_by_itself_with_a_checkpoint(found: dict[str, Any]) -> None:
    """In the middle of the second batch of each process: the first is kept, the second is not."""
    numbers = [int(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert found["stopped"]["codes"] == [*(numbers * 4)[:7], 0]
    assert found["stopped"]["done"] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_run_stopped_again_and_again_ends_the_same(found: dict[str, Any]) -> None:
    assert found["stopped"]["same"]


def test_a_run_whose_workers_get_the_signal_too_is_stopped(found: dict[str, Any]) -> None:
    """As when Ctrl-C is pressed in a terminal, or a batch system ends a job: whatever the workers
    do, `fit` returns.
    """
    assert found["stopped_with_workers"] == {"codes": [signal.SIGINT, signal.SIGTERM], "same": True}
