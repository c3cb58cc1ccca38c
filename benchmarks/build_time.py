"""How long until the first step is done, with and without kernels on disk? And does a schedule
compile anything?
"""

import json
import os
import subprocess
import sys
import tempfile
import time

import torch
import tyro
from common import save, say, show

import functional_sgd as fs
from functional_sgd.fusion.backends.c import compiler
from functional_sgd.schedules import one_cycle


def tree_of(leaves: int) -> dict[str, torch.Tensor]:
    """Small leaves, of three shapes."""
    return {
        f"leaf{index:05d}": torch.ones(((100,), (10, 10), (5, 5, 4))[index % 3])
        for index in range(leaves)
    }


def measure(leaves: int) -> dict[str, float]:
    """Seconds of fuse, of init, of the first call and of the second, in this process."""
    params = tree_of(leaves)
    grads = tree_of(leaves)
    marks = [time.perf_counter()]
    opt = fs.fuse(fs.adamw(), donate=True)
    marks.append(time.perf_counter())
    state = opt.init(params)
    marks.append(time.perf_counter())
    for _ in range(2):
        params, state = opt(params, grads, state)
        marks.append(time.perf_counter())
    names = ("fuse", "init", "first", "second")
    return {name: end - start for name, start, end in zip(names, marks, marks[1:], strict=False)}


def in_new_process(leaves: int, folder: str) -> dict[str, float]:
    """`measure` in a process of its own, with the kernels of this folder."""
    command = [sys.executable, __file__, "--leaves", str(leaves), "--here"]
    done = subprocess.run(
        command,
        env={**os.environ, "FUNCTIONAL_SGD_CACHE": folder},
        capture_output=True,
        text=True,
        check=True,
    )
    times: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return times


def kernels_of_a_run(steps: int, leaves: int = 10) -> tuple[int, int]:
    """How many kernels the first step of a one-cycle run loads, and how many all the others do."""
    loads = []
    load = compiler.load
    compiler.load = lambda source: loads.append(source) or load(source)  # type: ignore[func-returns-value]
    opt, schedule = fs.fuse(fs.adamw(), donate=True), one_cycle(1e-3)
    params, grads = tree_of(leaves), tree_of(leaves)
    state, first = opt.init(params), 0
    for step in range(steps):
        params, state = opt(params, grads, state, dict(lr=schedule(step / steps)))
        first = first or len(loads)
    compiler.load = load
    return first, len(loads) - first


def row(leaves: int) -> list[str]:
    """Milliseconds with an empty folder of kernels, and once more with what that has left there."""
    with tempfile.TemporaryDirectory() as folder:
        cold, warm = in_new_process(leaves, folder), in_new_process(leaves, folder)
    times = [cold["fuse"], cold["first"], warm["fuse"], warm["first"], warm["second"]]
    return [f"{leaves:,}", *(f"{1e3 * value:,.1f}" for value in times)]


def main(
    leaves: tuple[int, ...] = (10, 100, 1000, 5000),
    steps: int = 1000,
    here: bool = False,
    save_results: bool = False,
) -> None:
    """Time the first step of AdamW.

    Args:
        leaves: How many leaves.
        steps: The length of the one-cycle run in which kernels are counted.
        here: Only measure in this process, and print JSON.
        save_results: Write the table into results/.
    """
    if here:
        print(json.dumps(measure(leaves[0])))
        return
    header = [
        "leaves",
        "fuse, cold",
        "first step, cold",
        "fuse, warm",
        "first step, warm",
        "second step",
    ]
    text = say(
        "Milliseconds, AdamW, each in a process of its own. Cold: no kernels on disk; warm: the "
        "same once more."
    )
    text += "\n" + show("build time", header, [row(count) for count in leaves])
    first, later = kernels_of_a_run(steps)
    text += "\n" + say(
        f"Kernels loaded in {steps:,} steps of one-cycle: {first} in the first step, {later} after "
        f"it."
    )
    if save_results:
        save("build_time", text)


if __name__ == "__main__":
    tyro.cli(main)
