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
from common import Duel, Tensors, TreeName, gradients, save, say, show, timed, trees

import functional_sgd as fs

MOST = 1.15
"""How many times AdamW's time per byte is still called its bytes."""

ADAMW_MOVED = 28
"""Params, gradients and two slots are read, and all but gradients written."""


HOW = """\
Bytes are per parameter, read and written, as `recipes()` and `explain` count them. Each recipe
takes turns with AdamW, and the shortest times count; a turn is quiet if AdamW takes at most 10%
more than its best right before and after it, and after five quiet turns no more are taken. In
cache: the GB/s of a leaf of 200,000, without what a call takes; where that is more than the
memory's, it is the memory that a step waits for."""


class Measured(NamedTuple):
    """A recipe, and what AdamW took beside it, in seconds."""

    recipe: fs.Recipe
    seconds: float
    adamw: float
    quiet: int
    in_cache: float

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


def in_cache(recipe: fs.Recipe, elements: int = 200_000, turns: int = 300) -> float:
    """Bytes per second of a tree that stays in the cache: how fast a kernel calculates, without
    what a call of a tiny tree takes.
    """
    seconds = []
    for size in (elements, 100):
        tree = {"leaf": torch.randn(size, generator=torch.Generator().manual_seed(0)) * 0.02}
        steps = Steps(recipe.make(), tree, gradients(tree))
        seconds.append(min(timed(steps) for _ in range(turns)))
    return (recipe.moved or 0.0) * elements / (seconds[0] - seconds[1])


def measure(recipe: fs.Recipe, duel: Duel, tree: Tensors, grads: Tensors, turns: int) -> Measured:
    """A recipe and AdamW, by turns."""
    steps = Steps(recipe.make(), tree, grads)
    for _ in range(2):
        steps()
    return Measured(recipe, *duel(steps, most=turns), in_cache(recipe))


def main(
    tree_name: TreeName = "gpt124",
    recipes: tuple[str, ...] = (),
    turns: int = 50,
    threads: int = 0,
    shared: bool = False,
    save_results: bool = False,
) -> None:
    """Race every optimizer against AdamW, and divide by their bytes.

    Args:
        tree_name: The tree of parameters.
        recipes: Only these; all, if none are named.
        turns: How often each is timed, if there are no quiet turns before.
        threads: How many threads; torch's own number, if 0.
        shared: Say in the results that the machine had other work.
        save_results: Write the table into results/.
    """
    if threads:
        torch.set_num_threads(threads)
    tree = trees(tree_name)
    grads = gradients(tree)
    duel = Duel(Steps(fs.adamw(), tree, grads))
    duel(duel.baseline)
    found = []
    for recipe in kernels_alone(recipes):
        found.append(measure(recipe, duel, tree, grads, turns))
        gc.collect()
        print(f"{recipe.name}: {found[-1].ratio:.2f}, {found[-1].quiet} quiet turns", flush=True)
    found.sort(key=lambda one: one.ratio)
    header = [
        "recipe",
        "passes",
        "bytes",
        "ms",
        "GB/s",
        "GB/s in cache",
        "quiet turns",
        "time per byte, in AdamW's",
    ]
    elements = sum(leaf.numel() for leaf in tree.values())
    rows = [
        [
            one.recipe.name,
            str(one.recipe.passes),
            f"{one.moved:.0f}",
            f"{1e3 * one.seconds:.1f}",
            f"{one.moved * elements / one.seconds / 1e9:.1f}",
            f"{one.in_cache / 1e9:.0f}",
            str(one.quiet),
            f"{one.ratio:.2f}",
        ]
        for one in found
    ]
    within = sum(one.ratio <= MOST for one in found)
    load = f" Others used the machine, too (load {os.getloadavg()[1]:.1f})." if shared else ""
    size = f"{torch.get_num_threads()} threads, {tree_name}, {elements / 1e6:.1f} M parameters"
    text = say(f"Fused and donated, float32, {size}.{load} {HOW}")
    text += "\n" + say(f"At most {MOST} in {within} of {len(found)}.")
    text += "\n" + show("time per byte", header, rows)
    if save_results:
        save("bytes", text)


if __name__ == "__main__":
    tyro.cli(main)
