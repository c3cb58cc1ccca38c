"""What the tests of saving share: a strict comparison, small states, and work for processes of
their own.

`python -m tests.loop.saving NAME ARGUMENTS...` calls a function of this file and prints what it
returns.
"""

import dataclasses
import json
import math
import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

import loop.disk.atomic
import loop.disk.store
from functional_sgd import adamw, fuse
from functional_sgd.schedules import Linear
from loop import Learner, ParamScheduler, Recorder, State, fit
from loop.disk.store import checkpoints, load, load_latest, save, save_in
from loop.history import Log
from tests.loop.helpers import learner, net, shuffled
from tests.processes import python

ROOT = Path(__file__).parent.parent.parent


def bits(tensor: Tensor) -> bytes:
    """The bytes of a tensor's elements."""
    return (
        tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    )


def identical(found: Any, expected: Any) -> bool:
    """Equal in type and value all the way down, keys in order, tensors bit for bit."""
    if type(found) is not type(expected):
        return False
    if isinstance(found, Tensor):
        return (found.dtype, found.shape, bits(found)) == (
            expected.dtype,
            expected.shape,
            bits(expected),
        )
    if isinstance(found, Mapping):
        return list(found) == list(expected) and all(
            identical(found[key], expected[key]) for key in found
        )
    if isinstance(found, (list, tuple, Log)):
        return len(found) == len(expected) and all(map(identical, found, expected))
    if dataclasses.is_dataclass(found):
        return identical(vars(found), vars(expected))
    if isinstance(found, float):
        return found.hex() == expected.hex() and math.copysign(1, found) == math.copysign(
            1, expected
        )
    return bool(found == expected)


def same(found: State, expected: State) -> bool:
    """Whether two states are equal in every field, bit for bit."""
    return identical(vars(found), vars(expected))


def tiny(count: int = 0, **fields: Any) -> State:
    """A state that can be told from others."""
    return State(
        {"w": torch.full((3,), float(count))}, {}, {}, {"lr": 0.1}, train_iter=count, **fields
    )


def busy() -> Learner:
    """A learner whose state has everything in it: buffers, a fused optimizer's memory, schedules,
    metrics.
    """

    def closeness(pred: Tensor, target: Tensor) -> Tensor:
        return (pred - target).abs().mean()

    callbacks = [ParamScheduler({"lr": Linear(0.02, 0.001)}), Recorder(train_metrics=True)]
    opt = fuse(adamw(lr=0.01))
    return learner(net(), shuffled("Batches"), opt=opt, metrics=(closeness,), callbacks=callbacks)


def in_process(*arguments: object) -> Any:
    """What a function of this file returns in a new process."""
    process = python("-m", "tests.loop.saving", *arguments)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def go_on(source: str, target: str) -> None:
    """Load a state, train for two epochs, save the end."""
    mine = busy()
    save(fit(mine, load(source, mine.init()), 2), target)


def forked(work: Callable[[], None]) -> int:
    """The id of a child process that does this and ends."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return child


def ended(child: int) -> int:
    """Wait for a child; its exit code, or minus the number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def scratch_in(folder: Path) -> list[str]:
    """What is in a folder without being a saved state."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def killed_anywhere(name: str) -> dict[str, Any]:
    """Kill a process that saves and saves into a folder at 50 moments; the newest committed
    checkpoint is there.
    """
    folder, moments, lost, left = Path(name), random.Random(0), [], 0
    count = 0

    def work(pipe: int, count: int) -> None:
        while True:
            count += 1
            save_in(tiny(count), folder, keep=2)
            os.write(pipe, f"{count}\n".encode())

    for _ in range(50):
        reading, writing = os.pipe()
        child = forked(lambda pipe=writing, count=count: work(pipe, count))  # type: ignore[misc]
        os.close(writing)
        with os.fdopen(reading) as committed:
            first = committed.readline()
            time.sleep(moments.random() * 0.03)
            os.kill(child, signal.SIGKILL)
            count = int([first, *committed][-1])
        assert ended(child) == -signal.SIGKILL
        found = load_latest(folder)
        if (
            found.train_iter not in (count, count + 1)
            or found.params["w"].tolist() != [found.train_iter] * 3
        ):
            lost.append((count, found.train_iter))
        left += bool(scratch_in(folder))
        count = found.train_iter
    save_in(tiny(count + 1), folder, keep=2)
    return {
        "lost": lost,
        "killed within a save": left,
        "left over": scratch_in(folder),
        "kept": len(checkpoints(folder)),
    }


def killed_before_line(
    files: Collection[str | None], last: int
) -> Callable[[FrameType, str, Any], Any]:
    """A tracer that kills its process before it runs so many lines of these files."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in files:
            return None
        count += event == "line"
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return trace


def killed_at_every_line(name: str) -> dict[str, Any]:
    """Kill a process that replaces state 1 by state 2 before each line that it runs: which state is
    there then?
    """
    path, found, left = Path(name) / "state", [], []
    files = {loop.disk.atomic.__file__, loop.disk.store.__file__}

    def work(last: int) -> None:
        sys.settrace(killed_before_line(files, last))
        save(tiny(2), path, overwrite=True)

    code, line = -signal.SIGKILL, 0
    while code:
        line += 1
        save(tiny(1), path, overwrite=True)
        left += scratch_in(path.parent)
        code = ended(forked(lambda last=line: work(last)))  # type: ignore[misc]
        found.append(load(path).train_iter)
    return {"found": found, "left over": left}


def rivals(name: str) -> dict[str, Any]:
    """Two processes save into one folder, and over one path, while a third loads."""
    folder, path, wrong, reads = Path(name), Path(name) / "state", [], 0
    save(tiny(0), path)
    save_in(tiny(0), folder)

    def work(start: int) -> None:
        for count in range(start, start + 25):
            save_in(tiny(count), folder)
            save(tiny(count), path, overwrite=True)

    waiting = [forked(lambda start=start: work(start)) for start in (100, 200)]  # type: ignore[misc]
    codes: list[int] = []
    while waiting:
        for found in (load_latest(folder), load(path)):
            reads += 1
            if found.params["w"].tolist() != [found.train_iter] * 3:
                wrong.append(found.train_iter)
        for child in list(waiting):
            ready, status = os.waitpid(child, os.WNOHANG)
            if ready:
                codes.append(os.waitstatus_to_exitcode(status))
                waiting.remove(child)
    return {
        "wrong": wrong,
        "reads": reads,
        "codes": codes,
        "names": [found.name for found in checkpoints(folder)],
    }


def crashes(name: str) -> dict[str, Any]:
    """All of the above, in one process: importing torch takes longer than any of them."""
    results = {}
    for work in (killed_anywhere, killed_at_every_line, rivals):
        folder = Path(name) / work.__name__
        folder.mkdir()
        results[work.__name__] = work(str(folder))
    return results


if __name__ == "__main__":
    warnings.simplefilter("error", UserWarning)
    torch.set_num_threads(1)
    os.fsync = lambda handle: None  # it is processes that are killed here, not the machine
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
