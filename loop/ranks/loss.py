"""The loss of a batch that is cut over ranks, and what ranks tell each other with it.

A rank knows the loss of its own part. That of the whole batch comes in an all-reduce of its own,
or, if nobody looks at it before, in that of the gradients: one wait less in every batch.
"""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from loop.callback import Order, in_order
from loop.callbacks.accumulation import SHARED
from loop.callbacks.precision import MixedPrecision, scaled_gradient
from loop.callbacks.recorder import RECORDER, Recorder
from loop.callbacks.timing import Profiler, Timer
from loop.ranks.group import Group
from loop.run.interrupt import Agreement
from loop.run.stages import device_of
from loop.state import State

Share: TypeAlias = float | Tensor
"""How much of the whole batch a rank has; a 0-d tensor, in float64, where that depends on the
batch.
"""


@dataclass(frozen=True)
class GlobalLoss:
    """The loss of the whole batch, once nobody changes it any more; its derivative is still that of
    this rank's part. The same all-reduce tells all ranks of a signal that one of them has got.
    """

    group: Group
    everyone: Group  # more processes, if params lie on others than the batches
    late: bool = False  # whether both come with the gradients
    name: ClassVar[str] = SHARED
    order: ClassVar[int] = Order.SHARE
    traceable: ClassVar[tuple[str, ...]] = ("after_loss",)

    @contextmanager
    def around_fit(self, state: State) -> Iterator["Flags"]:
        """The stop that all ranks agree on."""
        yield Flags()

    def after_loss(self, state: State) -> State | None:
        """The value of all ranks."""
        if state.training and self.late:
            return None
        if state.loss is None or state.loss.dim():
            return None  # of a validation without targets, or of each sample
        part = part_of_mean(state.loss, state.memory[SHARED]["share"])
        value, *told = self.group.sums([part, *raised_in(state, part)])
        state = state.replace(loss=with_value(state.loss, value.to(state.loss.dtype)))
        return state.remember(TOLD, told[0].clone()) if told else state

    def after_batch(self, state: State) -> State | None:
        """Tell everyone of signals, if that has not come with the loss."""
        flags: Flags | None = state.resources.get(self.name)
        if TOLD not in state.memory:
            if flags is not None:
                self._tell(flags, state)
            return None
        if flags is not None:
            flags.send(state.memory[TOLD])
        return state.forget(TOLD)

    def after_fit(self, state: State) -> None:
        """Whoever has got a signal in the last batch, all end by it."""
        flags: Flags = state.resources[self.name]
        self._tell(flags, state)
        flags.read()

    def _tell(self, flags: "Flags", state: State) -> None:
        """Send what is known now."""
        raised = torch.tensor(flags.raised(), dtype=torch.float64, device=device_of(state))
        flags.send(self.everyone.sums([raised])[0])


@dataclass(frozen=True)
class LocalShare:
    """Scale the derivative of the loss by this rank's share of the batch.

    Last before the backward pass: so penalties that callbacks have added on every rank count once
    in the sum.
    """

    name: ClassVar[str] = "local_share"
    order: ClassVar[int] = 10_000
    traceable: ClassVar[tuple[str, ...]] = ("before_backward",)

    def before_backward(self, state: State) -> State:
        """The same loss, whose derivatives come out scaled."""
        assert state.loss is not None
        with torch.enable_grad():
            share = state.memory[SHARED]["share"]
            return state.replace(loss=scaled_gradient(state.loss, share))


class LateRecorder(Recorder):
    """A Recorder whom somebody else tells of training batches, when their loss is known."""

    name: ClassVar[str] = RECORDER

    def after_loss(self, state: State) -> State | None:  # type: ignore[override]
        """Count a validation batch in."""
        return None if state.training else super().after_loss(state)

    def __repr__(self) -> str:  # what it writes is the same, and a run may go on in one process
        return super().__repr__().replace(type(self).__name__, Recorder.__name__)


