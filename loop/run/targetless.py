"""Validation batches without targets: measured if the loss can do without them, as in training."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Targetless:
    """What becomes of the validation batches of a run that have no targets.

    `wanted` is whether their loss is asked for at all: who predicts is content without.
    """

    def __init__(self) -> None:
        self.wanted = True
        self.known: tuple[object, bool] = (None, False)  # a loss, and whether it does without
        self.left_out: str | None = None  # the name of a loss that was not called

    def measured(self, loss: Callable[..., Tensor]) -> bool:
        """Whether a batch without targets has this loss."""
        if not self.wanted:
            return False
        if self.known[0] is not loss:
            self.known = (loss, takes_prediction_alone(loss))
        if not self.known[1]:
            self.left_out = getattr(loss, "__name__", type(loss).__name__)
        return self.known[1]

    def warn(self) -> None:
        """The phase is over: say, once, that batches were not measured."""
        name, self.left_out = self.left_out, None
        if name is None:
            return
        self.wanted = False
        warnings.warn(
            f"Learner: the validation data has batches without targets, and the loss {name} takes "
            f"some, so neither loss nor metrics of these were measured. Give batches (inputs, "
            f"targets); or, if the loss needs the prediction alone, say so: "
            f"Learner(..., targets=()).",
            stacklevel=2,
        )


def takes_prediction_alone(loss: Callable[..., Any]) -> bool:
    """Whether a loss can be called without targets, as its signature says; not if that leaves it
    open.

    >>> takes_prediction_alone(lambda output: output.loss), takes_prediction_alone(nn.MSELoss())
    (True, False)
    """
    # The __call__ of every module takes anything.
    function = loss.forward if isinstance(loss, nn.Module) else loss
    try:
        signature = inspect.signature(function)
        signature.bind(None)
    except (TypeError, ValueError):  # it needs more, or nobody knows what it takes
        return False
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    return inspect.Parameter.VAR_POSITIONAL not in kinds
