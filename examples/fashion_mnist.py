"""Lesson 18 of fast.ai's course on Fashion-MNIST: seven ways to train, beside its results."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from fashion_data import CACHE, loaders
from fashion_net import network
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import functional_sgd as fs
from functional_sgd.schedules import Constant, Cosine, Join, one_cycle, three_cosines
from loop import DataLoaders, Learner, ParamScheduler, Progress, State, accuracy, fit


@fs.elementwise(sqr_avg=torch.zeros_like)
def average_sqr_grad_from_first(
    grad: Tensor, sqr_avg: Tensor, *, step: Tensor, sqr_mom: float
) -> dict[str, Tensor]:
    """The library's average_sqr_grad, but it starts at the first gradient's square, as there."""
    before = torch.where(step <= 1, grad.square(), sqr_avg)
    return dict(sqr_avg=sqr_mom * before + (1 - sqr_mom) * grad.square())


rms_rules = (average_sqr_grad_from_first, fs.scale_by_rms, fs.sgd_step)
rmsprop = fs.chain(*rms_rules, lr=3e-3, sqr_mom=0.99, eps=1e-5)
averages = (fs.average_grad, fs.average_sqr_grad, fs.debias)
adam_rules = (*averages, fs.scale_by_rms_eps_inside, fs.sgd_step)
adam = fs.chain(*adam_rules, lr=6e-3, mom=0.9, sqr_mom=0.99, eps=1e-5)

cosine = Cosine(2e-2, 0.0)
stairs = Join((1 / 3,) * 3, tuple(Constant(cosine(epoch / 3)) for epoch in range(3)))
peak = one_cycle(6e-2, div_final=25e4, pct_start=0.3)
cycle = dict(lr=peak, mom=three_cosines(0.3, 0.95, 0.85, 0.95))
cycled = (0.822, 0.856, 0.879, 0.901, 0.906), (0.546, 0.413, 0.333, 0.279, 0.267)


@dataclass(frozen=True)
class Row:
    """A row of the lesson: how it trains, and what it got on the validation data, by epoch."""

    opt: fs.Optimizer
    schedules: Mapping[str, Any]
    accuracies: tuple[float, ...]
    losses: tuple[float, ...]


ROWS = {
    "sgd": Row(fs.sgd(lr=0.4), {}, (0.825, 0.844, 0.852), (0.485, 0.429, 0.406)),
    "momentum": Row(fs.momentum(lr=1.5, mom=0.9), {}, (0.845, 0.868, 0.876), (0.423, 0.361, 0.343)),
    "rmsprop": Row(rmsprop, {}, (0.818, 0.844, 0.853), (0.489, 0.430, 0.407)),
    "adam": Row(adam, {}, (0.841, 0.863, 0.871), (0.431, 0.376, 0.349)),
    "cosine": Row(fs.adamw(), dict(lr=cosine), (0.858, 0.874, 0.883), (0.383, 0.339, 0.317)),
    "stairs": Row(fs.adamw(), dict(lr=stairs), (0.857, 0.875, 0.887), (0.382, 0.339, 0.307)),
    "one_cycle": Row(fs.adamw(), cycle, *cycled),
}
Name = Literal["all", "sgd", "momentum", "rmsprop", "adam", "cosine", "stairs", "one_cycle"]


def train(row: Row, data: DataLoaders, epochs: int, seed: int = 42) -> State:
    """One run from fresh weights."""
    torch.manual_seed(seed)
    loss = nn.functional.cross_entropy
    learner = Learner(network(), data, loss, row.opt, [accuracy], [Progress()])
    return fit(learner, learner.init(seed), epochs, [ParamScheduler(row.schedules)])


def column(values: Iterable[float]) -> str:
    """One line for every epoch."""
    return "\n".join(f"{value:.3f}" for value in values)


def main(
    root: Path = CACHE, rows: tuple[Name, ...] = ("all",), epochs: int = 5, quick: bool = False
) -> None:
    """Train as the lesson does, and print its validation accuracies and losses beside ours.

    Args:
        root: A folder with the four files, or torchvision's FashionMNIST/raw, where they may go.
        rows: Which rows of the lesson to repeat.
        epochs: Train no row for more epochs; schedules then run faster, and nothing is compared.
        quick: Only see that it works: the first of the rows, one epoch, 2048 images.
    """
    names = [name for name in ROWS if name in rows or "all" in rows]
    if quick:
        names, epochs = names[:1], 1
    data = loaders(root, quick)
    columns = ("row", "lesson", "ours", "difference", "lesson's loss", "our loss", "seconds")
    table = Table(*columns, show_lines=True)
    for name in names:
        row, started = ROWS[name], time.perf_counter()
        print(f"\n{name}: {row.opt}")
        history = train(row, data, min(epochs, len(row.losses))).history
        ours, seconds = history.column("accuracy"), time.perf_counter() - started
        whole = len(ours) == len(row.losses)
        difference = f"{ours[-1] - row.accuracies[-1]:+.3f}" if whole else "-"
        both = [row.accuracies, ours, row.losses, history.column("valid_loss")]
        accuracies, our, losses, our_losses = map(column, both)
        table.add_row(name, accuracies, our, difference, losses, our_losses, f"{seconds:.0f}")
    Console().print(table)


if __name__ == "__main__":
    tyro.cli(main)
