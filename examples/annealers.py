"""Who should lower the learning rate? The gradients (lesson 18's automatic annealer), or a schedule
made beforehand.

What came out, as means of three runs of 20 epochs: from a good lr (0.01) all ways end within 0.6
percent of each other. From one that is ten times too high, a constant lr ends at a validation loss
of 0.24, the workbook's rule at 0.18, the rule of the lesson's text at 0.12, a cosine at 0.10, and
the workbook's rule with a threshold of 1.2 instead of 2, which suits gradients averaged over an
epoch, at 0.09. So the annealer forgives a wrong lr; a right one does not need it.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import tyro
from digits import digits
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import nn

from functional_sgd import adamw
from functional_sgd.schedules import Cosine, one_cycle
from loop import AnnealOnGradRatio, DataLoaders, Learner, ParamScheduler, State, accuracy, fit

WAYS: dict[str, Callable[[float], list[Any]]] = {
    "constant": lambda lr: [],
    "cosine": lambda lr: [ParamScheduler({"lr": Cosine(lr, 0.0)})],
    "one cycle": lambda lr: [ParamScheduler({"lr": one_cycle(lr)})],
    "anneal on rise above 2": lambda lr: [AnnealOnGradRatio("rise")],
    "anneal on rise above 1.2": lambda lr: [AnnealOnGradRatio("rise", threshold=1.2)],
    "anneal on fall by half": lambda lr: [AnnealOnGradRatio("fall")],
}
"""Name -> the callbacks that move lr from where it begins, or up to there in one cycle."""


def train(
    data: DataLoaders, callbacks: Sequence[Any], lr: float, epochs: int, seed: int, device: str
) -> State:
    """One run of a small network (64 pixels, 100 hidden units, 10 scores) from fresh weights."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    learner = Learner(net, data, nn.functional.cross_entropy, adamw(lr=lr), [accuracy], callbacks)
    return fit(learner, learner.init(seed, device), epochs)


def last_mean(runs: Sequence[State], column: str) -> float:
    """The mean over runs of what the last epoch measured."""
    return fmean(state.history.column(column)[-1] for state in runs)


def picture(runs: dict[str, State], lr: float) -> Figure:
    """lr and validation loss of one run each way."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, state in runs.items():
        left.plot(list(state.history.hypers["lr"]), label=name)
        right.plot(state.history.column("valid_loss"), label=name)
    left.set(xlabel="batch", ylabel="lr", yscale="log", ylim=(lr / 1e4, lr * 2))
    right.set(xlabel="epoch", ylabel="validation loss", yscale="log")
    right.legend(frameon=False)
    return figure


def main(
    lrs: tuple[float, ...] = (0.01, 0.1),
    epochs: int = 20,
    seeds: int = 3,
    seed: int = 0,
    device: str = "cpu",
    pictures: Path = Path("pictures"),
) -> None:
    """Train each way from each lr, print the means over seeds, and save a picture for each lr.

    Args:
        lrs: Learning rates to begin with; for one_cycle, the highest.
        epochs: Passes over the training images.
        seeds: How many runs of each.
        seed: The first of their seeds: each decides the first weights and the order of the data.
        device: Where to train.
        pictures: The folder for the pictures.
    """
    started = time.perf_counter()
    torch.set_num_threads(1)  # faster for so small a network
    data, _, _ = digits()
    pictures.mkdir(parents=True, exist_ok=True)
    table = Table("lr", "way", "accuracy", "valid loss", "last lr")
    for lr in lrs:
        runs = {
            name: [train(data, way(lr), lr, epochs, seed + run, device) for run in range(seeds)]
            for name, way in WAYS.items()
        }
        for name, states in runs.items():
            last = fmean(state.history.hypers["lr"][-1] for state in states)
            measured = (last_mean(states, column) for column in ("accuracy", "valid_loss"))
            table.add_row(f"{lr:g}", name, *(f"{value:.4f}" for value in measured), f"{last:.1e}")
        table.add_section()
        path = pictures / f"annealers_{lr:g}.png"
        picture({name: states[0] for name, states in runs.items()}, lr).savefig(path, dpi=120)
        print(f"saved {path}")
    Console().print(table)
    print(f"{len(lrs) * len(WAYS) * seeds} runs in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    tyro.cli(main)
