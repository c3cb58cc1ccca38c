"""Large batches in small pieces: one step for the gradients of several batches."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

import optree
import torch
from torch import Tensor

from functional_sgd.hyper import Scalar
from functional_sgd.tree import Tree
from loop.callback import Callback, Order
from loop.callbacks.precision import MixedPrecision
from loop.disk.encoding import storable
from loop.metrics import sample_count
from loop.metrics.tally import widened
from loop.remembered import tensors_in
from loop.run.signals import CancelStep
from loop.run.stages import Work, learner_of
from loop.state import State

Grads: TypeAlias = Mapping[str, Tensor | None]

Weight: TypeAlias = Callable[[State], Scalar]
"""How much a batch counts: a number, or a 0-d tensor, which nobody waits for."""

SHARED = "ranks"
"""Where a batch that is cut over several processes has its weight and its length, as a whole."""


@dataclass(frozen=True)
class CountTargets:
    """A weight that is equal to another of the same ignore_index."""

    ignore_index: int

    def __call__(self, state: State) -> Tensor:
        """How many targets count."""
        batch: Tree = state.yb
        targets = [leaf for leaf in optree.tree_leaves(batch) if isinstance(leaf, Tensor)]
        # optree does not look into dataclasses.
        targets = targets or list(tensors_in(batch))
        if not targets:
            raise ValueError(
                'GradientAccumulation: the batch has no targets to count. Use weight="samples".'
            )
        return (targets[0] != self.ignore_index).sum()


def count_targets(ignore_index: int = -100) -> Weight:
    """A weight: how many targets of the batch are not `ignore_index`, as a 0-d tensor; for losses
    that average them.

    >>> count_targets()(State({}, {}, {}, {}, yb=(torch.tensor([[1, 2], [3, -100]]),)))
    tensor(3)
    """
    return CountTargets(ignore_index)


WEIGHTS: Mapping[str, Weight] = {"samples": sample_count, "targets": count_targets()}
"""The weights that have a name."""


def weight_called(who: str, weight: str | Weight) -> Weight:
    """The weight of this name, or the function itself. Raises ValueError for another name."""
    if callable(weight):
        return weight
    if weight not in WEIGHTS:
        raise ValueError(
            f"{who}: weight must be {' or '.join(map(repr, WEIGHTS))}, or a function of the state, "
            f"got {weight!r}."
        )
    return WEIGHTS[weight]


@storable
@dataclass(frozen=True, eq=False)
class Window:
    """What GradientAccumulation remembers: the batches since the last step."""

    sum: Grads = field(default_factory=dict)  # of weight * gradient
    weight: Scalar = 0
    batches: int = 0
    samples: int = 0
    value: Tensor | None = None  # of weight * loss, if the optimizer reads it


@dataclass
class Held:
    """The loss of a batch, while that of its window stands in its place."""

    loss: Tensor | None = None


@dataclass(frozen=True)
class GradientAccumulation(Callback):
    """Take one step for every `batches` batches, or as soon as at least `samples` samples have been
    seen.

    The step is that of the big batch: its gradient is the mean sum(weight * grad) / sum(weight),
    where weight must be what the loss divides by. `weight` is "samples" (the batch's length: losses
    that are means over samples), "targets" (targets that are not -100: `cross_entropy` over tokens,
    which leaves out padding; `count_targets(0)` for another ignore_index), or a function state ->
    number or 0-d tensor, 0 or more. In a `parallel` learner both have the same weight. A batch of
    weight 0 counts nothing, whatever its gradient.
    Half-precision gradients are summed, and handed on, as float32. An optimizer that reads `value`
    gets the mean loss of the window, which is state.loss from before_step to after_step.

    Until the window is full the sum is in the state and the step is cancelled, so that callbacks
    which come later (MixedPrecision, GradientClip) see full gradients only. What is left at the end
    of the epoch gets a step of its own, at the phase's last batch. Where no batch is known to be
    the last (a loader without a length), or the phase ends early (CancelTrain, CancelEpoch,
    CancelFit), this step happens in after_train, after_epoch or after_fit: without before_step and
    after_step, so callbacks that handle these do not see it; but MixedPrecision checks it. Batches
    that are cancelled before their gradient do not count. Nothing of a window goes into another
    epoch or run.

    Every batch still has its row of loss and hypers in the history, and schedules advance with
    every batch. Layers such as BatchNorm see the small batches.

    Raises ValueError unless exactly one of `batches` and `samples` is given, 1 or more; and, when
    the run starts, for an optimizer that reads `value_fn`, the loss as a function of the params.

    >>> from functional_sgd import sgd
    >>> from loop import Batches, DataLoaders, Learner, fit
    >>> x = torch.linspace(-1, 1, 8)[:, None]
    >>> zeros = {"weight": torch.zeros(1, 1), "bias": torch.zeros(1)}
    >>> def trained(batch_size, callbacks):
    ...     data, loss = DataLoaders(Batches((x, 3 * x + 1), batch_size)), torch.nn.MSELoss()
    ...     learner = Learner(torch.nn.Linear(1, 1), data, loss, sgd(lr=0.1), callbacks=callbacks)
    ...     return fit(learner, learner.init().replace(params=zeros), epochs=2).params["bias"]
    >>> trained(8, []), trained(2, [GradientAccumulation(batches=4)])
    (tensor([0.3600]), tensor([0.3600]))
    """

    batches: int | None = None
    samples: int | None = None
    weight: str | Weight = "samples"
    order: ClassVar[int] = Order.ACCUMULATE

    def __post_init__(self) -> None:
        if (self.batches is None) == (self.samples is None):
            raise ValueError(
                f"GradientAccumulation: give either batches or samples, got "
                f"batches={self.batches}, "
                f"samples={self.samples}."
            )
        for name, value in (("batches", self.batches), ("samples", self.samples)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(
                    f"GradientAccumulation: {name} must be a whole number, 1 or more, got "
                    f"{value!r}."
                )
        weight_called("GradientAccumulation", self.weight)

    @contextmanager
    def around_step(self, state: State) -> Iterator[Held]:
        """A place for the loss of the batch."""
        del state
        yield Held()

    def before_fit(self, state: State) -> State | None:
        """Check the optimizer; forget the window of a run that was stopped and is not resumed."""
        opt = learner_of(state).opt
        if "value_fn" in opt.names:
            raise ValueError(
                f"GradientAccumulation: {opt!r} reads 'value_fn', the loss as a function of the "
                f"params, which would be that of the last small batch. Leave GradientAccumulation "
                f"out, or use an optimizer that takes the gradient alone."
            )
        return state.forget(self.name) if self.name in state.memory else None

    def before_step(self, state: State) -> State | None:
        """Add the batch; let the step happen if the window is full."""
        grads = state.grads
        assert grads is not None
        # On several ranks the gradient is already that of the whole batch, so its weight and length
        # are too. All ranks then fill a window at the same batch.
        whole = state.memory.get(SHARED)
        if whole is None:
            weight, samples = self._weight(state), sample_count(state)
        else:
            weight, samples = whole["weight"], whole["samples"]
        loss = state.loss if "value" in learner_of(state).opt.names else None
        window = add_batch(state.memory.get(self.name), grads, weight, samples, loss)
        if not self._full(window) and not _last(state):
            raise CancelStep(state.remember(self.name, window))
        alone = window.batches == 1  # then its own gradient and loss, to the last bit
        if loss is not None:
            state.resources[self.name].loss = loss
            value = _unless_zero(weight, loss) if alone else mean_value(window)
            state = state.replace(loss=value)
        if alone:
            return state.replace(grads=zero_without_weight(grads, weight))
        # Forgotten before the step, so a step that a later callback cancels is not tried again.
        return state.forget(self.name).replace(grads=mean_gradient(window))

    def after_step(self, state: State) -> State | None:
        """The loss of the batch again."""
        loss = state.resources[self.name].loss
        return None if loss is None else state.replace(loss=loss)

    def after_train(self, state: State) -> State | None:
        """Take the step for what is left."""
        return self._flush(state)

    def after_epoch(self, state: State) -> State | None:
        """Take the step for what a cancelled epoch has left."""
        return self._flush(state)

    def after_fit(self, state: State) -> State | None:
        """Take the step for what a cancelled run has left."""
        # Schedulers come later in the order, so the hypers are still those of this run.
        return self._flush(state)

    def _full(self, window: Window) -> bool:
        if self.batches is not None:
            return window.batches >= self.batches
        assert self.samples is not None
        return window.samples >= self.samples

    def _weight(self, state: State) -> Scalar:
        weight = weight_called("GradientAccumulation", self.weight)(state)
        if isinstance(weight, Tensor) and weight.dim() == 0:
            return weight.detach()
        if isinstance(weight, (int, float)) and weight >= 0:
            return weight
        raise ValueError(
            f"GradientAccumulation: weight must give a number, 0 or more, or a 0-d tensor, got "
            f"{weight!r}."
        )

    def _flush(self, state: State) -> State | None:
        window = state.memory.get(self.name)
        if window is None:
            return None
        state = state.forget(self.name).replace(grads=mean_gradient(window))
        # No before_step follows, where MixedPrecision would check the gradient.
        for guard in state.resources.values():
            if isinstance(guard, MixedPrecision):
                state, finite = guard.checked(state)
                if not finite:
                    return state.replace(grads=None)
        # The machine's stage picks the fused optimizer and passes the state's hypers. It overwrites
        # nothing, since here the committed state is still one to go on from.
        stepped = Work().update(state.replace(donated=False, loss=mean_value(window)))
        return stepped.replace(donated=state.donated, grads=None, loss=state.loss)


def add_batch(
    window: Window | None, grads: Grads, weight: Scalar, samples: int, loss: Tensor | None = None
) -> Window:
    """The window with one more batch; None is the empty window.

    >>> add_batch(None, {"w": torch.tensor([2.0])}, 3, samples=3)
    Window(sum={'w': tensor([6.])}, weight=3, batches=1, samples=3, value=None)
    """
    parts = {name: _weighted(grad, weight) for name, grad in grads.items()}
    value = _weighted(loss, weight)
    if window is None:
        return Window(parts, weight, 1, samples, value)
    total = {name: _plus(window.sum.get(name), part) for name, part in parts.items()}
    batches, value = window.batches + 1, _plus(window.value, value)
    return Window(total, window.weight + weight, batches, window.samples + samples, value)


def mean_gradient(window: Window) -> dict[str, Tensor | None]:
    """The gradient of a window; zero if its weight is.

    >>> mean_gradient(Window({"w": torch.tensor([6.0]), "unused": None}, weight=4))
    {'w': tensor([1.5000]), 'unused': None}
    """
    return {name: _mean(part, window.weight) for name, part in window.sum.items()}


def mean_value(window: Window) -> Tensor | None:
    """The loss of a window, if it was kept; zero if its weight is.

    >>> mean_value(Window(weight=4, value=torch.tensor(6.0)))
    tensor(1.5000)
    """
    return _mean(window.value, window.weight)


def zero_without_weight(grads: Grads, weight: Scalar) -> dict[str, Tensor | None]:
    """The gradients as they are; zero if the weight is.

    >>> zero_without_weight({"w": torch.tensor([torch.nan]), "unused": None}, 0)
    {'w': tensor([0.]), 'unused': None}
    """
    return {name: _unless_zero(weight, grad) for name, grad in grads.items()}


def _weighted(grad: Tensor | None, weight: Scalar) -> Tensor | None:
    if grad is None:
        return None
    # In bfloat16, 256 + 1 is 256.
    grad = widened(grad)
    if isinstance(weight, Tensor):
        weight = _like(weight, grad)
    return _unless_zero(weight, weight * grad)


def _unless_zero(weight: Scalar, part: Tensor | None) -> Tensor | None:
    """A part of a sum; zero if the weight is, even where the part is NaN."""
    if part is None:
        return None
    if isinstance(weight, Tensor):
        return torch.where(_like(weight, part) == 0, 0.0, part)
    return part if weight else torch.zeros_like(part)


def _mean(part: Tensor | None, total: Scalar) -> Tensor | None:
    if part is None:
        return None
    if isinstance(total, Tensor):
        # Do not branch on a tensor: reading it would wait for the device.
        return part / _like(torch.where(total == 0, 1, total), part)
    return part / (total or 1)


def _like(weight: Tensor, grad: Tensor) -> Tensor:
    """A weight that leaves dtype and device of a gradient, even of a 0-d one, as they are."""
    return weight.to(grad.device, grad.dtype)


def _plus(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    # A parameter that a batch does not use counts as a gradient of zero.
    if one is None:
        return other
    if other is None:
        return one
    return one + other


def _last(state: State) -> bool:
    return state.n_iter is not None and state.iter + 1 >= state.n_iter
