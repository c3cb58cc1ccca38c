"""Pictures of what a classifier gets wrong."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from loop.metrics import confusion_matrix
from loop.plots.figure import new_figure
from loop.plots.runs import draw_image, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_NUMBERS = 25  # classes beyond which the counts would not be readable


def plot_confusion_matrix(
    targets: Tensor, pred: Tensor, classes: Sequence[str] | None = None, normalize: bool = False
) -> "Figure":
    """How often each class (row) was taken for each class (column): targets (N,) of classes, pred
    (N, C) of scores.

    The colour of a field is its share of the row, so that rare classes are as plain to see as
    frequent ones. The number in it is the count, or the share if `normalize`. Of a learner:
    `plot_confusion_matrix(samples.targets, samples.preds)`, with
    `samples = sample_losses(learner, state)`.
    """
    for value in (targets, pred):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"plot_confusion_matrix: expected tensors of targets and scores, got "
                f"{type(value).__name__}. Both are in sample_losses(learner, state), as targets "
                f"and preds."
            )
    counts = confusion_matrix(pred, targets).cpu().numpy()
    # A class without samples has shares of 0, not of 0 / 0.
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = len(counts)
    labels = range(size) if classes is None else classes
    names = [str(label) for label in labels]
    side = max(3.4, 0.55 * size + 1.2)
    figure = new_figure(side, side)
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="actual", xticks=range(size), yticks=range(size))
    rotation = 90 if max(map(len, names)) > 3 else 0
    axes.set_xticklabels(names, rotation=rotation)
    axes.set_yticklabels(names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if size > _MOST_NUMBERS:
        return figure
    for row, column in np.argwhere(counts):
        text = f"{shares[row, column]:.2f}" if normalize else str(counts[row, column])
        # White on the dark half of the colour map.
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=9, color=color)
    return figure


def plot_top_losses(
    images: Tensor,
    targets: Tensor,
    pred: Tensor,
    losses: Tensor,
    classes: Sequence[str] | None = None,
    k: int = 9,
) -> "Figure":
    """The k images with the largest losses, the worst first, with the predicted class, the true one
    and the loss.

    images (N, 1 or 3, H, W), targets (N,) of classes, pred (N, C) of scores, losses (N,), as
    `sample_losses` has them: `plot_top_losses(*sample_losses(learner, state))`. A loss that is NaN
    is the worst of all.
    """
    order = losses.detach().nan_to_num(nan=torch.inf).argsort(descending=True, stable=True)
    worst = order[:k].tolist()
    columns = max(int(np.ceil(np.sqrt(len(worst)))), 1)
    rows = max(-(-len(worst) // columns), 1)
    figure = new_figure(1.9 * columns, 2.3 * rows)
    guesses = pred.argmax(dim=-1)
    for place, axes in enumerate(np.atleast_1d(figure.subplots(rows, columns)).ravel()):
        axes.axis("off")
        if place >= len(worst):
            continue
        index = worst[place]
        draw_image(axes, images[index])
        title, color = verdict(int(guesses[index]), int(targets[index]), classes)
        axes.set_title(f"{title}\nloss {float(losses[index]):.2f}", fontsize=9, color=color)
    return figure
