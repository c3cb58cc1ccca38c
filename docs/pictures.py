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
from matplotlib.axes import Axes
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
TITLE = 0.8  # of a row


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
    height = sum(TITLE + len(steps) for steps, _ in drawn.values())
    figure = Figure(figsize=(9, 0.75 * height), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")
    top = 0.0
    for name, (steps, moved) in drawn.items():
        top += TITLE
        axes.text(0, top - 0.15, name, fontsize=12, weight="bold")
        axes.text(WIDTH, top - 0.15, moved, fontsize=9, color="0.4", ha="right")
        for step in steps:
            _draw(axes, step, top)
            top += 1
    return figure


def _draw(axes: Axes, step: Step, top: float) -> None:
    """A box with its rules, between what it reads and what it writes."""
    left, right, middle = 27, 75, top + 0.4
    box = FancyBboxPatch((left, top), right - left, 0.75, boxstyle="round,pad=0.05")
    box.set(facecolor="C0" if step.runner == "kernel" else "C1", edgecolor="none", alpha=0.15)
    axes.add_patch(box)
    rules = step.rules.split(", ")
    lines = [", ".join(rules[at : at + RULES_A_LINE]) for at in range(0, len(rules), RULES_A_LINE)]
    axes.text((left + right) / 2, middle, "\n".join(lines), ha="center", va="center", fontsize=9)
    reads, _, writes = step.columns.removeprefix("reads ").partition("; writes ")
    axes.text(left - 5, middle, _stacked(reads), ha="right", va="center", fontsize=9)
    axes.text(right + 5, middle, _stacked(writes or "numbers"), va="center", fontsize=9)
    for start, end in ((left - 4, left - 0.5), (right + 0.5, right + 4)):
        axes.annotate("", (end, middle), (start, middle), arrowprops=dict(arrowstyle="->"))


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
        accuracies = drawn.results(epochs=3, seed=0, device="cpu")
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
