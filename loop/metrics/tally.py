"""What makes a metric exact whatever the batches: a count of each batch, counts that can be merged,
one reading.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from functional_sgd.precision import HALVES, widest
from functional_sgd.tree import Tree
from loop.callback import snake_case

Accumulator: TypeAlias = Mapping[str, Any]
"""What a metric has counted so far: tensors by name; empty before the first batch."""


@runtime_checkable
class Mergeable(Protocol):
    """A metric that is more than a mean of means: four pure functions of an accumulator.

    `merge` is associative, `start()` is its neutral element, and counting two batches is merging
    their counts; so the value is the same however the data is cut into batches. Only `value` waits
    for a device.
    """

    def start(self) -> Accumulator:
        """The accumulator of no data."""

    def add(self, accumulator: Accumulator, pred: Tree, *targets: Tree) -> Accumulator:
        """The accumulator with one more batch."""

    def merge(self, left: Accumulator, right: Accumulator) -> Accumulator:
        """The accumulator of the data of both."""

    def value(self, accumulator: Accumulator) -> float:
        """The metric of the data counted; nan for none."""


Metric: TypeAlias = Callable[..., Tensor] | Mergeable
"""A function (pred, *targets) -> 0-d tensor, a mean over the batch's samples; or a Mergeable."""


def metric_name(metric: Callable[..., object] | Mergeable) -> str:
    """The column of a metric: its name, the function's, or the class's."""
    return str(getattr(metric, "name", None) or getattr(metric, "__name__", type(metric).__name__))


class Tally(ABC):
    """A Mergeable by two functions: what a batch counts (`count`), and what the counts say
    (`read`).

    Counts are added up; where that is not how they are merged, `join` says how. Calling a tally
    gives its value for one batch alone. The name of its column is the class's, in snake case.

    >>> class Largest(Tally):
    ...     def count(self, pred, target):
    ...         return {"top": pred.max()}
    ...     def join(self, left, right):
    ...         return {"top": torch.maximum(left["top"], right["top"])}
    ...     def read(self, counted):
    ...         return counted["top"]
    >>> largest = Largest()
    >>> counted = largest.add(largest.start(), torch.tensor([1.0, 5.0]), None)
    >>> largest.value(largest.add(counted, torch.tensor([2.0]), None))
    5.0
    """

    @property
    def name(self) -> str:
        """The column."""
        return snake_case(type(self).__name__)

    @abstractmethod
    def count(self, pred: Tree, *targets: Tree) -> Accumulator:
        """What one batch adds; an empty dict if it has nothing to add."""

    @abstractmethod
    def read(self, counted: Accumulator) -> Tensor | float:
        """The value, of at least one batch."""

    def join(self, left: Accumulator, right: Accumulator) -> Accumulator:
        """Two counts, of at least one batch each, as one."""
        return {key: left[key] + right[key] for key in left}

    def start(self) -> Accumulator:
        """The accumulator of no data: an empty dict, for a device is known only once
        there is data.
        """
        return {}

    def add(self, accumulator: Accumulator, pred: Tree, *targets: Tree) -> Accumulator:
        """The accumulator with one more batch."""
        with torch.no_grad():
            return self.merge(accumulator, self.count(pred, *targets))

    def merge(self, left: Accumulator, right: Accumulator) -> Accumulator:
        """The accumulator of the data of both."""
        if left and right:
            return self.join(left, right)
        return dict(left or right)

    def value(self, accumulator: Accumulator) -> float:
        """The metric of the data counted; nan for none. Waits for the device."""
        if not accumulator:
            return float("nan")
        return one_number(f"metric {self.name!r}", self.read(accumulator))

    def __call__(self, pred: Tree, *targets: Tree) -> float:
        """The value for one batch alone."""
        return self.value(self.add(self.start(), pred, *targets))


@dataclass(frozen=True)
class Weighted(Tally):
    """The mean of a batch's measure, weighted by `weight(pred, *targets)` instead of the number of
    samples.

    value = sum(weight * metric) / sum(weight). For a measure that is a mean over tokens, the weight
    is the number of tokens that are no padding. A batch of weight 0 counts nothing, whatever its
    measure. Raises TypeError for a metric that is Mergeable already: it needs no weights.

    >>> def tokens(pred, target):
    ...     return (target >= 0).sum()
    >>> def right(pred, target):
    ...     return (pred == target)[target >= 0].float().mean()
    >>> metric = Weighted(right, tokens)
    >>> one = metric.add(metric.start(), torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3]))
    >>> metric.value(metric.add(one, torch.tensor([1, 2, 3]), torch.tensor([0, -1, -1])))
    0.75
    """

    metric: Callable[..., Tensor]
    weight: Callable[..., Tensor | float]

    def __post_init__(self) -> None:
        if isinstance(self.metric, (type, Mergeable)) or not callable(self.metric):
            raise TypeError(
                f"Weighted: metric must be a function (pred, *targets) -> 0-d tensor, got "
                f"{self.metric!r}."
            )

    @property
    def name(self) -> str:
        """The column: that of the function."""
        return metric_name(self.metric)

    def count(self, pred: Tree, *targets: Tree) -> Accumulator:
        """The weighted measure, and the weight."""
        measured = wide(torch.as_tensor(self.metric(pred, *targets)))
        weight = torch.as_tensor(
            self.weight(pred, *targets), dtype=measured.dtype, device=measured.device
        )
        return {"total": torch.where(weight == 0, 0.0, measured * weight), "weight": weight}

    def read(self, counted: Accumulator) -> Tensor:
        """The weighted mean."""
        mean: Tensor = counted["total"] / counted["weight"]
        return mean


