"""Metrics from the confusion matrix, which says what was taken for what: Cohen's kappa, Matthews'
correlation.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from loop.metrics.tally import Accumulator, Tally, check_classes, flat, wide


def confusion_matrix(
    pred: Tensor, target: Tensor, axis: int = -1, ignore_index: int | None = None
) -> Tensor:
    """How often each class (row) was taken for each class (column): (C, C) of int64; the diagonal
    is what was right.

    >>> confusion_matrix(torch.eye(2), torch.tensor([0, 0]))
    tensor([[1, 1],
            [0, 0]])
    """
    classes = pred.shape[axis]
    given, wanted, kept = decided("confusion_matrix", pred, target, axis, ignore_index)
    return how_often(wanted * classes + given, kept, classes * classes).reshape(classes, classes)


class OfMatrix(Tally):
    """A metric that is read from the confusion matrix; the fields are its subclasses' to order."""

    axis: int
    ignore_index: int | None

    def count(self, pred: Tensor, target: Tensor) -> Accumulator:
        """The confusion matrix of a batch."""
        return {"matrix": confusion_matrix(pred, target, self.axis, self.ignore_index)}


@dataclass(frozen=True)
class ConfusionMatrix(OfMatrix):
    """The counts of `confusion_matrix` over all batches, as {"matrix": (C, C)}; their value is the
    accuracy.

    The matrix itself, of a whole data set: `matrix(accumulator)`, or
    `confusion_matrix(predict(...), targets)`.

    >>> metric = ConfusionMatrix()
    >>> metric.matrix(metric.add(metric.start(), torch.eye(2), torch.tensor([0, 0]))).tolist()
    [[1, 1], [0, 0]]
    """

    axis: int = -1
    ignore_index: int | None = None

    def matrix(self, counted: Accumulator) -> Tensor:
        """The matrix of all batches."""
        found: Tensor = counted["matrix"]
        return found

    def read(self, counted: Accumulator) -> Tensor:
        """The accuracy."""
        matrix = wide(self.matrix(counted))
        return divided(matrix.trace(), matrix.sum())


@dataclass(frozen=True)
class CohenKappa(OfMatrix):
    """How much better than chance: 1 - sum(w * matrix) / sum(w * expected), 1 if all is right, 0
    for chance.

    expected is what a confusion matrix with these row and column sums has if they are independent.
    w is 0 on the diagonal and elsewhere 1 (`weights` None), |i - j| ("linear") or (i - j)**2
    ("quadratic"). nan if there is one class only. Raises ValueError for other weights. Source:
    Cohen 1960, 1968.

    >>> CohenKappa()(torch.eye(2)[[0, 0, 1, 1]], torch.tensor([0, 0, 1, 0]))
    0.5
    """

    weights: Literal["linear", "quadratic"] | None = None
    axis: int = -1
    ignore_index: int | None = None

    def __post_init__(self) -> None:
        if self.weights not in (None, "linear", "quadratic"):
            raise ValueError(
                f"CohenKappa: weights must be None, 'linear' or 'quadratic', got {self.weights!r}."
            )

    def read(self, counted: Accumulator) -> Tensor:
        """Kappa."""
        matrix = wide(counted["matrix"])
        expected = torch.outer(matrix.sum(dim=1), matrix.sum(dim=0)) / matrix.sum()
        index = torch.arange(len(matrix), device=matrix.device)
        distance = (index[:, None] - index).abs()
        weights = distance > 0
        if self.weights == "linear":
            weights = distance
        elif self.weights == "quadratic":
            weights = distance.square()
        return 1 - (weights * matrix).sum() / (weights * expected).sum()


@dataclass(frozen=True)
class Matthews(OfMatrix):
    """The correlation of the classes given with the targets, -1 to 1; for two classes Pearson's of
    zeros and ones.

    0 if all targets, or all predictions, are of one class. Source: Matthews 1975; Gorodkin 2004 for
    more classes.

    >>> round(Matthews()(torch.eye(2)[[0, 0, 1, 1]], torch.tensor([0, 0, 1, 0])), 4)
    0.5774
    """

    axis: int = -1
    ignore_index: int | None = None

    def read(self, counted: Accumulator) -> Tensor:
        """The correlation."""
        matrix = wide(counted["matrix"])
        wanted, given, total = matrix.sum(dim=1), matrix.sum(dim=0), matrix.sum()
        both = matrix.trace() * total - wanted @ given
        return divided(both, ((total**2 - wanted @ wanted) * (total**2 - given @ given)).sqrt())


class Decided(NamedTuple):
    """What was decided of every sample."""

    given: Tensor  # the class of the prediction
    wanted: Tensor  # that of the target; 0 where the sample does not count
    kept: Tensor  # whether it counts


def decided(
    what: str, pred: Tensor, target: Tensor, axis: int, ignore_index: int | None
) -> Decided:
    """The classes of every sample. Raises ValueError for predictions of another shape, or of one
    class.
    """
    check_classes(what, pred, axis)
    given, wanted = flat(what, pred.argmax(dim=axis), target.long())
    if ignore_index is None:
        return Decided(given, wanted, torch.ones_like(wanted, dtype=torch.bool))
    kept = wanted != ignore_index
    # Class 0 stands in for -100, say, which is no index. It is added with weight 0.
    return Decided(given, torch.where(kept, wanted, 0), kept)


def how_often(values: Tensor, kept: Tensor, size: int) -> Tensor:
    """How many of the values that count are 0, 1, ..., size - 1; unlike bincount, without waiting
    for a device.
    """
    zeros = torch.zeros(size, dtype=torch.int64, device=values.device)
    return zeros.scatter_add(0, values, kept.long())


def divided(above: Tensor, below: Tensor) -> Tensor:
    """above / below, but 0 / 0 is 0."""
    return above / torch.where(below == 0, 1.0, below)
