"""What makes loss, gradients, buffers and tallies those of the batches of all ranks.

Every rank holds the same state, bit for bit, and it is the state of one process that reads whole
batches, but for the order of additions. So callbacks that look at losses, gradients, metrics or the
history decide alike on every rank, and the machine knows nothing of ranks.

Shares, not means: the loss of a rank is a mean over its own samples. Its derivative is scaled by
the rank's share of the batch, last before the backward pass, and gradients are added up. A mean of
gradients would be wrong as soon as the parts differ in size.
"""

import functools
import hashlib
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import optree
import torch
from torch import Tensor

from functional_sgd.outputs import map_output
from functional_sgd.sharded import any_distributed, distributed
from loop.callback import Order
from loop.callbacks.accumulation import SHARED, Weight
from loop.callbacks.checkpoint import Checkpoint
from loop.callbacks.precision import scaled_gradient
from loop.callbacks.recorder import RECORDER, recorded
from loop.metrics import metrics_by_name
from loop.ranks.checkpoint import SharedCheckpoint
from loop.ranks.cut import Cut, Cuts
from loop.ranks.group import Group
from loop.run.interrupt import Agreement
from loop.run.passes import length
from loop.run.stages import device_of, learner_of, to_device
from loop.state import State
from loop.training.fit import joined

# These are no subclasses of Callback: they are made for the occasion, so a checkpoint does not ask
# for them when the run is resumed on another number of ranks.


