"""What batches count by: the same in everything that weighs them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from loop.callback import Callback
from loop.callbacks.accumulation import GradientAccumulation, Weight, weight_called


@dataclass(frozen=True)
class OneWeight(Callback):
    """Looks at the callbacks of every run, also those given to `fit`, and takes no part in it."""

    weight: str | Weight
    name: ClassVar[str] = "one_weight"

    def among(self, callbacks: Sequence[object], compile: bool) -> list[object]:
        """The others. Raises ValueError if one weighs batches in another way."""
        del compile
        check_weights(self.weight, callbacks)
        return [one for one in callbacks if one is not self]


def check_weights(weight: str | Weight, callbacks: Sequence[object]) -> None:
    """Raise ValueError for a GradientAccumulation with another weight.

    It is handed gradients and weights of whole batches, so its own would not be asked.
    """
    expected = weight_called("parallel", weight)
    for one in callbacks:
        if not isinstance(one, GradientAccumulation):
            continue
        if weight_called("GradientAccumulation", one.weight) != expected:
            raise ValueError(
                f"parallel: batches count by weight={weight!r}, and by weight={one.weight!r} in "
                f"GradientAccumulation; expected the same in both, what the loss divides by. Pass "
                f"that to both: parallel(learner, weight=...), GradientAccumulation(weight=...)."
            )
