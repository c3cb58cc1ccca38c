"""Metrics from how often a class is given and wanted: F1, precision and recall, Dice, Jaccard."""

from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from loop.metrics.confusion import decided, divided, how_often
from loop.metrics.tally import Accumulator, Tally, flat, wide

Average = Literal["binary", "macro", "micro", "weighted"]
AVERAGES: tuple[str, ...] = ("binary", "macro", "micro", "weighted")


class _Counts(NamedTuple):
    """How often each class was rightly given, given, and wanted."""

    right: Tensor
    given: Tensor
    wanted: Tensor


@dataclass(frozen=True)
class Overlap(Tally):
    """Metrics of (tp, fp, fn): how often a class was rightly given, wrongly given, and missed.

    Scores of classes: pred has C of them along `axis`, target a class for each; the class with the
    highest score is given. Targets equal to `ignore_index` do not count. `average` is "binary" (C
    is 2; of class 1), "macro" (the mean over the classes that were given or are in the targets),
    "micro" (of the counts of all classes together) or "weighted" (the mean, weighted by how often a
    class is in the targets).

    With a `threshold`, pred and target have one shape and every entry is a question of its own,
    answered yes if pred (its sigmoid, unless `sigmoid` is False) is above the threshold. "binary"
    then is over all entries; the others have a label for each place along `axis`, all of which
    count.

    0/0 is 0. Raises ValueError for an unknown average, and for predictions that it does not go
    with.
    """

    average: Average = "binary"
    _: KW_ONLY
    axis: int = -1
    threshold: float | None = None
    sigmoid: bool = True
    ignore_index: int | None = None

    def __post_init__(self) -> None:
        if self.average not in AVERAGES:
            raise ValueError(
                f"{type(self).__name__}: average must be one of {AVERAGES}, got {self.average!r}."
            )

    @property
    def name(self) -> str:
        """The column: f1, f1_macro, and so on."""
        return super().name if self.average == "binary" else f"{super().name}_{self.average}"

    @abstractmethod
    def ratio(self, tp: Tensor, fp: Tensor, fn: Tensor) -> tuple[Tensor, Tensor]:
        """The metric of one class as a fraction: above the line, below it."""

    def count(self, pred: Tensor, target: Tensor) -> Accumulator:
        """tp, fp and fn of every class, as int64."""
        by_class = self.threshold is None
        found = self._by_class(pred, target) if by_class else self._by_entry(pred, target)
        return {
            "tp": found.right,
            "fp": found.given - found.right,
            "fn": found.wanted - found.right,
        }

    def read(self, counted: Accumulator) -> Tensor:
        """The average."""
        tp, fp, fn = (wide(counted[name]) for name in ("tp", "fp", "fn"))
        if self.average == "micro":
            return divided(*self.ratio(tp.sum(), fp.sum(), fn.sum()))
        each = divided(*self.ratio(tp, fp, fn))
        if self.average == "binary":
            # Class 1 of two; with a threshold, the only one.
            return each[-1]
        if self.average == "weighted":
            return divided((each * (tp + fn)).sum(), (tp + fn).sum())
        counts = torch.ones_like(tp)
        if self.threshold is None:  # classes that nobody has, and nobody predicts, are left out
            counts = (tp + fp + fn > 0).to(tp)
        return divided((each * counts).sum(), counts.sum())

    def _by_class(self, pred: Tensor, target: Tensor) -> _Counts:
        classes = pred.shape[self.axis]
        if self.average == "binary" and classes != 2:
            raise ValueError(
                f"{type(self).__name__}: average='binary' needs scores of 2 classes along axis "
                f"{self.axis}, got shape "
                f"{tuple(pred.shape)}. Choose another average or axis, or give a threshold."
            )
        given, wanted, kept = decided(
            type(self).__name__, pred, target, self.axis, self.ignore_index
        )
        right = kept & (given == wanted)
        return _Counts(
            right=how_often(wanted, right, classes),
            given=how_often(given, kept, classes),
            wanted=how_often(wanted, kept, classes),
        )

    def _by_entry(self, pred: Tensor, target: Tensor) -> _Counts:
        if self.average != "binary" and pred.dim() < 2:
            raise ValueError(
                f"{type(self).__name__}: average={self.average!r} with a threshold needs samples "
                f"along one axis, "
                f"labels along another, got shape {tuple(pred.shape)}. Use average='binary' for "
                f"one label."
            )
        labels = 1 if self.average == "binary" else pred.shape[self.axis]
        if labels > 1:
            pred, target = pred.movedim(self.axis, -1), target.movedim(self.axis, -1)
        pred, target = flat(type(self).__name__, pred, target)
        if self.ignore_index is None:
            kept = torch.ones_like(target, dtype=torch.bool)
        else:
            kept = target != self.ignore_index
        scores = pred.sigmoid() if self.sigmoid else pred
        given = scores.gt(self.threshold or 0.0) & kept
        wanted = target.bool() & kept
        return _Counts(
            right=(given & wanted).reshape(-1, labels).sum(dim=0),
            given=given.reshape(-1, labels).sum(dim=0),
            wanted=wanted.reshape(-1, labels).sum(dim=0),
        )


@dataclass(frozen=True)
class F1(Overlap):
    """2 tp / (2 tp + fp + fn): the harmonic mean of precision and recall. The arguments are
    explained at Overlap.

    >>> F1()(torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 0, 1]))
    0.5
    """

    def ratio(self, tp: Tensor, fp: Tensor, fn: Tensor) -> tuple[Tensor, Tensor]:
        """F1 of one class."""
        return 2 * tp, 2 * tp + fp + fn


@dataclass(frozen=True)
class Precision(Overlap):
    """tp / (tp + fp): the share of those given the class that have it. The arguments are explained
    at Overlap.

    >>> Precision("macro")(torch.eye(3), torch.tensor([0, 1, 1]))
    0.6666666666666666
    """

    def ratio(self, tp: Tensor, fp: Tensor, fn: Tensor) -> tuple[Tensor, Tensor]:
        """Precision of one class."""
        return tp, tp + fp


@dataclass(frozen=True)
class Recall(Overlap):
    """tp / (tp + fn): the share of those having the class that were given it. The arguments are
    explained at Overlap.

    >>> Recall(threshold=0.5)(torch.tensor([3.0, -2.0, 1.0]), torch.tensor([1, 1, 0]))
    0.5
    """

    def ratio(self, tp: Tensor, fp: Tensor, fn: Tensor) -> tuple[Tensor, Tensor]:
        """Recall of one class."""
        return tp, tp + fn


@dataclass(frozen=True)
class Dice(F1):
    """F1 of the pixels of images: pred (N, C, H, W), target (N, H, W). The arguments are explained
    at Overlap.

    >>> Dice("macro")(torch.eye(2)[None], torch.tensor([[0, 1]]))
    1.0
    """

    _: KW_ONLY
    axis: int = 1


@dataclass(frozen=True)
class JaccardCoeff(Overlap):
    """tp / (tp + fp + fn), intersection over union, of the pixels of images. The arguments are
    explained at Overlap.

    >>> JaccardCoeff()(torch.tensor([[[0.0, 0.0], [1.0, 1.0]]]), torch.tensor([[0, 1]]))
    0.5
    """

    _: KW_ONLY
    axis: int = 1

    def ratio(self, tp: Tensor, fp: Tensor, fn: Tensor) -> tuple[Tensor, Tensor]:
        """Intersection over union of one class."""
        return tp, tp + fp + fn
