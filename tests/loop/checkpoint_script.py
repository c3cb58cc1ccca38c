"""Runs with checkpoints in processes that are stopped, killed, and followed by others.

`python -m tests.loop.checkpoint_script FOLDER` prints what became of them. Processes are forked,
since importing torch takes longer than all that they do.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functional_sgd import adamw, fuse
from functional_sgd.schedules import one_cycle
from loop import (
    AverageParams,
    Batches,
    Callback,
    Checkpoint,
    DataLoaders,
    GradientAccumulation,
    Learner,
    ParamScheduler,
    State,
    fit,
    load,
    load_latest,
    make_loader,
    save,
)
from loop.disk.store import checkpoints
from tests.loop.helpers import X, Y, learner, net
from tests.loop.saving import ended, forked, identical, scratch_in


@dataclass(frozen=True)
class Beats(Callback):
    """Tell another process, through a pipe, of every training batch while it is under way, and wait
    a little.
    """

    pipe: int
    wait: float
    reports = True

    def after_pred(self, state: State) -> None:
        """Tell."""
        if state.training:
            os.write(self.pipe, b".")
            time.sleep(self.wait)


def busy(count: int) -> Learner:
    """A learner with memory in many places, on so many batches an epoch."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(4 * count, 2, generator=generator)
    data = DataLoaders(Batches((x, x.roll(1, dims=1)), 4, shuffle=True), Batches((X, Y), 10))
    callbacks = [
        ParamScheduler({"lr": one_cycle(0.05)}),
        GradientAccumulation(batches=3),
        AverageParams(decay=0.9),
    ]
    return learner(net(), data, opt=fuse(adamw(lr=0.01)), callbacks=callbacks)


def train(mine: Learner, folder: Path, *callbacks: Any) -> State:
    """The command that is given again and again; the end is saved."""
    checkpoint = Checkpoint(folder / "run", batches=1, epochs=None)
    start, everyone = mine.init(seed=3), [checkpoint, *callbacks]
    end = fit(mine, start, 2, everyone, resume=folder / "run", stop="return")
    if not end.stopped:
        save(end, folder / "end", overwrite=True)
    return end


class Process:
    """A process that trains, and its beats."""

    def __init__(self, work: Callable[[int], Any]) -> None:
        reading, writing = os.pipe()
        self.child = forked(lambda: work(writing))
        os.close(writing)
        self.beats = os.fdopen(reading, "rb", buffering=0)

    def wait_for(self, count: int) -> bool:
        """Whether there were so many beats; else the process has ended."""
        return all(self.beats.read(1) for _ in range(count))

    def code(self) -> int:
        """How the process has ended: its exit code, or minus the number of the signal."""
        self.beats.close()
        return ended(self.child)


def killed(folder: Path) -> dict[str, Any]:
    """Kill the training at random moments, a few batches on each time, until it is complete."""
    moments, kills, done = random.Random(0), 0, []
    mine = busy(count=60)
    expected = fit(mine, mine.init(seed=3), 2)
    while True:
        process = Process(lambda pipe: train(mine, folder, Beats(pipe, 0.0)))
        process.wait_for(moments.randint(1, 4))
        time.sleep(moments.random() * 0.002)
        os.kill(process.child, signal.SIGKILL)
        if process.code() == 0:
            break
        kills += 1
        done.append(load_latest(folder / "run").train_iter)
    run = folder / "run"
    left = {"left over": scratch_in(run), "kept": len(checkpoints(run))}
    return {
        "kills": kills,
        "done": done,
        "same": identical(vars(load(folder / "end")), vars(expected)),
        **left,
    }


def stopped(folder: Path) -> dict[str, Any]:
    """Send SIGINT and SIGTERM in turns, each in the middle of a batch, until the run is
    complete.
    """
    codes, done = [], []
    mine = busy(count=4)
    expected = fit(mine, mine.init(seed=3), 2)

    def work(pipe: int) -> None:
        os._exit(
            0
            if (end := train(mine, folder, Beats(pipe, 0.1))).stopped == ""
            else signal.Signals[end.stopped]
        )

    for number in [signal.SIGINT, signal.SIGTERM] * 9:
        process = Process(work)
        if process.wait_for(2):
            os.kill(process.child, number)
        codes.append(process.code())
        done.append(load_latest(folder / "run").train_iter)
        if codes[-1] == 0:
            break
    return {
        "codes": codes,
        "done": done,
        "same": identical(vars(load(folder / "end")), vars(expected)),
    }


class Slow:
    """Samples that take their time, so that the loader is waited for."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        time.sleep(0.02)
        return torch.randn(2), torch.randn(2)


def stopped_with_workers(folder: Path) -> dict[str, Any]:
    """Send SIGINT, then SIGTERM, to a group of processes: that which trains, and those that fetch
    data for it.
    """
    codes = []
    mine = learner(data=DataLoaders(make_loader(Slow(), 4, workers=2)))
    alone = learner(data=DataLoaders(make_loader(Slow(), 4)))
    expected = fit(alone, alone.init(seed=3), 2)

    def work(pipe: int) -> None:
        os.setsid()
        os._exit(signal.Signals[train(mine, folder, Beats(pipe, 0.0)).stopped])

    for number in (signal.SIGINT, signal.SIGTERM):
        process = Process(work)
        process.wait_for(3)
        time.sleep(0.02)  # it waits for its loader by now
        os.killpg(process.child, number)
        codes.append(process.code())
    end = fit(mine, mine.init(seed=3), 2, resume=folder / "run")
    return {"codes": codes, "same": identical(vars(end), vars(expected))}


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.fsync = lambda handle: None  # it is processes that are killed here, not the machine
    results = {}
    for work in (killed, stopped, stopped_with_workers):
        results[work.__name__] = work(Path(sys.argv[1]) / work.__name__)
    print(json.dumps(results))
