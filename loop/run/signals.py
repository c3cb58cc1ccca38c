"""Signals: raise one in a callback to end a scope early; it carries the state that the run goes on
from.
"""

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from loop.state import State


class Cancel(Exception):
    """Ends the scope of its name. `raise CancelBatch(state)`; without a state, the run goes on from
    the event's own.
    """

    scope: ClassVar[str]

    def __init__(self, state: "State | None" = None) -> None:
        super().__init__()
        self.state = state


class CancelFit(Cancel):
    """End the run: after_cancel_fit and after_fit follow."""

    scope = "fit"


class CancelEpoch(Cancel):
    """Go on with the next epoch: after_cancel_epoch and after_epoch follow."""

    scope = "epoch"


class CancelTrain(Cancel):
    """Go on with validation: after_cancel_train and after_train follow."""

    scope = "train"


class CancelValidate(Cancel):
    """End the validation: after_cancel_validate and after_validate follow."""

    scope = "validate"


class CancelBatch(Cancel):
    """Go on with the next batch: after_cancel_batch and after_batch follow."""

    scope = "batch"


class CancelBackward(Cancel):
    """Go without gradients, and so without a step: after_cancel_backward and
    after_backward follow.
    """

    scope = "backward"


class CancelStep(Cancel):
    """Leave the parameters as they are: after_cancel_step and after_step follow."""

    scope = "step"


class SignalError(RuntimeError):
    """A signal was raised where no scope of its name is open, so nothing could catch it."""


SIGNALS: dict[str, type[Cancel]] = {signal.scope: signal for signal in Cancel.__subclasses__()}
"""Scope name -> its signal."""
