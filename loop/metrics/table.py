"""The means and tallies of a phase: every column of the batches seen so far, and their values at
the end.
"""

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any, TypeAlias

import optree
import torch
from torch import Tensor

from functional_sgd.tree import Tree
from loop.data.samples import one_each
from loop.metrics.tally import Accumulator, Mergeable, Metric, metric_name, one_number, wide
from loop.remembered import tensors_in
from loop.state import State

Sums: TypeAlias = Mapping[str, tuple[Tensor, int] | Accumulator]
"""Column -> (sum over samples, number of samples), or a Mergeable's accumulator."""


def metrics_by_name(metrics: Sequence[Metric]) -> dict[str, Metric]:
    """Column -> metric. Raises TypeError for a class where an object is needed, and ValueError for
    a name used twice.

    >>> from loop.metrics import accuracy, RMSE
    >>> list(metrics_by_name([accuracy, RMSE()]))
    ['accuracy', 'rmse']
    """
    named: dict[str, Metric] = {}
    for metric in metrics:
        if isinstance(metric, type):
            raise TypeError(
                f"metrics must be functions or objects, got the class {metric.__name__}. Call it."
            )
        name = metric_name(metric)
        if name in named:
            raise ValueError(
                f"two metrics are called {name!r}: {named[name]!r} and {metric!r}. Give one "
                f"another name: a function's "
                f"is its __name__, an object's its `name`."
            )
        named[name] = metric
    return named


def add_batch(sums: Sums, state: State, metrics: Sequence[Metric], loss_name: str) -> Sums:
    """The sums with the batch in `state` counted in: its loss and metrics.

    What is a function is weighted by the number of samples; a Mergeable counts in its own way.
    """
    count = sample_count(state)
    added: dict[str, Any] = dict(sums)
    if state.loss is not None:
        added[loss_name] = _weighted(added.get(loss_name), state.loss, count)
    # A model that computes its own loss may have no targets.
    if not state.yb:
        return added
    with torch.no_grad():
        for name, metric in metrics_by_name(metrics).items():
            if isinstance(metric, Mergeable):
                before = added[name] if name in added else metric.start()
                added[name] = metric.add(before, state.pred, *state.yb)
            else:
                measured = metric(state.pred, *state.yb)
                try:
                    added[name] = _weighted(added.get(name), measured, count)
                except (TypeError, ValueError, RuntimeError):
                    one_number(f"metric {name!r}", measured)  # or else says what it is
                    raise
    return added


def means(sums: Sums, metrics: Sequence[Metric] = ()) -> dict[str, float]:
    """The value of every column, nan where no sample was counted; this is where a device is waited
    for.

    `metrics` are those that were counted; only they can read their accumulators, so others are left
    out.

    >>> means({"accuracy": (torch.tensor(3.0), 4)})
    {'accuracy': 0.75}
    """
    named = metrics_by_name(metrics)
    values: dict[str, float] = {}
    for name, counted in sums.items():
        metric = named.get(name)
        if isinstance(counted, tuple):
            total, weight = counted
            values[name] = one_number(f"metric {name!r}", total) / weight if weight else nan
        elif isinstance(metric, Mergeable):
            values[name] = metric.value(counted)
    return values


def sample_count(state: State) -> int:
    """How many samples the batch has: the length of its first tensor, targets first; but where
    targets are a list of dicts, such as the boxes of each image, of that list.

    Tensors in dataclasses and in mappings such as a BatchEncoding are asked last. A batch in which
    there is none is one sample.
    """
    if state.yb and isinstance(state.yb[0], list) and _is_of_samples(state.yb[0], state.xb):
        return len(state.yb[0])
    batch: Tree = (state.yb, state.xb)
    for leaf in optree.tree_leaves(batch):
        if _has_axis(leaf):
            return len(leaf)
    for inner in tensors_in(batch):
        if inner.dim():
            return len(inner)
    return 1


def _is_of_samples(target: list[Tree], inputs: Tree) -> bool:
    """Whether a list of targets has an entry for each sample: an input has as many."""
    if not one_each(target, len(target)):
        return False
    parts = optree.tree_leaves(inputs, is_leaf=lambda part: isinstance(part, list))
    for part in parts:
        if (isinstance(part, list) or _has_axis(part)) and len(part) == len(target):
            return True
    return False


def _has_axis(part: object) -> bool:
    return isinstance(part, Tensor) and part.dim() > 0


def _weighted(before: tuple[Any, int] | None, value: object, count: int) -> tuple[Any, int]:
    """The sum and the number of samples, with the mean over `count` more counted in."""
    total, weight = before or (0.0, 0)
    if not count:  # its mean is nan
        return total, weight
    return total + wide(torch.as_tensor(value).detach()) * count, weight + count
