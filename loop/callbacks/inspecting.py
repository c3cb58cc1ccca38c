"""See what a run does, in order to find mistakes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from loop.callback import Callback, Order
from loop.run.shapes import shapes
from loop.state import State


@dataclass(frozen=True)
class PrintShapes(Callback):
    """Print dtypes and shapes of xb, yb, pred and loss for the first batch of each phase.

    `report` gets the line, in place of `print`. Errors in the model or the loss come with a note of
    the shapes anyway.
    """

    report: Callable[[str], object] = print
    order: ClassVar[int] = Order.FRAME
    reports: ClassVar[bool] = True

    def after_loss(self, state: State) -> None:
        """Print a line."""
        if state.iter != 0:
            return
        phase = "train" if state.training else "validate"
        line = f"{phase}: {shapes(state)}"
        if state.loss is not None:
            dtype = str(state.loss.dtype).removeprefix("torch.")
            line += f", loss: {dtype}[]"
        self.report(line)
