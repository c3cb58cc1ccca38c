"""Is every optimizer at its bytes? The time of a fused, donated step for each byte that it has to
move, next to AdamW's.

For all recipes whose steps are kernels alone. Bytes are those that the library computes of the
kernels: every column that a pass reads or writes, once.
"""

import gc
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
import tyro
from common import Tensors, TreeName, gradients, least, save, say, show, trees

import functional_sgd as fs

MOST = 1.15
"""How many times AdamW's time per byte is still called its bytes."""

ADAMW_MOVED = 28
"""Params, gradients and two slots are read, and all but gradients written."""


class Measured(NamedTuple):
    """A recipe, and what AdamW took beside it, in seconds."""

    recipe: fs.Recipe
    seconds: float
    adamw: float

    @property
    def moved(self) -> float:
        """Bytes per parameter."""
        assert self.recipe.moved is not None
        return self.recipe.moved

    @property
    def ratio(self) -> float:
        """Time per byte, in AdamW's."""
        return (self.seconds / self.moved) / (self.adamw / ADAMW_MOVED)


class Steps:
    """A donated optimizer that goes on from its last step; columns of the caller are the same at
    all steps.
    """

    def __init__(self, opt: fs.Optimizer, tree: Tensors, grads: Tensors) -> None:
        self.opt, self.grads = fs.fuse(opt, donate=True), grads
        self.params = {name: leaf.clone() for name, leaf in tree.items()}
        self.state = self.opt.init(self.params)
        trees_given = {name for name in opt.required if name == "hessian"}
        self.given = {name: {n: g.square() for n, g in grads.items()} for name in trees_given}
        self.given |= {name: 1.0 for name in opt.required if name not in trees_given}

    def __call__(self) -> None:
        self.params, self.state = self.opt(self.params, self.grads, self.state, **self.given)


def kernels_alone(chosen: tuple[str, ...]) -> Iterator[fs.Recipe]:
    """The recipes of which torch runs no part."""
    for name, recipe in fs.recipes().items():
        if recipe.moved is not None and not recipe.by_torch and (not chosen or name in chosen):
            yield recipe


def measure(recipe: fs.Recipe, beside: Steps, tree: Tensors, rounds: int) -> Measured:
    """A recipe and AdamW, by turns."""
    steps = Steps(recipe.make(), tree, beside.grads)
    for _ in range(2):
        steps()
    times = least({"adamw": beside, "this": steps}, rounds)
    return Measured(recipe, times["this"], times["adamw"])


def main(
    tree_name: TreeName = "gpt124",
    recipes: tuple[str, ...] = (),
    rounds: int = 15,
    threads: int = 0,
    shared: bool = False,
    save_results: bool = False,
) -> None:
    """Race every optimizer against AdamW, and divide by their bytes.

    Args:
        tree_name: The tree of parameters.
        recipes: Only these; all, if none are named.
        rounds: How often each is timed; the shortest time counts.
        threads: How many threads; torch's own number, if 0.
        shared: Say in the results that the machine had other work.
        save_results: Write the table into results/.
    """
    if threads:
        torch.set_num_threads(threads)
    tree = trees(tree_name)
    grads = gradients(tree)
    beside = Steps(fs.adamw(), tree, grads)
    beside()
    found = []
    for recipe in kernels_alone(recipes):
        found.append(measure(recipe, beside, tree, rounds))
        gc.collect()
        print(f"{recipe.name}: {found[-1].ratio:.2f}", flush=True)
    found.sort(key=lambda one: one.ratio)
    header = ["recipe", "passes", "bytes", "ms", "GB/s", "time per byte, in AdamW's"]
    elements = sum(leaf.numel() for leaf in tree.values())
    rows = [
        [
            one.recipe.name,
            str(one.recipe.passes),
            f"{one.moved:.0f}",
            f"{1e3 * one.seconds:.1f}",
            f"{one.moved * elements / one.seconds / 1e9:.1f}",
            f"{one.ratio:.2f}",
        ]
        for one in found
    ]
    within = sum(one.ratio <= MOST for one in found)
    load = f" Others used the machine, too (load {os.getloadavg()[1]:.1f})." if shared else ""
    text = say(
        f"Fused and donated, {torch.get_num_threads()} threads, float32, {tree_name}: "
        f"{elements / 1e6:.1f} M parameters. Bytes are per parameter, read and written, as "
        f"`recipes()` and `explain` count them. Each recipe took turns with AdamW, {rounds} each; "
        f"the shortest times count.{load} At most {MOST} in {within} of {len(found)}."
    )
    text += "\n" + show("time per byte", header, rows)
    if save_results:
        save(f"bytes_{threads}_threads" if threads else "bytes", text)


if __name__ == "__main__":
    tyro.cli(main)
