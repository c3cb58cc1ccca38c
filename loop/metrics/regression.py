"""Metrics of numbers, from moments that merge: RMSE, R2, explained variance, correlations; and
perplexity.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from loop.metrics.tally import Accumulator, Tally, collect, collected, columns, flat, wide, widened


def moments(*values: Tensor) -> Accumulator:
    """The moments of a table of k columns: count of rows, mean (k,), products (k, k) of deviations,
    summed over rows.

    In float64, and without the cancellation that sums of squares suffer from. Empty for a table
    without rows.

    >>> {name: value.tolist() for name, value in moments(torch.tensor([1.0, 3.0])).items()}
    {'count': 2.0, 'mean': [2.0], 'products': [[2.0]]}
    """
    table = torch.stack([wide(column).reshape(-1) for column in values], dim=1)
    if not len(table):
        return {}
    # First, so that a constant column has no deviations, not even of rounding.
    moved = table - table[0]
    gap = moved.mean(dim=0)
    centred = moved - gap
    return {
        "count": torch.full_like(gap[0], len(table)),
        "mean": table[0] + gap,
        "products": centred.T @ centred,
    }


def joined_moments(left: Accumulator, right: Accumulator) -> Accumulator:
    """The moments of both tables, one below the other. Source: Chan, Golub, LeVeque 1979.

    >>> both = joined_moments(moments(torch.tensor([1.0, 3.0])), moments(torch.tensor([5.0])))
    >>> both["mean"].item(), both["products"].item()
    (3.0, 8.0)
    """
    count = left["count"] + right["count"]
    gap, share = right["mean"] - left["mean"], right["count"] / count
    products = (
        left["products"] + right["products"] + torch.outer(gap, gap) * (left["count"] * share)
    )
    return {"count": count, "mean": left["mean"] + gap * share, "products": products}


@dataclass(frozen=True)
class RMSE(Tally):
    """The root of the mean of the squared differences, over all elements.

    >>> RMSE()(torch.tensor([1.0, 5.0]), torch.tensor([4.0, 2.0]))
    3.0
    """

    def count(self, pred: Tensor, target: Tensor) -> Accumulator:
        """The sum of squares, and of how many."""
        pred, target = flat("RMSE", wide(pred), wide(target))
        squares = (pred - target).square()
        return {"squares": squares.sum(), "count": torch.full_like(squares.sum(), len(squares))}

    def read(self, counted: Accumulator) -> Tensor:
        """The root."""
        mean: Tensor = counted["squares"] / counted["count"]
        return mean.sqrt()


class _OfMoments(Tally):
    """A metric of the moments of two columns."""

    def join(self, left: Accumulator, right: Accumulator) -> Accumulator:
        """Moments of both."""
        return joined_moments(left, right)


@dataclass(frozen=True)
class R2(_OfMoments):
    """The coefficient of determination, 1 - sum((target - pred)**2) / sum((target -
    mean(target))**2), at most 1.

    Over all elements. If all targets are equal it is 1 where pred is right and 0 elsewhere, as in
    scikit-learn; nan for fewer than two elements.

    >>> R2()(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 2.0, 3.0]))
    0.5
    """

    def count(self, pred: Tensor, target: Tensor) -> Accumulator:
        """The moments of (residual, target)."""
        return _residual_moments("R2", pred, target)

    def read(self, counted: Accumulator) -> Tensor:
        """One minus the share that is left."""
        # The sum of squares around 0, not around the mean: a constant error counts.
        squares = counted["products"][0, 0] + counted["count"] * counted["mean"][0].square()
        return _explained(counted, squares)


@dataclass(frozen=True)
class ExplainedVariance(_OfMoments):
    """1 - variance(target - pred) / variance(target), at most 1: R2, but a constant error costs
    nothing.

    Over all elements; without variance as R2.

    >>> ExplainedVariance()(torch.tensor([2.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 3.0]))
    1.0
    """

    def count(self, pred: Tensor, target: Tensor) -> Accumulator:
        """The moments of (residual, target)."""
        return _residual_moments("ExplainedVariance", pred, target)

    def read(self, counted: Accumulator) -> Tensor:
        """One minus the share that is left."""
        return _explained(counted, counted["products"][0, 0])


@dataclass(frozen=True)
class Pearson(_OfMoments):
    """The linear correlation of pred and target over all elements, -1 to 1; nan if one of them is
    constant.

    >>> round(Pearson()(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0])), 6)
    0.5
    """

    def count(self, pred: Tensor, target: Tensor) -> Accumulator:
        """The moments of (pred, target)."""
        return moments(*flat("Pearson", pred, target))

    def read(self, counted: Accumulator) -> Tensor:
        """The correlation."""
        return _correlation(counted)


@dataclass(frozen=True)
class Spearman(Tally):
    """The correlation of the ranks of pred and target over all elements, -1 to 1; equal values
    share their mean rank.

    A rank is known only when all data is, so predictions and targets are kept until the end. nan if
    one of them is constant, or has a nan.

    >>> round(Spearman()(torch.tensor([1.0, 20.0, 300.0]), torch.tensor([1.0, 3.0, 2.0])), 6)
    0.5
    """

    def count(self, pred: Tensor, target: Tensor) -> Accumulator:
        """The batch itself."""
        return collect(*flat("Spearman", pred, target))

    def join(self, left: Accumulator, right: Accumulator) -> Accumulator:
        """Both batches."""
        return collected(left, right)

    def read(self, counted: Accumulator) -> Tensor:
        """The correlation of the ranks."""
        pred, target = columns(counted)
        if not len(pred):
            return torch.tensor(torch.nan)
        return _correlation(moments(_ranks(pred), _ranks(target)))


@dataclass(frozen=True)
class Perplexity(Tally):
    """exp of the mean cross entropy over all tokens: how many words the model hesitates between.

    pred has scores along `axis`, target a token for each; targets equal to `ignore_index` (padding)
    do not count.

    >>> round(Perplexity()(torch.zeros(1, 3, 7), torch.tensor([[1, 2, -100]])), 4)
    7.0
    """

    ignore_index: int = -100
    axis: int = -1

    def count(self, pred: Tensor, target: Tensor) -> Accumulator:
        """The cross entropy of all tokens, and how many they are."""
        scores = widened(pred.movedim(self.axis, -1))
        target = target.reshape(-1)
        losses = cross_entropy(
            scores.reshape(-1, scores.shape[-1]),
            target,
            ignore_index=self.ignore_index,
            reduction="none",
        )
        # cross_entropy gives 0 for ignored targets, so they add nothing.
        total = wide(losses).sum()
        return {"total": total, "tokens": (target != self.ignore_index).sum().to(total.dtype)}

    def read(self, counted: Accumulator) -> Tensor:
        """The perplexity."""
        mean: Tensor = counted["total"] / counted["tokens"]
        return mean.exp()


def _residual_moments(what: str, pred: Tensor, target: Tensor) -> Accumulator:
    pred, target = flat(what, wide(pred), wide(target))
    return moments(target - pred, target)


def _explained(counted: Accumulator, left: Tensor) -> Tensor:
    total = counted["products"][1, 1]
    share = torch.where(
        total == 0, (left != 0).to(total), left / torch.where(total == 0, 1.0, total)
    )
    return torch.where(counted["count"] < 2, torch.nan, 1 - share)


def _correlation(counted: Accumulator) -> Tensor:
    products = counted["products"]
    correlation: Tensor = products[0, 1] / (products[0, 0].sqrt() * products[1, 1].sqrt())
    # Rounding can take it a little beyond.
    return correlation.clamp(-1.0, 1.0)


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1; equal values share the mean of theirs, and a nan has none."""
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    # cumsum is the last rank in a group of equals; their mean is (count - 1) / 2 below it.
    ranks = (wide(counts.cumsum(0)) - (wide(counts) - 1) / 2)[place]
    return torch.where(values.isnan(), torch.nan, ranks)
