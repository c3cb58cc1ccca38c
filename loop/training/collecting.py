"""Callbacks that keep something of every batch of an evaluation."""

from dataclasses import dataclass
from typing import ClassVar

from loop.callback import Callback, Order
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
