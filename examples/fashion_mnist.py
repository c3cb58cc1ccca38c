"""Lesson 18 of fast.ai's course on Fashion-MNIST: all its ways to train, beside its results, and
the question that it leaves open, whether an automatic annealer can replace a schedule.

Five epochs of one-cycle, three seeds: 0.897 +- 0.003 (the lesson's one run: 0.906), 0.904 +- 0.001
with --batch-size 512, 0.905 +- 0.003 with 256. One run each: torch's own one-cycle 0.898, a cosine
0.888, a constant lr 0.882, and the annealer the same, since it saw no reason to cut.
"""

import time
from collections.abc import Iterable
from operator import length_hint
from pathlib import Path
from statistics import fmean, stdev

import torch
import tyro
from fashion_data import CACHE, loaders
from fashion_net import network
from fashion_rows import ROWS, Row
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import nn

from loop import DataLoaders, History, Learner, Progress, accuracy, fit


def train(row: Row, data: DataLoaders, epochs: int, seed: int, device: str) -> History:
    """One run from fresh weights."""
    torch.manual_seed(seed)
    loss = nn.functional.cross_entropy
    learner = Learner(network(), data, loss, row.opt, [accuracy], [Progress()])
    callbacks = row.callbacks(epochs * length_hint(data.train))
    return fit(learner, learner.init(seed, device), epochs, callbacks).history


def by_epoch(runs: Iterable[History], column: str) -> list[float]:
    """Means over runs."""
    return [fmean(values) for values in zip(*(run.column(column) for run in runs), strict=True)]


def lines(values: Iterable[float]) -> str:
    """One line for every epoch."""
    return "\n".join(f"{value:.3f}" for value in values) or "-"


def picture(found: dict[str, list[History]]) -> Figure:
    """lr and beta1 over the batches, and the mean accuracy over the epochs, of each row."""
    axes = (figure := Figure(figsize=(13, 4), layout="constrained")).subplots(1, 3)
    for index, (name, runs) in enumerate(found.items()):
        style = dict(color=f"C{index % 10}", linestyle="--" if "torch" in name else "-", label=name)
        for place, hyper in zip(axes, ("lr", "mom"), strict=False):
            if hyper in runs[0].hypers:
                place.plot(list(runs[0].hypers[hyper]), **style)
        means = by_epoch(runs, "accuracy")
        axes[2].plot(range(1, len(means) + 1), means, **style)
    for place, label in zip(axes, ("lr", "beta1", "validation accuracy"), strict=True):
        place.set(xlabel="epoch" if "acc" in label else "batch", ylabel=label)
    axes[2].legend(frameon=False, fontsize=8)
    return figure


def main(
    root: Path = CACHE,
    rows: tuple[str, ...] = ("all",),
    epochs: int = 5,
    seeds: int = 3,
    batch_size: int = 1024,
    seed: int = 42,
    device: str = "cpu",
    pictures: Path = Path("pictures"),
    short: bool = False,
) -> None:
    """Train as the lesson does, and print its accuracies and losses beside ours.

    Args:
        root: A folder with the four files, or torchvision's FashionMNIST/raw, where they may go.
        rows: Which rows to repeat: all, or names of them.
        epochs: Train no row for more epochs; schedules then run faster, and nothing is compared.
        seeds: How many runs of each row; ours are their means, +- the deviation.
        batch_size: Images in a batch; the lesson's is 1024.
        seed: Decides first weights and orders of the first run.
        device: Where to train.
        pictures: The folder for the picture.
        short: Only see that it works: the first row, one run of one epoch, 2048 images.
    """
    if unknown := {*rows} - {"all", *ROWS}:
        raise SystemExit(f"--rows: {sorted(unknown)} are none of {['all', *ROWS]}.")
    names = [name for name in ROWS if name in rows or "all" in rows]
    if short:
        names, epochs, seeds = names[:1], 1, 1
    data, found = loaders(root, short, batch_size), dict[str, list[History]]()
    columns = "row, lesson, ours, last, difference, lesson's loss, our loss, seconds"
    table = Table(*columns.split(", "), show_lines=True)
    for name in names:
        row, started = ROWS[name], time.perf_counter()
        print(f"\n{name}: {row.opt}")
        count = min(epochs, row.epochs)
        runs = [train(row, data, count, seed + index, device) for index in range(seeds)]
        found[name], seconds = runs, f"{time.perf_counter() - started:.0f}"
        ours, last = by_epoch(runs, "accuracy"), [run.column("accuracy")[-1] for run in runs]
        end = f"{fmean(last):.3f}" + (f" +- {stdev(last):.3f}" if seeds > 1 else "")
        compared = len(ours) == len(row.losses)
        difference = f"{ours[-1] - row.accuracies[-1]:+.3f}" if compared else "-"
        cells = [row.accuracies, ours, row.losses, by_epoch(runs, "valid_loss")]
        lesson, our, *both = map(lines, cells)
        table.add_row(name, lesson, our, end, difference, *both, seconds)
    Console().print(table)
    pictures.mkdir(parents=True, exist_ok=True)
    picture(found).savefig(pictures / "fashion_mnist.png", dpi=120)
    print(f"saved {pictures}/fashion_mnist.png")


if __name__ == "__main__":
    tyro.cli(main)
