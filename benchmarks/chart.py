"""Draw the medians of optimizer_step.py as horizontal bars."""

import json
from pathlib import Path

import tyro
from common import RESULTS
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "optimizer_step.png"
OURS, OTHERS = "#1f77b4", "#b8b8b8"


def newest() -> Path:
    """The last JSON that optimizer_step.py has written."""
    found = sorted(RESULTS.glob("*-optimizer_step.json"))
    if not found:
        raise SystemExit("chart: no results. Run optimizer_step.py --save-results first.")
    return found[-1]


def draw(axes: Axes, title: str, times: dict[str, list[float]]) -> None:
    """One bar for each contender, the fastest on top; lines from the 10th to the 90th
    percentile.
    """
    names = sorted(times, key=lambda who: -times[who][1])
    low, median, high = zip(*([1e3 * value for value in times[who]] for who in names), strict=True)
    errors = [
        [m - a for a, m in zip(low, median, strict=True)],
        [b - m for m, b in zip(median, high, strict=True)],
    ]
    colors = [OURS if who.startswith("ours") else OTHERS for who in names]
    axes.barh(names, median, color=colors, xerr=errors, error_kw=dict(ecolor="#666666", lw=0.8))
    for place, (end, value) in enumerate(zip(high, median, strict=True)):
        axes.text(end + 0.02 * max(high), place, f"{value:.3g}", va="center", fontsize=8)
    axes.set_xlim(0, 1.18 * max(high))
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def main(
    path: Path | None = None,
    tree_names: tuple[str, ...] = ("resnet34", "gpt10", "many1000"),
    optimizer: str = "adamw",
    save: bool = False,
) -> None:
    """Draw one panel for each tree.

    Args:
        path: The JSON of optimizer_step.py; the newest, if none is given.
        tree_names: The trees; those that were not measured are left out.
        optimizer: The optimizer.
        save: Write docs/images/optimizer_step.png; otherwise only say what would be drawn.
    """
    seconds = json.loads((path or newest()).read_text())["seconds"]
    shown = [name for name in tree_names if optimizer in seconds.get(name, {})]
    if not shown:
        raise SystemExit(f"chart: {optimizer} was not measured on any of {', '.join(tree_names)}.")
    figure = Figure(figsize=(4.2 * len(shown), 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        draw(axes, f"{optimizer}, {name}", seconds[name][optimizer])
        axes.set_xlabel("milliseconds for one step")
    print(f"{optimizer} on {', '.join(shown)}")
    if save:
        PICTURE.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(PICTURE, dpi=150)
        print(f"saved {PICTURE}")


if __name__ == "__main__":
    tyro.cli(main)
