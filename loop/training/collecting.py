"""Callbacks that keep something of every batch of an evaluation."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from loop.callback import Callback, Order
from loop.metrics.tally import in_a_row
from loop.state import State


@dataclass(frozen=True)
class Collector(Callback):
    """Remember something of every batch of a validation, or raise an error: what is left out would
    shift all samples that come after it.
    """

    collects: ClassVar[bool] = True
    who: ClassVar[str] = ""  # on whose behalf an error is raised

    def after_cancel_batch(self, state: State) -> None:
        """Raise ValueError if this batch is missing."""
        if self._collected(state) <= state.iter:
            raise ValueError(self._missing(f"cancelled batch {state.iter}"))

    def after_cancel_validate(self, state: State) -> None:
        """Raise ValueError unless every batch was there already."""
        if self._collected(state) != state.n_iter:
            raise ValueError(self._missing(f"ended the validation after batch {state.iter}"))

    def _collected(self, state: State) -> int:
        # A tuple and not a Log, since that is what `parallel` joins over the ranks.
        return len(state.memory.get(self.name, ()))

    def _missing(self, done: str) -> str:
        return (
            f"{self.who}: expected something of every batch, but a callback of the learner has "
            f"{done}, whose samples would be missing. Leave that callback out: "
            f"dataclasses.replace(learner, callbacks=[...])."
        )


@dataclass(frozen=True)
class CollectPredictions(Collector):
    """Remember every prediction of a validation, as the other callbacks leave it."""

    order: ClassVar[int] = Order.LAST
    who: ClassVar[str] = "predict"

    def after_pred(self, state: State) -> State:
        """Keep one batch's."""
        return state.remember(self.name, (*state.memory.get(self.name, ()), state.pred))


def joined(who: str, *parts: Any) -> Any:
    """The same part of all batches: numbers (0-d tensors) stacked, other tensors one behind the
    other. Raises ValueError, on behalf of `who`, for tensors that differ in more than their length.
    """
    first = parts[0]
    if isinstance(first, Tensor):
        if not first.dim():
            return torch.stack(parts)
        cure = f"Call {who} for one batch at a time, data=[batch], or pad all to one length."
        return in_a_row(who, parts, cure)
    return None if all(part is None for part in parts) else parts
