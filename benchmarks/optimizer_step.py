"""How long does one update take? Ours, torch.optim, TorchOpt and optax race over the same trees of
parameters.
"""

import gc
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import get_args

import torch
import tyro
from common import (
    Device,
    Tensors,
    Timing,
    TreeName,
    bandwidths,
    gradients,
    machine,
    race,
    save,
    say,
    show,
    trees,
)
from contenders import OURS, Contender, OptimizerName, Ours, contenders

import functional_sgd as fs

Medians = dict[str, dict[str, Timing]]

CROWDED = 50_000_000
"""For trees of so many elements there is memory for a few contenders only, on usual machines."""

LEAN = (
    "ours, donated",
    "ours, pure",
    "foreach by hand",
    "torch foreach",
    "torch fused",
    "optax, jit",
)
"""They all keep one copy of params and state, or two."""


def check(entered: dict[str, Contender], name: str) -> None:
    """After one step, everybody must be where the chain is, leaf by leaf; otherwise they do not do
    the same work.
    """
    results = {who: contender.result() for who, contender in entered.items()}
    wanted = results["ours, leaf by leaf" if "ours, leaf by leaf" in results else "ours, donated"]
    for who, params in results.items():
        for leaf, value in params.items():
            if not torch.allclose(value, wanted[leaf], rtol=1e-4, atol=2e-6):
                far = (value - wanted[leaf]).abs().max().item()
                print(f"careful: {who} does another {name}: {leaf} differs by {far:.1e}")
                break


def time_tree(
    tree: Tensors,
    names: tuple[OptimizerName, ...],
    rounds: int,
    compiled: bool,
    device: Device = "cpu",
    cold: bool = False,
) -> Medians:
    """The times of every contender, for every optimizer."""
    grads = gradients(tree)
    elements = sum(value.numel() for value in tree.values())
    times: Medians = {}
    for name in names:
        everybody = contenders(name, tree, grads, compiled, jax=device == "cpu")
        entered = {who: make() for who, make in everybody if who in LEAN or elements < CROWDED}
        for contender in entered.values():
            contender.step()
        check(entered, name)
        steps = {who: contender.step for who, contender in entered.items()}
        times[name] = race(steps, rounds, 2, device=device, cold=cold)
        del entered, steps  # before the next contenders take memory of their own
        gc.collect()
    return times


def baseline(times: dict[str, Timing]) -> str:
    """Whom the others are compared with."""
    return next(
        who for who in ("torch fused", "foreach by hand", "ours, leaf by leaf") if who in times
    )


def table(tree_name: str, tree: Tensors, times: Medians) -> str:
    """Rows of contenders, columns of optimizers: milliseconds, and how many times the baseline."""
    elements = sum(value.numel() for value in tree.values())
    everybody = list(dict.fromkeys(who for column in times.values() for who in column))
    rows = [[who, *(cell(column, who) for column in times.values())] for who in everybody]
    title = f"{tree_name}: {len(tree):,} leaves, {elements / 1e6:.1f} M parameters"
    return show(title, ["median ms, times baseline", *times], rows)


def cell(times: dict[str, Timing], who: str) -> str:
    """A median, and its ratio to that of the baseline."""
    if who not in times:
        return "-"
    median = times[who].median
    digits = 2 if median < 0.1 else 0
    return f"{1e3 * median:.{digits}f}, {median / times[baseline(times)].median:.2f}x"


def traffic(tree: Tensors, times: Medians, copying: float, adding: float) -> str:
    """How close the donated step comes to the memory: each of its columns read once and written
    once.
    """
    elements = sum(value.numel() for value in tree.values())
    parts = []
    for name, column in times.items():
        slots = len(OURS[name].plan.slots)
        rate = 4 * elements * (2 + slots + 1 + slots) / column["ours, donated"].median
        parts.append(
            f"{name} {rate / 1e9:.1f} GB/s ({rate / copying:.0%} of a copy, {rate / adding:.0%} of "
            f"add_)"
        )
    return say(f"Ours, donated, moves at least: {'; '.join(parts)}.")


def side_by_side(
    tree: Tensors, names: tuple[OptimizerName, ...], rounds: int, device: Device
) -> str:
    """Our donated steps in one race, and how many times AdamW's each takes; for `four`, its bytes
    say 10/7 at best.
    """
    grads = gradients(tree)
    steps = {name: Ours(fs.fuse(OURS[name], donate=True), tree, grads).step for name in names}
    times = race(steps, rounds, 2, device=device)
    parts = [
        f"{name} {1e3 * time.median:.2f} ms, {time.median / times['adamw'].median:.2f}x"
        for name, time in times.items()
    ]
    return say(f"Ours, donated, all in one race: {'; '.join(parts)}.")


def of_tree(
    tree_name: TreeName,
    optimizers: tuple[OptimizerName, ...],
    rounds: int,
    compiled: bool,
    device: Device,
    cold: bool,
    bandwidth: tuple[float, float],
) -> tuple[str, Medians]:
    """What is to be said of one tree, and the times."""
    tree = trees(tree_name, device=device)
    times = time_tree(tree, optimizers, rounds, compiled, device, cold)
    text = table(tree_name, tree, times) + "\n" + traffic(tree, times, *bandwidth)
    if "adamw" in optimizers:
        text += "\n" + side_by_side(tree, optimizers, rounds, device)
    return text, times


def main(
    tree_names: tuple[TreeName, ...] = get_args(TreeName),
    optimizers: tuple[OptimizerName, ...] = get_args(OptimizerName),
    rounds: int = 30,
    compiled: bool = False,
    device: Device = "cpu",
    cold: bool = False,
    save_results: bool = False,
) -> None:
    """Race every contender, with every optimizer, on every tree.

    Args:
        tree_names: The trees of parameters.
        optimizers: The updates; four is clip_norm, AdamW, cautious updates, parameter averages.
        rounds: How often each contender is timed.
        compiled: Enter torch.compile(torch.optim's step) as well; it takes long to compile.
        device: Where the parameters are.
        cold: Time single steps, each after another contender's, on the CPU.
        save_results: Write the tables and a JSON into results/.
    """
    print(machine())
    copying, adding = bandwidths(device=device)
    text = say(
        f"A copy of 400 MB moves {copying / 1e9:.1f} GB/s, an addition in place (add_) "
        f"{adding / 1e9:.1f} GB/s. "
        f"Baseline: torch fused, or foreach by hand. "
        f"{'Single steps, with cold caches.' if cold else ''}"
    )
    medians = {}
    for tree_name in tree_names:
        # In a process of its own, so that what one tree leaves of the memory in pieces does not
        # slow down the next.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found = pool.submit(
                of_tree, tree_name, optimizers, rounds, compiled, device, cold, (copying, adding)
            )
            more, medians[tree_name] = found.result()
        text += "\n" + more
    if save_results:
        name = (
            "optimizer_step_gpu"
            if device == "cuda"
            else "optimizer_step_cold"
            if cold
            else "optimizer_step"
        )
        path = save(name, text).with_suffix(".json")
        path.write_text(
            json.dumps(
                {"machine": machine(), "copy": copying, "add": adding, "seconds": medians}, indent=1
            )
        )


if __name__ == "__main__":
    tyro.cli(main)
