"""See what a run does, in order to find mistakes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from loop.callback import Callback, Order
from loop.run.shapes import shapes
from loop.state import State


@dataclass(frozen=True)
class PrintShapes(Callback):
    """Print dtypes and shapes of xb, yb, pred and loss for the first batch of each phase.

    `report` gets the line, in place of `print`. Errors in the model or the loss come with a note of
    the shapes anyway.
    """

    report: Callable[[str], Any] = print
    order: ClassVar[int] = Order.FRAME
    reports: ClassVar[bool] = True

    def after_loss(self, state: State) -> None:
        """Print a line."""
        if state.iter == 0:
            loss = (
                "" if state.loss is None else f", loss: {state.loss.dtype}[]".replace("torch.", "")
            )
            self.report(f"{'train' if state.training else 'validate'}: {shapes(state)}{loss}")
