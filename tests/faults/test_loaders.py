"""Loader processes that are killed or hang: an error that says so, or a stopped run; never a lost
checkpoint.
"""

import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loop import Checkpoint, DataLoaders, Learner, State, fit, load_latest, make_loader
from loop.disk.store import checkpoints
from tests.faults.places import times
from tests.loop.helpers import learner, on
from tests.loop.saving import ended, forked, identical


class Samples:
    """Sample 20 ends its process, or never comes (and the run is told to end); once, if so said."""

    def __init__(self, fault: str, once: Path | None = None) -> None:
        self.fault, self.once = fault, once

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == 20 and self.fault and not (self.once and self.once.exists()):
            if self.once:
                self.once.touch()
            if self.fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "terminate":
                os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(1000)
        value = torch.full((2,), float(index))
        return value, value


def of(samples: Samples, **options: Any) -> Learner:
    loader: Any = make_loader(samples, 4, workers=1, context="fork", ahead=1, **options)
    return learner(data=DataLoaders(loader), loss=lambda pred, y: (pred - y).square().mean() / 999)


@pytest.fixture(scope="module")
def end() -> State:
    mine = of(Samples(""))
    return fit(mine, mine.init(), 2)


def test_a_worker_that_is_killed_ends_the_run_with_a_checkpoint(tmp_path: Path, end: State) -> None:
    mine = of(Samples("kill", tmp_path / "once"))
    keep = Checkpoint(tmp_path / "run")
    with pytest.raises(RuntimeError, match="DataLoader worker .*(killed by signal|exited)"):
        fit(mine, mine.init(), 2, [keep])
    assert load_latest(tmp_path / "run").train_iter >= 3
    assert identical(vars(fit(mine, mine.init(), 2, [keep], resume=keep.folder)), vars(end))


def test_a_worker_that_hangs_is_waited_for_no_longer_than_said(tmp_path: Path, end: State) -> None:
    mine = of(Samples("hang", tmp_path / "once"), timeout=1.0)
    keep = Checkpoint(tmp_path / "run")
    with pytest.raises(RuntimeError, match="timed out after 1"):
        fit(mine, mine.init(), 2, [keep])
    assert load_latest(tmp_path / "run").train_iter == 5
    assert identical(vars(fit(mine, mine.init(), 2, [keep], resume=keep.folder)), vars(end))


def test_one_sigterm_ends_a_run_whose_worker_hangs(tmp_path: Path, end: State) -> None:
    mine = of(Samples("terminate", tmp_path / "once"), timeout=1.0)
    stopped = fit(mine, mine.init(), 2, [Checkpoint(tmp_path / "run")], stop="return")
    assert stopped.stopped == "SIGTERM"
    assert identical(vars(fit(mine, mine.init(), 2, resume=tmp_path / "run")), vars(end))


def kill_soon(processes: Iterable[int], seconds: float) -> None:
    time.sleep(seconds)
    for process in processes:
        os.kill(process, signal.SIGKILL)


def test_workers_that_die_while_the_last_checkpoint_is_written_do_not_break_it_off(
    tmp_path: Path,
) -> None:
    """Their ends come at random moments of a save that takes its time."""

    def work(number: int) -> None:
        mine = of(Samples(""), keep_workers=True)  # or they have ended by then
        folder = tmp_path / str(number)

        def kill_workers(state: State) -> None:
            if state.train_iter < 2:
                return
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            forked(lambda: kill_soon(map(int, children), 0.02 * number / times(20, 300)))
            raise KeyboardInterrupt

        start = mine.init().remember("much", torch.zeros(1_000_000))
        at = on("kill", 99, after_loss=kill_workers)
        try:
            fit(mine, start, 1, [Checkpoint(folder), at])
        except (KeyboardInterrupt, RuntimeError):  # or what torch says of the first to die
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os._exit(0 if load_latest(folder).train_iter == 2 else 2)
        os._exit(3)

    codes = [ended(forked(lambda n=n: work(n))) for n in range(times(20, 300))]  # type: ignore[misc]
    assert set(codes) == {0}
    assert all(checkpoints(tmp_path / str(number)) for number in range(len(codes)))
