"""End a run early, or reset what a model carries along."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from functional_sgd import apply
from loop.callback import Callback
from loop.callbacks.recorder import Recorder
from loop.signals import CancelFit
from loop.stages import learner_of
from loop.state import State


@dataclass(frozen=True)
class TerminateOnNaN(Callback):
    """End the run before a loss that is not finite reaches the weights, or the history.

    The parameters are then those of the last good step. Reads the loss of every batch, so a device is waited for.
    """

    run_before: ClassVar[tuple[type, ...]] = (Recorder,)

    def after_loss(self, state: State) -> State | None:
        """Check a training loss."""
        if state.training and state.loss is not None and not torch.isfinite(state.loss):
            raise CancelFit(state)
        return None


@dataclass(frozen=True)
class SingleBatch(Callback):
    """End the run after one training batch: to see whether everything fits together."""

    order: ClassVar[int] = 1

    def after_batch(self, state: State) -> State | None:
        """Enough."""
        if state.training:
            raise CancelFit(state)
        return None


@dataclass(frozen=True)
class ModelResetter(Callback):
    """Call the model's `reset()` before each training and validation phase and after the run (recurrent models).

    The reset happens on the state's tensors, not on the model's own: buffers that it writes are in the next state.
    Raises TypeError when the run starts if the model has no reset().
    """

    def before_fit(self, state: State) -> State | None:
        """Check the model."""
        model = learner_of(state).model
        if not callable(getattr(model, "reset", None)):
            raise TypeError(f"ModelResetter: {type(model).__name__} has no reset(). Leave this callback out.")
        return None

    def before_train(self, state: State) -> State:
        """Start the epoch afresh."""
        return _reset(state)

    def before_validate(self, state: State) -> State:
        """Start the validation afresh."""
        return _reset(state)

    def after_fit(self, state: State) -> State:
        """Leave nothing behind."""
        return _reset(state)


class _Reset(nn.Module):
    """A module whose forward is another's reset()."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = True

    def forward(self) -> None:
        """Reset the model."""
        self.model.reset()  # type: ignore[operator]


def _reset(state: State) -> State:
    params = {f"model.{name}": value for name, value in state.params.items()}
    buffers = {f"model.{name}": value for name, value in state.buffers.items()}
    _, after = apply(_Reset(learner_of(state).model), params, buffers)
    return state.replace(buffers={name.removeprefix("model."): value for name, value in after.items()})