@dataclass(frozen=True)
class Collected(Tally):
    """A function of all samples at once, for what no sums can say: `Collected(roc_auc)`.

    Predictions and targets of all batches are kept until the end, joined along the first axis, so
    this needs memory for a whole data set. The function may return a number or a 0-d tensor. Raises
    ValueError for batches that cannot be joined, as those of sequences padded to other lengths.

    >>> def median(pred, target):
    ...     return (pred - target).abs().median()
    >>> metric = Collected(median)
    >>> one = metric.count(torch.ones(1), torch.zeros(1))
    >>> two = metric.count(torch.ones(2), torch.ones(2))
    >>> metric.value(metric.merge(one, two))
    0.0
    """

    function: Callable[..., Tensor | float]

    @property
    def name(self) -> str:
        """The column: that of the function."""
        return metric_name(self.function)

    def count(self, pred: Tree, *targets: Tree) -> Accumulator:
        """The batch itself."""
        return collect(pred, *targets)

    def join(self, left: Accumulator, right: Accumulator) -> Accumulator:
        """Both, one behind the other."""
        return collected(left, right)

    def read(self, counted: Accumulator) -> Tensor | float:
        """The function's value."""
        return self.function(*columns(counted))


def collect(*parts: Tensor) -> Accumulator:
    """A batch's tensors, as an accumulator."""
    return {str(index): (part.detach(),) for index, part in enumerate(parts)}


def collected(left: Accumulator, right: Accumulator) -> Accumulator:
    """Pieces one behind the other; the last ones are joined as soon as they are equally long, so
    there are few.
    """
    return {key: _tidied((*left[key], *right[key])) for key in left}


def columns(counted: Accumulator) -> list[Tensor]:
    """All data that was collected: a tensor for each part of a batch."""
    return [_joined(counted[str(index)]) for index in range(len(counted))]


def _tidied(pieces: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # As in a binary counter: of n equal batches at most log2(n) + 1 pieces are left, and no sample
    # is copied more often than that.
    while len(pieces) > 1 and len(pieces[-2]) <= len(pieces[-1]):
        pieces = (*pieces[:-2], _joined(pieces[-2:]))
    return pieces


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    cure = "Pad all data to one length, or write a Tally whose count keeps what can be joined."
    return in_a_row("Collected", pieces, cure)


def in_a_row(who: str, parts: Sequence[Tensor], cure: str) -> Tensor:
    """Tensors one behind the other. Raises ValueError, on behalf of `who`, if they differ in more
    than their length.
    """
    try:
        return torch.cat(tuple(parts))
    except RuntimeError as error:
        shapes = list(dict.fromkeys(tuple(part.shape) for part in parts))
        of_samples = {shape[1:] for shape in shapes}
        if len(of_samples) < 2:
            raise
        other = next(shape for shape in shapes if shape[1:] != shapes[0][1:])
        raise ValueError(
            f"{who}: the batches are joined, so it expected tensors that differ in the number of "
            f"samples only, got shapes {shapes[0]} and {other}. {cure}"
        ) from error


def wide(values: Tensor) -> Tensor:
    """The values in float64, so that sums over a data set are exact enough; in float32 where a
    device has no other.
    """
    return values.to(widest(values.device))


def widened(values: Tensor) -> Tensor:
    """The values in float32, if they are in half precision.

    >>> [widened(torch.ones(1, dtype=dtype)).dtype for dtype in (torch.float16, torch.float64)]
    [torch.float32, torch.float64]
    """
    return values.float() if values.dtype in HALVES else values


def one_number(what: str, measured: object) -> float:
    """The number that a metric has measured. Raises TypeError, naming the metric, for anything
    else.
    """
    try:
        return float(measured)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        got = type(measured).__name__
        if isinstance(measured, Tensor):
            got = f"a tensor of shape {tuple(measured.shape)}"
        raise TypeError(
            f"{what} must measure one number, got {got}. Return a 0-d tensor, such as a mean."
        ) from error


def check_classes(what: str, pred: Tensor, axis: int = -1) -> None:
    """Raise ValueError for scores of one class only, of which the highest says nothing."""
    if pred.dim() and pred.shape[axis] == 1:
        raise ValueError(
            f"{what}: expected scores of two classes or more along axis {axis}, got one class, "
            f"shape {tuple(pred.shape)}. A score of yes or no is measured by accuracy_multi(); "
            f"for other metrics make two of it: torch.cat([-pred, pred], {axis})."
        )


def flat(what: str, pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both as vectors. Raises ValueError if they have different numbers of elements."""
    if pred.numel() != target.numel():
        raise ValueError(
            f"{what}: pred and target must have equally many elements, got shapes "
            f"{tuple(pred.shape)} and "
            f"{tuple(target.shape)}. Is this the right metric, or axis, for this model?"
        )
    return pred.reshape(-1), target.reshape(-1)
