"""Measures of a batch, and means over batches of uneven size."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import optree
import torch
from torch import Tensor

from loop.state import State

Metric: TypeAlias = Callable[..., Tensor]
"""(pred, *targets) -> 0-d tensor, a mean over the batch."""

Sums: TypeAlias = Mapping[str, tuple[Tensor, int]]
"""Column -> (sum over samples, number of samples); what makes means mergeable."""


def accuracy(pred: Tensor, target: Tensor) -> Tensor:
    """The share of samples whose highest score is the target's: pred (N, ..., C) or scores, target (N, ...) of classes.

    >>> accuracy(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
    tensor(0.5000)
    """
    return (pred.argmax(dim=-1) == target).float().mean()


def error_rate(pred: Tensor, target: Tensor) -> Tensor:
    """The share of samples whose highest score is not the target's.

    >>> error_rate(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
    tensor(0.5000)
    """
    return 1 - accuracy(pred, target)


def metric_name(metric: Metric) -> str:
    """The column of a metric: the function's name, or the class's."""
    return str(getattr(metric, "__name__", type(metric).__name__))


def add_batch(sums: Sums, state: State, metrics: Sequence[Metric], loss_name: str) -> Sums:
    """The sums with the batch in `state` counted in: its loss and metrics, weighted by its number of samples."""
    count = sample_count(state)
    values: dict[str, Tensor] = {}
    if state.loss is not None:
        values[loss_name] = state.loss
    if state.yb:
        with torch.no_grad():
            values |= {metric_name(metric): metric(state.pred, *state.yb) for metric in metrics}
    added = dict(sums)
    for name, value in values.items():
        total, weight = added.get(name, (0.0, 0))
        added[name] = (total + torch.as_tensor(value).detach() * count, weight + count)
    return added


def means(sums: Sums) -> dict[str, float]:
    """The mean of every column; this is where a device is waited for.

    >>> means({"accuracy": (torch.tensor(3.0), 4)})
    {'accuracy': 0.75}
    """
    return {name: float(total) / weight for name, (total, weight) in sums.items()}


def sample_count(state: State) -> int:
    """How many samples the batch has: the length of its first tensor, targets first."""
    batch: Any = (state.yb, state.xb)
    for leaf in optree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return len(leaf)
    return 1