def sums_first(callbacks: Sequence[object], summing: object) -> bool:
    """Whether nobody handles after_backward before `summing`, so that a compiled batch goes on to
    it: then the loss that it shows is that of all ranks.
    """
    ordered = in_order(callbacks)
    for callback in ordered:
        if callback is summing:
            return True
        if callable(getattr(callback, "after_backward", None)):
            return False
    raise AssertionError("summing is one of the callbacks")


def is_awaited(callbacks: Sequence[object], summing: object) -> bool:
    """Whether somebody may look at the loss of a training batch before `summing`, one of the
    callbacks, has added up the gradients of all ranks.
    """
    ordered = in_order(callbacks)
    places = {id(callback): place for place, callback in enumerate(ordered)}
    sums = places[id(summing)]
    known = next(places[id(one)] for one in ordered if isinstance(one, GlobalLoss))
    for place, callback in enumerate(ordered):
        # By exact type, since a subclass may look at it.
        if callback is summing or type(callback) in _BLIND:
            continue
        events = [*_BETWEEN]
        if place > known:  # those before GlobalLoss see this rank's part in any case
            events.append("after_loss")
        if place < sums:  # those after `summing` see the loss of all
            events.append("after_backward")
        if any(callable(getattr(callback, event, None)) for event in events):
            return True
    return False


_BETWEEN = ("before_backward", "around_backward", "around_gradients", "after_cancel_backward")
"""Where the loss is there, and may be that of this rank's part."""

_BLIND = (GlobalLoss, LocalShare, Recorder, MixedPrecision, Timer, Profiler)
"""Who is there, and does not look at it; or, as the Recorder, can wait."""


@dataclass
class Flags(Agreement):
    """The signals that ranks tell each other of. What was sent is read when the next is sent, so
    that nobody waits for it.
    """

    sent: Tensor | None = None

    def raised(self) -> list[float]:
        """What to send: a 1.0 at the place of the signal that this process has heard."""
        return [float(self.heard == number) for number in _SIGNALS]

    def send(self, sums: Tensor) -> None:
        """Keep what came back of it. What came of the batch before is read: a device that is at
        work on this one has long had it.
        """
        self.read()
        self.sent = sums

    def read(self) -> None:
        """End the run, if any rank has sent a signal."""
        sent, self.sent = self.sent, None
        if sent is not None and self.number is None:
            for number, count in zip(_SIGNALS, sent.tolist(), strict=True):
                if count:
                    self.number = number
                    return


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


TOLD = "told"
"""Where a batch has how many ranks have got which signal, until it is over."""


def raised_in(state: State, like: Tensor) -> list[Tensor]:
    """The signals that this rank has got, to be sent with other numbers; nothing if they are sent
    alone.
    """
    raised = state.memory[SHARED]["raised"]
    if raised is None:
        return []
    if type(like) is not Tensor:  # in a graph, which is given those of before the batch
        return [torch.stack(raised).to(like.device, like.dtype)]
    flags: Flags = state.resources[SHARED]
    return [torch.tensor(flags.raised(), dtype=like.dtype, device=like.device)]


def part_of_mean(value: Tensor, share: Share) -> Tensor:
    """This rank's part of a mean over ranks, such as the loss of a batch, at least in float32."""
    wide = torch.promote_types(value.dtype, torch.float32)
    return scaled(value.detach().to(wide), share)


class _WithValue(torch.autograd.Function):
    """Another value; the derivative is that of the tensor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, value: Tensor) -> Tensor:
        """The value."""
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Unchanged."""
        return grad, None


def with_value(tensor: Tensor, value: Tensor) -> Tensor:
    """`value`, whose derivative is that of `tensor`.

    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> y = with_value(x * x, torch.tensor(7.0))
    >>> y.item(), torch.autograd.grad(y, x)
    (7.0, (tensor(6.),))
    """
    result: Tensor = _WithValue.apply(tensor, value)
    return result


def scaled(value: Tensor, share: Share) -> Tensor:
    """A rank's part of a mean over ranks; zero if it has no share, whatever its value is."""
    # The mean over an empty part is NaN, and 0 * NaN is NaN.
    if isinstance(share, Tensor):
        return torch.where(share == 0, 0.0, value * share.to(value.dtype))
    return value * share if share else torch.zeros_like(value)
