"""Metrics of other libraries, as Mergeables."""

from collections.abc import Callable, Set
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import optree
import torch
from torch import Tensor

from functional_sgd.tree import Tree
from loop.callback import snake_case
from loop.metrics.tally import Accumulator, Mergeable, Metric


@dataclass(frozen=True)
class TorchMetric:
    """A metric of torchmetrics: `TorchMetric(lambda: torchmetrics.AUROC(task="binary"))`.

    Those are objects that change. Here a copy of the fresh one is given the state so far, updated,
    and its state taken out again, for every batch; so nothing is shared between runs, and the
    accumulator is plain data. `make` returns a fresh metric whose compute() is one number; it is
    called once. `name` is the column, the class's name unless given. Merging is what the metric's
    merge_state does, which some metrics refuse.

    Raises TypeError if what `make` returns lacks update, compute or metric_state, or is a
    collection.
    """

    make: Callable[[], Any]
    name: str = ""

    def __post_init__(self) -> None:
        made = self.make()
        needed = ("update", "compute", "metric_state")
        missing = [part for part in needed if not hasattr(made, part)]
        if missing or isinstance(made, type):
            raise TypeError(
                f"TorchMetric: make must return a metric of torchmetrics, got {made!r}, without "
                f"{', '.join(missing)}. "
                f"Pass a function that makes one: TorchMetric(lambda: MeanSquaredError())."
            )
        if hasattr(made, "items"):
            raise TypeError(
                f"TorchMetric: expected one metric, got a collection of {', '.join(made)}. Put the "
                f"collection itself into metrics, where it becomes all of them."
            )
        object.__setattr__(self, "_fresh", made)
        if not self.name:
            object.__setattr__(self, "name", snake_case(type(made).__name__))

    def start(self) -> Accumulator:
        """The accumulator of no data."""
        return {}

    def add(self, accumulator: Accumulator, pred: Tensor, *targets: Tensor) -> Accumulator:
        """The accumulator with one more batch."""
        if not isinstance(pred, Tensor):
            raise TypeError(
                f"TorchMetric: {self.name} expected a tensor as the prediction, got "
                f"{type(pred).__name__}. Take it out of the model's output in a callback with "
                f"after_pred, or in a metric of your own: a function (pred, *targets)."
            )
        metric = self._restored(accumulator, pred.device)
        with torch.no_grad():
            metric.update(pred, *targets)
        state = _copied(metric.metric_state, _pieces(accumulator))
        return {"state": state, "updates": accumulator.get("updates", 0) + 1}

    def merge(self, left: Accumulator, right: Accumulator) -> Accumulator:
        """The accumulator of the data of both."""
        if not left or not right:
            return dict(left or right)
        metric = self._restored(left)
        metric.merge_state(_copied(right["state"]))
        return {
            "state": _copied(metric.metric_state),
            "updates": left["updates"] + right["updates"],
        }

    def value(self, accumulator: Accumulator) -> float:
        """The metric of the data counted; nan for none."""
        return float(self._restored(accumulator).compute()) if accumulator else float("nan")

    def __call__(self, pred: Tensor, *targets: Tensor) -> float:
        """The value for one batch alone."""
        return self.value(self.add(self.start(), pred, *targets))

    def _restored(self, accumulator: Accumulator, device: torch.device | None = None) -> Any:
        """A metric that has counted this, on its device; its tensors are copies, for metrics add to
        theirs in place.

        To its lists they only append, so pieces in these are not copied: that would take
        O(batches**2) in all.
        """
        metric = deepcopy(self.__dict__["_fresh"])
        state = accumulator.get("state", {})
        if device is None:
            leaves: list[object] = optree.tree_leaves(state)
            device = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), None)
        if device is not None and hasattr(metric, "to"):
            metric = metric.to(device)
        for name, value in _copied(state, _pieces(accumulator)).items():
            setattr(metric, name, value)
        if accumulator:
            # Or compute() warns that there was no update.
            metric._update_count = accumulator["updates"]
        return metric


def as_mergeables(metric: Any) -> list[Metric]:
    """A metric, in a list; one of torchmetrics, which would be changed, as a TorchMetric of a copy,
    and a collection of these as all of them, under the names that they have in it.

    Raises TypeError for other objects with update and compute.
    """
    if isinstance(metric, (type, Mergeable)) or not hasattr(metric, "update"):
        return [metric]
    if not hasattr(metric, "compute"):
        return [metric]
    is_collection = hasattr(metric, "items")
    if hasattr(metric, "metric_state") and not is_collection:
        return [TorchMetric(partial(_fresh_copy, metric))]
    if not is_collection:
        raise TypeError(
            f"Learner: {type(metric).__name__} in metrics has update and compute, but is neither a "
            f"metric of torchmetrics nor a collection of them. Wrap it in an object with start, "
            f"add, merge and value (see loop.metrics.Mergeable)."
        )
    found: list[Metric] = []
    for name, one in deepcopy(metric).items():
        # Those of a collection may share one state, and then count only together.
        alone = deepcopy(one)
        found.append(TorchMetric(partial(_fresh_copy, alone), snake_case(name)))
    return found


def _fresh_copy(metric: Any) -> Any:
    made = deepcopy(metric)
    # The object in the learner may have counted something already.
    made.reset()
    return made


def _copied(state: Tree, shared: Set[int] = frozenset()) -> Tree:
    """The state with tensors of its own, but for those of these ids, and no graph."""
    if isinstance(state, Tensor):
        return state if id(state) in shared else state.detach().clone()
    if isinstance(state, dict):
        return {name: _copied(value, shared) for name, value in state.items()}
    if isinstance(state, list):
        return [_copied(value, shared) for value in state]
    return state


def _pieces(accumulator: Accumulator) -> Set[int]:
    """The ids of what is in the lists of an accumulator."""
    found: set[int] = set()
    for value in accumulator.get("state", {}).values():
        if isinstance(value, list):
            # By id, since == of tensors is elementwise. The accumulator keeps the pieces, and so
            # the ids.
            found.update(map(id, value))
    return found
