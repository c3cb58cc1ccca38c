"""Pictures of a run: each function returns a matplotlib Figure, which notebooks show and `savefig` saves."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optree
import torch
from matplotlib.figure import Figure
from torch import Tensor

from loop.history import History


def plot_losses(history: History, skip: int = 0) -> Figure:
    """The training loss of every batch, smoothed and raw, and the validation loss after every epoch.

    `skip` leaves out the first batches, whose losses are large.
    """
    figure, axes = _one(("batch", "loss"))
    batches = np.arange(len(history.losses))[skip:]
    raw = np.array([float(loss) for loss in history.losses])[skip:]
    axes.plot(batches, raw, color="0.8", linewidth=1, label="training, each batch")
    axes.plot(batches, history.smooth_losses()[skip:], color="C0", label="training, smoothed")
    measured = [row for row in history.rows if row.get("valid_loss") is not None]
    if measured:
        ends, values = [row["train_iter"] for row in measured], [row["valid_loss"] for row in measured]
        axes.plot(ends, values, "o-", color="C1", label="validation")
    axes.legend(frameon=False)
    return figure


def plot_schedules(history: History, names: Sequence[str] | None = None) -> Figure:
    """The hypers that every batch was trained with, side by side; by default those that changed, or lr."""
    if names is None:
        changed = [name for name, log in history.hypers.items() if len({_number(value) for value in log}) > 1]
        names = changed or [name for name in ("lr",) if name in history.hypers]
    figure = Figure(figsize=(4.5 * max(len(names), 1), 3.2), layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(1, max(len(names), 1))), names, strict=False):
        axes.plot([_number(value) for value in history.hypers[name]], color="C2")
        axes.set(xlabel="batch", ylabel=name)
        _clean(axes)
    return figure


def plot_schedule(schedule: Callable[[float], Any], points: int = 200, name: str = "value") -> Figure:
    """A schedule from 0 to 1."""
    figure, axes = _one(("share of the run", name))
    positions = np.linspace(0, 1, points)
    axes.plot(positions, [float(schedule(position)) for position in positions.tolist()], color="C2")
    return figure


def plot_predictions(
    images: Tensor, targets: Tensor, pred: Tensor, classes: Sequence[str] | None = None, columns: int = 8, rows: int = 3
) -> Figure:
    """Images (N, 1 or 3, H, W) with the predicted class, and the true one in red where they differ."""
    figure = Figure(figsize=(1.3 * columns, 1.6 * rows), layout="constrained")
    guesses = pred.argmax(dim=-1)
    grid = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for index, axes in enumerate(grid):
        axes.axis("off")
        if index >= len(images):
            continue
        image = images[index].detach().cpu().float()
        image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-12)
        axes.imshow(
            (image[0] if len(image) == 1 else image.movedim(0, -1)).numpy(), cmap="gray_r" if len(image) == 1 else None
        )
        guess, truth = int(guesses[index]), int(targets[index])
        said, meant = (classes[guess], classes[truth]) if classes is not None else (str(guess), str(truth))
        right = guess == truth
        axes.set_title(said if right else f"{said}, not {meant}", fontsize=9, color="black" if right else "crimson")
    return figure


def _one(labels: tuple[str, str]) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=labels[0], ylabel=labels[1])
    _clean(axes)
    return figure, axes


def _clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.92")


def _number(value: Any) -> float:
    """A hyper as one number: of a tree, the last leaf (the head, in a list of groups)."""
    leaves = optree.tree_leaves(value)
    return float(leaves[-1] if leaves else torch.nan)
