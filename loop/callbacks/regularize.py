"""Penalties on what a model computes, beside the loss."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from functional_sgd.tree import Tree
from loop.callback import Callback, Order
from loop.metrics.tally import widened
from loop.state import State


@dataclass
class Held:
    """What belongs to a batch between its forward and its backward pass."""

    penalty: Tensor | None = None
    loss: Tensor | None = None  # that of the output alone


@dataclass(frozen=True)
class RNNRegularizer(Callback):
    """For recurrent models: keep activations small (AR), and alike from one step in time to the
    next (TAR).

    The model returns (output, raw, dropped): the prediction, and the activations of its last
    recurrent layer (N, time, features) before and after dropout; of a list, one for each layer, the
    last counts. From after_pred on `pred` is the output alone, in validation too: so list this
    callback in the Learner, for `predict` and `validate` to see it. In training alpha *
    mean(dropped**2) + beta * mean((raw[:, 1:] - raw[:, :-1])**2) is added to the loss before it is
    differentiated: its gradient counts. From after_backward on the loss is again that of the
    output, so losses that are recorded, shown or logged are without the penalties.

    Raises ValueError if alpha or beta is negative, and TypeError if the model returns something
    else. Source: Merity et al. 2017, "Revisiting activation regularization for language RNNs".
    """

    alpha: float = 2.0
    beta: float = 1.0
    order: ClassVar[int] = Order.PREPARE

    def __post_init__(self) -> None:
        if not (self.alpha >= 0 and self.beta >= 0):
            raise ValueError(
                f"RNNRegularizer: alpha and beta must be at least 0, got {self.alpha} and "
                f"{self.beta}."
            )

    @contextmanager
    def around_batch(self, state: State) -> Iterator[Held]:
        """A place for the penalty, which is let go when the batch ends, whatever way it ends."""
        # Not in state.memory, which outlives the batch: the penalty holds the batch's graph.
        held = Held()
        try:
            yield held
        finally:
            held.penalty = held.loss = None

    def after_pred(self, state: State) -> State:
        """Keep the output; measure the rest."""
        output, raw, dropped = rnn_outputs(state.pred)
        state = state.replace(pred=output)
        if not state.training:
            return state
        # Handlers run in the grad mode of fit's caller.
        with torch.enable_grad():
            penalty = self.alpha * activation_penalty(dropped) + self.beta * temporal_penalty(raw)
        state.resources[self.name].penalty = penalty
        return state

    def before_backward(self, state: State) -> State | None:
        """Add the penalty to the loss."""
        held: Held = state.resources[self.name]
        if held.penalty is None or state.loss is None:
            return None
        # Kept, because subtracting the penalty again would not give the same bits. Only once, since
        # sam comes here a second time, with the loss at other params.
        if held.loss is None:
            held.loss = state.loss.detach()
        with torch.enable_grad():
            return state.replace(loss=state.loss + held.penalty)

    def after_backward(self, state: State) -> State | None:
        """The loss without the penalty, which has done what it is for."""
        held: Held = state.resources[self.name]
        return None if held.loss is None else state.replace(loss=held.loss)


def activation_penalty(activations: Tensor) -> Tensor:
    """The mean square, at least in float32.

    >>> activation_penalty(torch.tensor([[[1.0], [3.0]]]))
    tensor(5.)
    """
    return widened(activations).square().mean()


def temporal_penalty(activations: Tensor) -> Tensor:
    """The mean square of the differences along time (axis 1), at least in float32; 0 for a single
    step.

    >>> temporal_penalty(torch.tensor([[[1.0], [3.0], [4.0]]]))
    tensor(2.5000)
    """
    activations = widened(activations)
    squares = (activations[:, 1:] - activations[:, :-1]).square()
    # mean() of an empty tensor is NaN.
    return squares.sum() / max(squares.numel(), 1)


class RNNOutputs(NamedTuple):
    """What a recurrent model returns; of its layers, the last."""

    output: Tree  # the prediction
    raw: Tensor  # activations before dropout (N, time, features)
    dropped: Tensor  # and after it


def rnn_outputs(pred: object) -> RNNOutputs:
    """(output, raw, dropped) of a model's output; of lists of layers, the last layer's."""
    if not isinstance(pred, (tuple, list)) or len(pred) != 3:
        found = f"{len(pred)} of them" if isinstance(pred, (tuple, list)) else type(pred).__name__
        raise TypeError(
            f"RNNRegularizer: the model must return (output, raw, dropped), got {found}."
        )
    return RNNOutputs(*map(_last_layer, pred))


def _last_layer(part: Tree) -> Tree:
    return part[-1] if isinstance(part, (tuple, list)) else part
