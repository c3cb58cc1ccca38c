"""Pictures of a run: each function returns a matplotlib Figure, which notebooks show and `savefig`
saves.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

import numpy as np
import optree
import torch
from torch import Tensor

from functional_sgd.hyper import Hyper
from functional_sgd.schedules import Schedule
from loop.history import History, Log
from loop.plots.figure import new_figure
from loop.state import State

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Curve(Protocol):
    """What `lr_find` returns, as far as it is drawn; a suggestion is an attribute by its name."""

    @property
    def lrs(self) -> Sequence[float]:
        """The learning rate of every batch."""

    @property
    def losses(self) -> Sequence[float]:
        """The smoothed loss of every batch."""


def plot_losses(history: History | State, skip: int = 0) -> "Figure":
    """The training loss of every batch, smoothed and raw, and the validation loss after every
    epoch: of a history, or of a state's.

    `skip` leaves out the first batches, whose losses are large. The curves count batches that have
    a loss, and the validation stands at train_iter: where batches were cancelled before their loss,
    it stands so many to the right.
    """
    history = _history("plot_losses", history)
    if not isinstance(skip, int):
        raise TypeError(
            f"plot_losses: skip must be a number of batches, got {skip!r}. The figure that it "
            f"returns can be saved: plot_losses(state).savefig(path)."
        )
    figure, axes = _one("batch", "loss")
    batches = np.arange(len(history.losses))[skip:]
    raw = np.array([float(loss) for loss in history.losses])[skip:]
    axes.plot(batches, raw, color="0.8", linewidth=1, label="training, each batch")
    axes.plot(batches, history.smooth_losses()[skip:], color="C0", label="training, smoothed")
    ends, values = [], []
    for row in history.rows:
        if row.get("valid_loss") is not None:  # not every epoch is validated
            ends.append(row["train_iter"])
            values.append(row["valid_loss"])
    if ends:
        axes.plot(ends, values, "o-", color="C1", label="validation")
    axes.legend(frameon=False)
    return figure


def plot_schedules(history: History | State, names: Sequence[str] | None = None) -> "Figure":
    """The hypers that every batch was trained with, side by side; by default those that changed, or
    lr. Of a history, or of a state's.
    """
    history = _history("plot_schedules", history)
    if names is None:
        names = [name for name, log in history.hypers.items() if _changes(log)]
        if not names and "lr" in history.hypers:
            names = ["lr"]
    return _side_by_side([(name, history.hypers[name]) for name in names])


def plot_records(state: State, name: str = "record_values") -> "Figure":
    """What RecordValues recorded in the last run, side by side, a value for each batch; of a tree,
    the last leaf.

    Raises KeyError if the state has no records of this name.
    """
    if name not in state.memory:
        known = ", ".join(map(repr, state.memory)) or "nothing"
        raise KeyError(
            f"plot_records: the state has no {name!r}, but {known}. Train with RecordValues(...) "
            f"first."
        )
    logs: Mapping[str, Log] = state.memory[name]
    return _side_by_side(list(logs.items()))


def plot_schedule(
    schedule: Schedule | Mapping[str, Schedule],
    points: int = 200,
    name: str = "value",
    steps: int | None = None,
) -> "Figure":
    """A schedule from 0 to 1, or over `steps` if it counts steps; several by their names, in one
    picture.
    """
    if steps is None:
        end, unit = 1, "share of the run"
    else:
        end, unit = steps, "step"
    figure, axes = _one(unit, name)
    positions = np.linspace(0, end, points)
    several = schedule if isinstance(schedule, Mapping) else {"": schedule}
    for number, (label, one) in enumerate(several.items(), 2):
        values = [float(one(position)) for position in positions.tolist()]
        axes.plot(positions, values, color=f"C{number}", label=label)
    if several is schedule:
        axes.legend(frameon=False)
    return figure


def plot_predictions(
    images: Tensor,
    targets: Tensor,
    pred: Tensor,
    classes: Sequence[str] | None = None,
    columns: int = 8,
    rows: int = 3,
) -> "Figure":
    """Images (N, 1 or 3, H, W) with the predicted class, in red with the true one if they
    differ.
    """
    figure = new_figure(1.3 * columns, 1.6 * rows)
    guesses = pred.argmax(dim=-1)
    grid = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for index, axes in enumerate(grid):
        axes.axis("off")
        if index >= len(images):
            continue
        draw_image(axes, images[index])
        title, color = verdict(int(guesses[index]), int(targets[index]), classes)
        axes.set_title(title, fontsize=9, color=color)
    return figure


def verdict(guess: int, truth: int, classes: Sequence[str] | None = None) -> tuple[str, str]:
    """What stands above a prediction, and in which colour.

    >>> verdict(0, 0, ["cat", "dog"]), verdict(0, 1)
    (('cat', 'black'), ('0, not 1', 'crimson'))
    """
    said = _class_name(guess, classes)
    if guess == truth:
        return said, "black"
    return f"{said}, not {_class_name(truth, classes)}", "crimson"


def plot_lr_find(found: Curve) -> "Figure":
    """The smoothed loss over lr, without the last 5 batches, with every suggestion that the points
    suffice for.
    """
    figure, axes = _one("lr", "loss, smoothed")
    # The suggestions leave out the last 5 batches too (LRFind.curve).
    end = -5 if len(found.lrs) > 10 else None
    lrs, losses = np.array(found.lrs[:end]), np.array(found.losses[:end])
    lrs, losses = lrs[np.isfinite(losses)], losses[np.isfinite(losses)]
    axes.plot(lrs, losses, color="0.45")
    axes.set_xscale("log")
    if len(losses):  # what comes after an explosion would flatten what came before
        low, high = losses.min(), losses[: losses.argmin() + 1].max()
        if high > low and losses.max() > high + 2 * (high - low):
            axes.set_ylim(low - 0.1 * (high - low), high + 2 * (high - low))
    for index, name in enumerate(("valley", "slide", "minimum", "steep")):
        with suppress(ValueError):  # too few points for this one
            lr = getattr(found, name)
            # The axis is logarithmic, so the drawn curve is straight in log(lr) between points.
            height = np.interp(np.log(lr), np.log(lrs), losses)
            axes.plot(lr, height, "o", color=f"C{index}", label=f"{name}  {lr:.2e}")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    return figure


def draw_image(axes: "Axes", image: Tensor) -> None:
    """An image (1 or 3, H, W), whose darkest and lightest values are the ends of the scale."""
    image = image.detach().cpu().float()
    # A flat image has no range to divide by.
    image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-12)
    if len(image) == 1:
        axes.imshow(image[0].numpy(), cmap="gray_r")
    else:
        axes.imshow(image.movedim(0, -1).numpy())


def _history(who: str, given: object) -> History:
    """The history of a state, or the one that is given."""
    history = given.history if isinstance(given, State) else given
    if not isinstance(history, History):
        raise TypeError(f"{who}: expected a State or its history, got {type(given).__name__}.")
    return history


def _one(xlabel: str, ylabel: str) -> tuple["Figure", "Axes"]:
    figure = new_figure(6, 3.6)
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    clean(axes)
    return figure, axes


def _side_by_side(logs: Sequence[tuple[str, Iterable[Hyper]]]) -> "Figure":
    """A curve over the batches for each log, under its name; an empty one if there is none."""
    count = max(len(logs), 1)
    figure = new_figure(4.5 * count, 3.2)
    # matplotlib returns a single Axes, not an array, for a grid of one.
    grid = np.atleast_1d(figure.subplots(1, count))
    for axes, (name, log) in zip(grid, logs, strict=False):
        axes.plot([_number(value) for value in log], color="C2")
        axes.set(xlabel="batch", ylabel=name)
        clean(axes)
    return figure


def clean(axes: "Axes") -> None:
    """No frame above and on the right, and faint lines across."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.92")


def _changes(log: Iterable[Hyper]) -> bool:
    return len({_number(value) for value in log if value is not None}) > 1


def _number(value: Hyper) -> float:
    """A hyper as one number: of a tree, the last leaf (the head, in a list of groups); nan, which
    is a gap in a curve, for none.
    """
    leaves = optree.tree_leaves(value)
    return float(leaves[-1]) if leaves else torch.nan


def _class_name(number: int, classes: Sequence[str] | None) -> str:
    return str(number) if classes is None else classes[number]
