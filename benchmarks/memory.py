"""How much memory does an AdamW step take beyond params, gradients and state?

Measured as the peak of the resident memory that Linux keeps for a process (VmHWM), set back once
everything is there: it counts every allocator, where torch's profiler would not see numpy's tables,
and unlike ru_maxrss it can be set back, so that what came before does not hide the step. Each
measurement has a process of its own, in which malloc hands freed blocks back at once, so that no
old block is used again unseen. A tiny step of the same kind comes first, so that compiled code and
threads are not counted.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import tyro
from common import TreeName, save, say, show, trees
from contenders import Contender, contenders

CHOSEN = (
    "ours, donated",
    "ours, pure",
    "ours, leaf by leaf",
    "torch for-loop",
    "torch foreach",
    "torch fused",
)
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def resident(field: str) -> int:
    """Bytes in memory: VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def set_back() -> int:
    """Let the peak be what there is, and return that."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def enter(who: str, tree: dict[str, torch.Tensor]) -> Contender:
    """This contender, and no other."""
    grads = {leaf: torch.full_like(value, 1e-3) for leaf, value in tree.items()}
    return next(make() for name, make in contenders("adamw", tree, grads, jax=False) if name == who)


def measure(tree_name: TreeName, who: str, steps: int) -> dict[str, float]:
    """Extra MiB at the peak of the first steps, and kept after them; and MiB of one copy of the
    parameters.
    """
    tiny = enter(who, {"leaf": torch.ones(200_000)})
    for _ in range(2):
        tiny.step()
    del tiny
    empty = set_back()
    tree = trees(tree_name)
    elements = sum(value.numel() for value in tree.values())
    contender = enter(who, tree)
    del tree
    set_back()
    needed = empty + 4 * 4 * elements  # params, gradients and two slots
    for _ in range(steps):
        contender.step()
    extra = {
        "peak": resident("VmHWM") - needed,
        "kept": set_back() - needed,
        "params": 4 * elements,
    }
    return {name: value / 2**20 for name, value in extra.items()}


def in_new_process(script: str, *arguments: str) -> Any:
    """The JSON that a script prints in a process of its own, where malloc hands blocks back."""
    command, environment = [sys.executable, script, *arguments], {**os.environ, **MALLOC}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(tree_name: str, who: str, steps: int) -> list[str]:
    """MiB, and how many copies of the parameters that is: at the peak, and kept between steps."""
    asked = ("--here", who, "--tree-names", tree_name, "--steps", str(steps))
    extra = in_new_process(__file__, *asked)
    return [
        who,
        *(f"{extra[key]:,.0f} ({extra[key] / extra['params']:.2f})" for key in ("peak", "kept")),
    ]


def main(
    tree_names: tuple[TreeName, ...] = ("gpt10", "gpt124"),
    who: tuple[str, ...] = CHOSEN,
    here: str = "",
    steps: int = 5,
    save_results: bool = False,
) -> None:
    """Measure the memory of AdamW's steps.

    Args:
        tree_names: The trees of parameters.
        who: The contenders.
        here: Only measure this contender in this process, and print JSON.
        steps: How many steps.
        save_results: Write the tables into results/.
    """
    if here:
        print(json.dumps(measure(tree_names[0], here, steps)))
        return
    text = say(
        "Memory beyond params, gradients and state: MiB, and in brackets in copies of the "
        "parameters."
    )
    for tree_name in tree_names:
        header = [
            f"{tree_name}, MiB (copies)",
            f"at the peak of {steps} steps",
            "kept between steps",
        ]
        text += "\n" + show(tree_name, header, [row(tree_name, name, steps) for name in who])
    if save_results:
        save("memory", text)


if __name__ == "__main__":
    tyro.cli(main)
