"""The training loop as boxes in boxes, drawn from the same data that the machine runs by."""

from collections.abc import Iterator
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from loop.run.events import FIT, Scope, Stage


def rows(part: Any, depth: int = 0) -> Iterator[tuple[int, str, Any]]:
    """(depth, text, part) for every line of the drawing of the loop, from top to bottom."""
    if isinstance(part, Scope):
        yield depth, f"{part.name}  {part.repeat or part.when}", part
        for inner in (part.before, *part.parts, part.cancelled, part.after):
            yield from rows(inner, depth + 1)
    else:
        yield (
            depth,
            f"[{part.name}]" if isinstance(part, Stage) else getattr(part, "name", part),
            part,
        )


def loop_picture(scope: Scope = FIT) -> Figure:
    """The scopes as boxes in boxes, with their events and stages in the order of a run."""
    drawn = list(rows(scope))
    figure = Figure(figsize=(8, 0.2 * len(drawn)), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, 10), ylim=(len(drawn) + 0.5, -0.5))
    axes.axis("off")
    for row, (depth, text, part) in enumerate(drawn):
        if isinstance(part, Scope):
            height = len(list(rows(part))) - 0.25
            corner, width = (0.4 * depth, row - 0.4), 9.6 - 0.8 * depth
            box = FancyBboxPatch(corner, width, height, boxstyle="round,pad=0.05")
            box.set(edgecolor="0.5", facecolor="C0", alpha=0.12)
            axes.add_patch(box)
        color = "C3" if isinstance(part, Stage) else "0.6" if "cancel" in text else "black"
        weight = "bold" if isinstance(part, (Scope, Stage)) else "normal"
        axes.text(0.4 * depth + 0.1, row, text, va="center", fontsize=8, color=color, weight=weight)
    return figure
