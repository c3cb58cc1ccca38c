"""Work for processes that are killed: `python -m tests.faults.script NAME ARGUMENTS...` prints what
became of it. Processes are forked, since importing torch takes longer than all that they do.
"""

import json
import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import loop.disk.atomic
from functional_sgd import adamw, fuse
from functional_sgd.fusion.backends.c import compiler
from loop import SaveModel, fit, load, load_latest, load_params, save_in
from loop.disk.store import checkpoints
from loop.disk.weights import write_tensors
from tests.loop.checkpoint_script import busy, train
from tests.loop.saving import ended, forked, identical, scratch_in, tiny


def killed(work: Callable[[], Any], after: float) -> bool:
    """Whether a process that does this is killed after so many seconds, or else has ended well."""
    child = forked(work)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    code = ended(child)
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def saving(name: str, kills: str) -> dict[str, Any]:
    """Kill a process that saves and saves into a folder; what is the newest, is it whole?"""
    folder, chance, last, wrong = Path(name), random.Random(1), 0, []
    weights = torch.arange(50_000.0)

    def work() -> None:
        for count in range(last + 1, last + 10_000):
            save_in(tiny(count).replace(buffers={"b": weights + count}), folder, keep=2)

    for _ in range(int(kills)):
        killed(work, chance.random() * 0.05)
        if not checkpoints(folder):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a damaged checkpoint would be skipped with one
            found = load_latest(folder)
        if found.train_iter < last or not torch.equal(
            found.buffers["b"], weights + found.train_iter
        ):
            wrong.append((last, found.train_iter))
        last = found.train_iter
    save_in(tiny(last + 1), folder, keep=2)
    return {"wrong": wrong, "saved": last, "left": scratch_in(folder)}


def weights(name: str, kills: str) -> dict[str, Any]:
    """Kill a process that writes and writes the file of SaveModel; is it whole?"""
    path, chance, wrong = Path(name) / "model", random.Random(2), []
    state = tiny(0).replace(params={"w": torch.zeros(50_000)})

    def work() -> None:
        for count in range(10_000):
            write_tensors(path, {"w": torch.full((50_000,), float(count))}, {"epoch": str(count)})

    for _ in range(int(kills)):
        killed(work, chance.random() * 0.03)
        if path.exists():
            found = load_params(path, state).params["w"]
            wrong += [] if torch.equal(found, found[:1].expand(50_000)) else [float(found[0])]
    write_tensors(path, {"w": torch.zeros(50_000)}, {})
    return {"wrong": wrong, "left": scratch_in(path.parent)}


def runs(name: str, kills: str) -> dict[str, Any]:
    """Kill a run at random moments, from its first line to its last, until it is complete; and
    begin the next one, until there were so many kills.
    """
    chance, done, same, left, complete = random.Random(3), 0, [], [], 0
    mine = busy(count=20)
    expected = fit(mine, mine.init(seed=3), 2)
    while done < int(kills):
        folder = Path(name) / str(complete)
        folder.mkdir()
        while killed(lambda folder=folder: train(mine, folder), 0.01 + chance.random() * 0.15):  # type: ignore[misc]
            done += 1
        complete += 1
        same.append(identical(vars(load(folder / "end")), vars(expected)))
        left += scratch_in(folder / "run")
    return {"kills": done, "complete": complete, "same": all(same), "left": left}


def kernels(name: str, kills: str) -> dict[str, Any]:
    """Kill a process that compiles; the next one must find nothing, or what is whole."""
    chance, params, found = random.Random(4), {"w": torch.ones(3)}, []
    opt = adamw(lr=0.1)
    expected = opt(params, params, opt.init(params))[0]["w"].tolist()

    def work() -> Any:
        compiler.function_of.cache_clear()
        fast = fuse(opt)
        return fast(params, params, fast.init(params))[0]["w"].tolist()

    for round in range(int(kills)):
        folder = Path(name) / str(round % 3)
        os.environ["FUNCTIONAL_SGD_CACHE"] = str(folder)
        killed(work, chance.random())
        found.append(work() == expected)
        libraries = list(folder.glob("*.so"))
        found.append(all(compiler._intact(one, one.with_suffix(".sha256")) for one in libraries))
        for one in chance.sample(libraries, 1):
            one.with_suffix(".sha256").unlink()  # to be compiled again
    return {"good": all(found)}


def keeper(name: str, kills: str) -> dict[str, Any]:
    """Kill a run that keeps its best weights, again and again; the file is whole."""
    chance, mine, whole = random.Random(5), busy(count=5), []
    path, began = Path(name) / "best", time.monotonic()
    fit(mine, mine.init(), 9, [SaveModel(Path(name) / "warm")])
    whole_run = 1.5 * (time.monotonic() - began)  # a new process is slower at first
    for _ in range(int(kills)):
        killed(lambda: fit(mine, mine.init(), 9, [SaveModel(path)]), chance.random() * whole_run)
        if path.exists():
            whole.append(load_params(path, mine.init()).train_iter)
    return {"read": len(whole)}


if __name__ == "__main__":
    warnings.simplefilter("error", UserWarning)
    torch.set_num_threads(1)
    os.fsync = lambda handle: None  # it is processes that are killed here, not the machine
    loop.disk.atomic.os.fsync = os.fsync
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