@dataclass(frozen=True)
class Ranks:
    """Adds up gradients, buffers and tallies, before anybody looks at them; and says what share of
    a batch this rank has.
    """

    group: Group
    weight: Weight | None = None  # of a batch, as the loss counts it; by default its length
    collecting: tuple[str, ...] = ()  # callbacks that remember something of every batch, in order
    counts_training: bool = False  # whether the Recorder measures the training phase too
    name: ClassVar[str] = "rank_sums"
    order: ClassVar[int] = -50
    traceable: ClassVar[tuple[str, ...]] = ("after_backward",)

    def among(self, callbacks: Sequence[Any]) -> list[Any]:
        """The callbacks of this rank: only the first one reports."""
        every = [getattr(one, "name", "") for one in callbacks if getattr(one, "collects", False)]
        counts = any(getattr(one, "train_metrics", False) for one in callbacks)
        knowing = _knowing(self, tuple(every), counts)
        here = [knowing if one is self else self._here(one) for one in callbacks]
        return [one for one in here if one is not None]

    def _here(self, callback: Any) -> Any:
        """What a callback is on this rank."""
        if isinstance(callback, Checkpoint):
            return SharedCheckpoint(callback, self.group)
        if self.group.rank == 0:
            return callback
        if hasattr(callback, "elsewhere"):
            return callback.elsewhere()
        return None if getattr(callback, "reports", False) else callback

    def around_fit(self, state: State) -> AbstractContextManager[None]:
        """Check that all ranks begin, or go on, with the same state and the same amount of data.

        Raises ValueError if they do not. Ranks at different places would take what the others mean
        for another number: their collectives differ.
        """
        data = learner_of(state).data
        if not isinstance(data, Cuts):
            raise ValueError(
                f"parallel: the learner has other data than parallel has cut: {data!r}. Call "
                f"parallel on the learner that has this data."
            )
        every = self.group.gathered(_digests(state, data))
        for what in every[0]:
            values = [one[what] for one in every]
            if any(value != values[0] for value in values):
                raise ValueError(
                    f"parallel: the ranks begin with another {what} each: {values}. Build model "
                    f"and data alike on all ranks: torch.manual_seed(0) before the model, one seed "
                    f"for learner.init, the same files, one folder for all to resume from."
                )
        return nullcontext()

    def before_batch(self, state: State) -> State | None:
        """Say what share of a training batch this rank has."""
        if not state.training:
            return None
        loader = learner_of(state).data.train
        assert isinstance(loader, Cut), "around_fit has checked it"
        samples = loader.length(state.position[1] - 1)
        if self.weight is None:
            weight: Any = samples
            share: Any = loader.length_of_part(samples) / samples if samples else 0.0
        else:
            own, device = self.weight(state), device_of(state)
            mine = torch.as_tensor(own, dtype=torch.float64, device=device)
            weight = self.group.sums([mine])[0]
            share = torch.where(weight == 0, 0.0, mine / weight)
        return state.remember(SHARED, {"weight": weight, "samples": samples, "share": share})

    def after_backward(self, state: State) -> State:
        """Gradients and buffers as those of the whole batch, in one all-reduce."""
        assert state.grads is not None
        # Of params in pieces, the derivative of the gather has summed them up already.
        own = {
            name: grad
            for name, grad in state.grads.items()
            if name not in state.frozen and not distributed(state.params[name])
        }
        return self._summed(state, own)

    def after_cancel_backward(self, state: State) -> State:
        """Buffers, where there are no gradients."""
        return self._summed(state, {})

    def after_cancel_batch(self, state: State) -> State | None:
        """Buffers, which the model may have changed before the batch was cancelled."""
        return self._summed(state, {}) if state.training else None

    def after_batch(self, state: State) -> State:
        """The next batch is another one."""
        return state.forget(SHARED)

    def before_validate(self, state: State) -> State:
        """Let nobody resume within a validation: until it is over, tallies are of this rank alone.

        A run cannot be resumed where it has another learner, and this one is a copy.
        """
        return state.replace(learner=replace(learner_of(state)))

    def before_train(self, state: State) -> State | None:
        """The same for the training phase, where a Recorder measures that too."""
        return self.before_validate(state) if self.counts_training else None

    def after_train(self, state: State) -> State:
        """The tallies of all ranks."""
        return self._merged(state)

    def after_validate(self, state: State) -> State:
        """The tallies of all ranks, and what is collected of every batch, such as predictions."""
        state = self._merged(state)
        for name in self.collecting:
            mine = to_device(state.memory.get(name, ()), torch.device("cpu"))
            batches = zip(*self.group.gathered(mine), strict=True)
            whole = (map_output(joined, *parts) for parts in batches)
            state = state.remember(name, to_device(tuple(whole), device_of(state)))
        return state

    def _summed(self, state: State, grads: Mapping[str, Tensor | None]) -> State:
        """The state with gradients that are sums over ranks, and buffers that are means.

        A gradient that is None on some ranks counts as zero there; None on all stays None.
        """
        params = state.params
        buffers = {name: b for name, b in state.buffers.items() if b.is_floating_point()}
        whole = state.memory.get(SHARED)
        share = 1 / self.group.size if whole is None else whole["share"]
        filled = [torch.zeros_like(params[n]) if g is None else g for n, g in grads.items()]
        there = [float(grad is not None) for grad in grads.values()]
        given = [*filled, *(_scaled(buffer, share) for buffer in buffers.values())]
        if grads:
            like = filled[0]
            given.append(torch.tensor(there, dtype=like.dtype, device=like.device))
        if not given:
            return state
        sums = self.group.sums(given)
        # A rank that has all gradients need not look, which would wait for the device.
        if not all(there):
            there = sums[-1].tolist()
        found = zip(grads, sums, there, strict=False)
        new = {name: total if some else None for name, total, some in found}
        means = dict(zip(buffers, sums[len(grads) :], strict=False))
        if state.grads is not None:
            state = state.replace(grads={**state.grads, **new})
        return state.replace(buffers={**state.buffers, **means}) if means else state

    def _merged(self, state: State) -> State:
        """What the Recorder has counted, over all ranks."""
        record = recorded(state)
        if not record.sums:
            return state
        named: Mapping[str, Any] = metrics_by_name(learner_of(state).metrics)
        every = self.group.gathered(to_device(dict(record.sums), torch.device("cpu")))
        sums = dict(to_device(every[0], device_of(state)))
        for counted in every[1:]:
            for name, value in to_device(counted, device_of(state)).items():
                if isinstance(value, tuple):
                    total, weight = sums[name]
                    sums[name] = (total + value[0], weight + value[1])
                else:
                    sums[name] = named[name].merge(sums[name], value)
        return state.remember(RECORDER, replace(record, sums=sums))


