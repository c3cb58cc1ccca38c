"""End a run early, or reset what a model carries along."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from functional_sgd import apply
from loop.callback import Callback, Order
from loop.callbacks.parts.ending import ended
from loop.callbacks.recorder import Recorder
from loop.run.signals import CancelFit, CancelTrain, CancelValidate
from loop.run.stages import learner_of
from loop.state import State


@dataclass(frozen=True)
class TerminateOnNaN(Callback):
    """End the run before a loss that is not finite reaches the weights, or the history.

    The parameters are then those of the last good step. Where that was is in
    `state.memory["ended"]`, and Progress shows it. Reads the loss of every batch, so a device is
    waited for.
    """

    order: ClassVar[int] = Order.ACCUMULATE  # the loss is that of all ranks by then
    run_before: ClassVar[tuple[type, ...]] = (Recorder,)

    def after_loss(self, state: State) -> State | None:
        """Check a training loss."""
        if state.training and state.loss is not None and not torch.isfinite(state.loss):
            where = f"at batch {state.iter} of epoch {state.epoch}"
            why = f"the loss is {float(state.loss.detach())}"
            raise CancelFit(ended(state, f"{type(self).__name__} {where}: {why}"))
        return None


@dataclass(frozen=True)
class SingleBatch(Callback):
    """End the run after one training batch: to see whether everything fits together."""

    order: ClassVar[int] = Order.LAST

    def after_batch(self, state: State) -> State | None:
        """Enough."""
        if state.training:
            raise CancelFit(state)
        return None


@dataclass(frozen=True)
class ShortEpoch(Callback):
    """End each training phase after a share of its batches, and each validation phase too if
    `short_valid`.

    `pct` in (0, 1] is the share, rounded up to whole batches: at least one. With `batches`, so many
    batches instead, which needs no len() of the loader. Schedules still go by the whole epoch: they
    see its beginning, epoch by epoch. `validate` and `predict` take all data.

    Raises ValueError for numbers out of range, and when a phase starts whose loader has no length,
    without `batches`.
    """

    pct: float = 0.01
    short_valid: bool = True
    batches: int | None = None
    order: ClassVar[int] = Order.LAST

    def __post_init__(self) -> None:
        if not 0 < self.pct <= 1:
            raise ValueError(f"ShortEpoch: pct must be above 0 and at most 1, got {self.pct!r}.")
        if self.batches is not None and (not isinstance(self.batches, int) or self.batches < 1):
            raise ValueError(
                f"ShortEpoch: batches must be a whole number, 1 or more, got {self.batches!r}."
            )

    def before_train(self, state: State) -> None:
        """Check that the share can be told."""
        self._check(state, "train")

    def before_validate(self, state: State) -> None:
        """Check that the share can be told."""
        if self.short_valid:
            self._check(state, "valid")

    def after_batch(self, state: State) -> State | None:
        """Enough?"""
        if state.n_epoch == 0:  # an evaluation by itself
            return None
        done = state.iter + 1
        if self.batches is not None:
            enough = done >= self.batches
        else:
            enough = not state.n_iter or done / state.n_iter >= self.pct
        if not enough:
            return None
        if state.training:
            raise CancelTrain(state)
        if self.short_valid:
            raise CancelValidate(state)
        return None

    def _check(self, state: State, data: str) -> None:
        if self.batches is None and state.n_iter is None and state.n_epoch:
            raise ValueError(
                f"ShortEpoch: data.{data} has no len(), so it has no share. Pass batches=10, or so."
            )


@dataclass(frozen=True)
class ModelResetter(Callback):
    """Call the model's `reset()` before each training and validation phase and after the run
    (recurrent models).

    The reset happens on the state's tensors, not on the model's own: buffers that it writes are in
    the next state. Raises TypeError when the run starts if the model has no reset().
    """

    def before_fit(self, state: State) -> State | None:
        """Check the model."""
        model = learner_of(state).model
        if not callable(getattr(model, "reset", None)):
            raise TypeError(
                f"ModelResetter: {type(model).__name__} has no reset(). Leave this callback out."
            )
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
    # `apply` puts the state's tensors in place only while it calls a forward, hence _Reset.
    _, after = apply(_Reset(learner_of(state).model), params, buffers)
    return state.replace(
        buffers={name.removeprefix("model."): value for name, value in after.items()}
    )
