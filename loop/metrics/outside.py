"""Metrics of other libraries, as Mergeables."""

from collections.abc import Callable, Mapping, Set
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import optree
import torch
from torch import Tensor

from functional_sgd.tree import Tree
from loop.callback import snake_case
from loop.metrics.parts import Marks, check_parts, outside_of_states, parts, plain_changes
from loop.metrics.tally import Accumulator, Mergeable, Metric, one_number


@dataclass(frozen=True)
class TorchMetric:
    """A metric of torchmetrics: `TorchMetric(lambda: torchmetrics.AUROC(task="binary"))`.

    Those are objects that change. Here a copy of the fresh one is given the state so far, updated,
    and its state taken out again, for every batch; so nothing is shared between runs, and the
    accumulator is plain data. `make` returns a fresh metric whose compute() is one number; it is
    called once. `name` is the column, the class's name unless given. Merging is what the metric's
    merge_state does, which some metrics refuse.

    A metric made of others (`1 - accuracy`, a wrapper) has the states of all of them; plain numbers
    that it counts in besides go along too.

    Raises TypeError if what `make` returns lacks update, compute or metric_state, is a collection,
    or keeps metrics in a list; and at the first batch if update changed tensors or lists that are
    no state, which would be forgotten.
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
        check_parts(made)
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
        # Once a phase: what a metric changes is alike for all batches.
        before = {} if accumulator else outside_of_states(metric)
        with torch.no_grad():
            metric.update(pred, *targets)
        if before:
            self._check_changes(metric, before)
        return self._taken(metric, accumulator.get("updates", 0) + 1, _pieces(accumulator))

    def merge(self, left: Accumulator, right: Accumulator) -> Accumulator:
        """The accumulator of the data of both."""
        if not left or not right:
            return dict(left or right)
        metric = self._restored(left)
        mine, others = _records(left), _records(right)
        for path, part in parts(metric).items():
            one, other = mine[path], others[path]
            if one.get("kept") != other.get("kept"):
                raise RuntimeError(
                    f"TorchMetric: {self.name} was to be merged, expected the same numbers beside "
                    f"its states, got {one.get('kept')} and {other.get('kept')}. Count what adds "
                    f"up in states (add_state), or measure in one process: its order matters."
                )
            # What is made of others may have no state of its own, and then refuses to merge it.
            if other["state"]:
                part.merge_state(_copied(other["state"]))
            if path:
                part._update_count = one["updates"] + other["updates"]
        return self._taken(metric, left["updates"] + right["updates"])

    def value(self, accumulator: Accumulator) -> float:
        """The metric of the data counted; nan for none."""
        if not accumulator:
            return float("nan")
        return one_number(f"TorchMetric: {self.name}", self._restored(accumulator).compute())

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
        if device is None:
            counted: Tree = accumulator
            leaves: list[object] = optree.tree_leaves(counted)
            device = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), None)
        if device is not None and hasattr(metric, "to"):
            metric = metric.to(device)
        inside, shared = parts(metric), _pieces(accumulator)
        for path, record in _records(accumulator).items():
            for name, value in _copied(record["state"], shared).items():
                setattr(inside[path], name, value)
            for name, value in record.get("kept", {}).items():
                setattr(inside[path], name, value)
            # Or compute() warns that there was no update.
            inside[path]._update_count = record["updates"]
        return metric

    def _taken(self, metric: Any, updates: int, shared: Set[int] = frozenset()) -> Accumulator:
        """What the metric has counted, as an accumulator."""
        fresh = parts(self.__dict__["_fresh"])
        records: dict[str, Any] = {}
        for path, part in parts(metric).items():
            counted = getattr(part, "_update_count", updates)
            records[path] = {"state": _copied(part.metric_state, shared), "updates": counted}
            kept = plain_changes(part, fresh[path])
            if kept:
                records[path]["kept"] = kept
        own = {**records.pop(""), "updates": updates}
        return {**own, "inner": records} if records else own

    def _check_changes(self, metric: Any, before: Mapping[str, Marks]) -> None:
        """Raise TypeError if update changed what is no state."""
        changed: list[str] = []
        for path, marks in outside_of_states(metric).items():
            for name, (value, count) in before[path].items():
                now = marks.get(name, (None, 0))
                if now[0] is not value or now[1] != count:
                    changed.append(f"{path}.{name}".lstrip("."))
        if changed:
            raise TypeError(
                f"TorchMetric: {self.name} expected update to change states only, got changes of "
                f"{', '.join(changed)}, which would be forgotten from batch to batch. Register "
                f"them with add_state in __init__; where the first batch decides about sizes, "
                f"give these when you make the metric."
            )


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
    for record in _records(accumulator).values():
        for value in record["state"].values():
            if isinstance(value, list):
                # By id, since == of tensors is elementwise. The accumulator keeps the pieces, and
                # so the ids.
                found.update(map(id, value))
    return found


def _records(accumulator: Accumulator) -> Mapping[str, Any]:
    """What an accumulator has of every part, by its path."""
    return {"": accumulator, **accumulator.get("inner", {})} if accumulator else {}