@functools.lru_cache(maxsize=32)
def _knowing(ranks: Ranks, collecting: tuple[str, ...], counts_training: bool) -> Ranks:
    """The same object in every run, or a compiled batch would be compiled again."""
    return replace(ranks, collecting=collecting, counts_training=counts_training)


@dataclass(frozen=True)
class GlobalLoss:
    """The loss of the whole batch, once nobody changes it any more; its derivative is still that of
    this rank's part. The same all-reduce tells all ranks of a signal that one of them has got.
    """

    group: Group
    name: ClassVar[str] = SHARED
    order: ClassVar[int] = Order.SHARE
    traceable: ClassVar[tuple[str, ...]] = ("after_loss",)

    @contextmanager
    def around_fit(self, state: State) -> Iterator["Flags"]:
        """The stop that all ranks agree on."""
        yield Flags()

    def after_loss(self, state: State) -> State | None:
        """The value of all ranks, in training; in validation, tallies add up. Signals in both."""
        flags: Flags | None = state.resources.get(self.name)
        if not state.training:
            if flags is not None:
                self._tell(flags, state)
            return None
        assert state.loss is not None
        local = state.loss.detach().double()
        own = _scaled(local, state.memory[SHARED]["share"])
        if flags is None or type(own) is not Tensor:  # without values: a graph is made of it
            value = self.group.sums([own])[0]
        else:
            flags.read()
            header = torch.cat([own.reshape(1), flags.raised(own.device)])
            header = self.group.sums([header])[0]
            value, flags.sent, flags.told = header[0], header[1:], True
        return state.replace(loss=with_value(state.loss, value.to(state.loss.dtype)))

    def after_batch(self, state: State) -> None:
        """Tell all ranks of signals, if that has not come with the loss: in a compiled batch."""
        flags: Flags | None = state.resources.get(self.name)
        if flags is not None and not flags.told:
            self._tell(flags, state)
        if flags is not None:
            flags.told = False

    def after_fit(self, state: State) -> None:
        """Whoever has got a signal in the last batch, all end by it."""
        flags: Flags = state.resources[self.name]
        self._tell(flags, state)
        flags.read()

    def _tell(self, flags: "Flags", state: State) -> None:
        """Read what was sent before, and send what is known now."""
        flags.read()
        flags.sent = self.group.sums([flags.raised(device_of(state))])[0]
        flags.told = True


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


@dataclass
class Flags(Agreement):
    """The signals that ranks tell each other of. What was sent is read a batch later, so that
    nobody waits for a device.
    """

    sent: Tensor | None = None
    told: bool = False  # whether this batch has sent them

    def raised(self, device: torch.device) -> Tensor:
        """A 1.0 at the place of the signal that this process has heard."""
        heard = [float(self.heard == number) for number in _SIGNALS]
        return torch.tensor(heard, dtype=torch.float64, device=device)

    def read(self) -> None:
        """End the run, if any rank has sent a signal."""
        sent, self.sent = self.sent, None
        if sent is not None and self.number is None:
            told = zip(_SIGNALS, sent.tolist(), strict=True)
            self.number = next((number for number, count in told if count), None)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


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


def _scaled(value: Tensor, share: Any) -> Tensor:
    """A rank's part of a mean over ranks; zero if it has no share, whatever its value is."""
    if isinstance(share, Tensor):
        return torch.where(share == 0, 0.0, value * share.to(value.dtype))
    return value * share if share else torch.zeros_like(value)


def _digests(state: State, data: Cuts) -> dict[str, Any]:
    """What must be equal on all ranks, in a few bytes."""
    digest = hashlib.sha256()
    trees: Any = (state.params, state.buffers, state.opt_state)
    tensors = optree.tree_leaves(trees)
    if not any_distributed(tensors):
        for tensor in tensors:
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    loaders = [loader for loader in (data.train, data.valid) if loader is not None]
    return {
        "place in the run": (
            *(state.done, state.train_iter, state.epochs_seen),
            *(state.n_epoch, state.n_step),
        ),
        "params, buffers or optimizer state (digest)": digest.hexdigest()[:16],
        "seed": state.seed,
        "number of batches": list(map(length, loaders)),
    }
