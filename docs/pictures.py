"""Draw the pictures of the site: what fuse makes of some chains, and the figures of the course.

`python docs/pictures.py` writes them into docs/generated, as the build of the site does.
"""

import contextlib
import importlib.util
import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from functional_sgd import Optimizer, adamw, chain, clip_norm, fuse, lamb

EXAMPLES = Path(__file__).parents[1] / "examples"
CHAINS: dict[str, Optimizer] = {
    "adamw()": adamw(),
    "chain(clip_norm, adamw())": chain(clip_norm, adamw()),
    "lamb()": lamb(),
}
WIDTH = 100  # of a drawing, in the same unit for every row
RULES_A_LINE = 3


@dataclass(frozen=True)
class Step:
    """A row of what `explain` prints."""

    runner: str  # "kernel" or "torch"
    rules: str
    columns: str


def steps_of(opt: Optimizer) -> tuple[list[Step], str]:
    """The rows that `explain` prints for a matrix, and its line about bytes."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        fuse(opt).explain({"w": torch.zeros(64, 64)})
    table, _, moved = printed.getvalue().partition("\n\n")
    rows = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]
    steps = [Step(row[0], row[1], row[2] if len(row) > 2 else "") for row in rows]
    return steps, moved.strip().splitlines()[0].partition(": ")[2]


def kernels(chains: dict[str, Optimizer]) -> Figure:
    """One box for each pass over memory: what it reads comes from the left, what it writes leaves
    to the right.
    """
    drawn = {name: steps_of(opt) for name, opt in chains.items()}
    rows = sum(len(steps) + 1 for steps, _ in drawn.values())
    figure = Figure(figsize=(9, 1.05 * rows), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, WIDTH), ylim=(rows, 0))
    axes.axis("off")
    row = 0
    for name, (steps, moved) in drawn.items():
        axes.text(0, row + 0.75, name, fontsize=11, weight="bold", va="bottom")
        axes.text(WIDTH, row + 0.75, moved, fontsize=8, color="0.4", ha="right", va="bottom")
        for step in steps:
            row += 1
            box = FancyBboxPatch((24, row), 50, 0.7, boxstyle="round,pad=0.05")
            box.set(facecolor="C0" if step.runner == "kernel" else "C1", alpha=0.15)
            axes.add_patch(box)
            rules = step.rules.split(", ")
            broken = [
                ", ".join(rules[start : start + RULES_A_LINE])
                for start in range(0, len(rules), RULES_A_LINE)
            ]
            axes.text(49, row + 0.36, "\n".join(broken), fontsize=8, ha="center", va="center")
            reads, _, writes = step.columns.removeprefix("reads ").partition("; writes ")
            axes.text(22, row + 0.36, f"{_stacked(reads)}", fontsize=8, ha="right", va="center")
            axes.text(77, row + 0.36, _stacked(writes or "numbers"), fontsize=8, va="center")
        row += 1
    return figure


def _stacked(names: str) -> str:
    """Two names a line."""
    split = names.split(", ")
    return "\n".join(", ".join(split[start : start + 2]) for start in range(0, len(split), 2))


def example(name: str) -> ModuleType:
    """A module of examples/, which import each other by name."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def course() -> dict[str, Figure]:
    """Those of the book's chapter, of which the course shows the same ideas."""
    drawn = example("pictures")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster for so small a network
    try:
        accuracies = drawn.results(epochs=3, seed=0)
    finally:
        torch.set_num_threads(threads)
    x, y = drawn.points(0)
    return {
        "optimizers": drawn.lines(accuracies, "epoch", "validation accuracy"),
        "momentum": drawn.curves(x, y, [0.7], debiased=True),
        "betas": drawn.curves(x, y, [0.5, 0.7, 0.9, 0.99], debiased=False),
        "loop": drawn.loop_picture(),
    }


def draw_all(folder: Path) -> None:
    """Write those that are missing: a build that changes a word should not train four networks."""
    folder.mkdir(parents=True, exist_ok=True)
    kernels(CHAINS).savefig(folder / "kernels.png", dpi=120)
    names = ("optimizers", "momentum", "betas", "loop")
    if all((folder / f"{name}.png").exists() for name in names):
        return
    for name, figure in course().items():
        figure.savefig(folder / f"{name}.png", dpi=120)


if __name__ == "__main__":
    draw_all(Path(__file__).parent / "generated")
