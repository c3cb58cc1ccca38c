"""What makes loss, gradients, buffers and tallies those of the batches of all ranks.

Every rank holds the same state, bit for bit, and it is the state of one process that reads whole
batches, but for the order of additions. So callbacks that look at losses, gradients, metrics or the
history decide alike on every rank, and the machine knows nothing of ranks.

Shares, not means: the loss of a rank is a mean over its own samples. Its derivative is scaled by
the rank's share of the batch, last before the backward pass, and gradients are added up. A mean of
gradients would be wrong as soon as the parts differ in size.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from functional_sgd.outputs import map_output
from functional_sgd.sharded import local, placed
from loop.callbacks.accumulation import SHARED, Weight
from loop.callbacks.checkpoint import Checkpoint
from loop.callbacks.recorder import RECORDER, Recorder, recorded
from loop.layout import in_place
from loop.metrics import metrics_by_name
from loop.ranks.alike import Watch, averages, check_begun_alike
from loop.ranks.checkpoint import SharedCheckpoint
from loop.ranks.cut import Cut, Cuts
from loop.ranks.group import Group
from loop.ranks.loss import (
    TOLD,
    Flags,
    GlobalLoss,
    LateRecorder,
    Share,
    is_awaited,
    part_of_mean,
    raised_in,
    sums_first,
)
from loop.run.stages import device_of, learner_of, to_device
from loop.state import State
from loop.training.collecting import joined

# These are no subclasses of Callback: they are made for the occasion, so a checkpoint does not ask
# for them when the run is resumed on another number of ranks.


@dataclass(frozen=True)
class Ranks:
    """Adds up gradients, buffers and tallies, before anybody looks at them; and says what share of
    a batch this rank has.
    """

    group: Group
    everyone: Group  # more processes, if params lie on others than the batches
    weight: Weight | None = None  # of a batch, as the loss counts it; by default its length
    collecting: tuple[str, ...] = ()  # callbacks that remember something of every batch, in order
    counts_training: bool = False  # whether the Recorder measures the training phase too
    late: bool = False  # whether the loss comes with the gradients
    recorder: Recorder | None = None  # who writes it down then, if that has not happened
    name: ClassVar[str] = "rank_sums"
    order: ClassVar[int] = -50
    traceable: ClassVar[tuple[str, ...]] = ("after_backward",)

    def among(self, callbacks: Sequence[object], compile: bool) -> list[object]:
        """The callbacks of this rank: only the first one reports."""
        collecting: list[str] = []
        counts = False
        for one in callbacks:
            if getattr(one, "collects", False):
                collecting.append(getattr(one, "name", ""))
            if getattr(one, "train_metrics", False):
                counts = True
        told: Recorder | None = None
        if compile:
            # The graph has done all its sums before after_loss, so its Recorder need not wait.
            late = sums_first(callbacks, self)
        else:
            late = not is_awaited(callbacks, self)
            if late:
                told = next(one for one in callbacks if isinstance(one, Recorder))
        knowing = _with(
            self, collecting=tuple(collecting), counts_training=counts, late=late, recorder=told
        )
        here: list[object] = []
        for one in callbacks:
            own = knowing if one is self else self._here(one, late, told)
            if own is not None:
                here.append(own)
        return here

    def _here(self, callback: object, late: bool, told: Recorder | None) -> object:
        """What a callback is on this rank; None if it is left out."""
        if isinstance(callback, GlobalLoss):
            return _with(callback, late=late)
        if told is not None and callback is told:
            settings = {field.name: getattr(told, field.name) for field in fields(told)}
            return LateRecorder(**settings)
        if isinstance(callback, Checkpoint):
            return SharedCheckpoint(callback, self.group, self.everyone)
        if self.everyone.rank == 0:
            return callback
        if hasattr(callback, "elsewhere"):
            return callback.elsewhere()
        return None if getattr(callback, "reports", False) else callback

    def around_fit(self, state: State) -> AbstractContextManager[Watch]:
        """Check that all ranks begin, or go on, with the same state and the same amount of data.
        What is lent watches over what forward passes change.

        Raises ValueError if they do not. Ranks at different places would take what the others mean
        for another number: their collectives differ.
        """
        # In a bracket, since a run that is resumed does not pass before_fit again.
        data = learner_of(state).data
        if not isinstance(data, Cuts):
            raise _other_data(data)
        check_begun_alike(self.group, self.everyone, state, data)
        return nullcontext(Watch.begun(self.group, state))

    def before_batch(self, state: State) -> State | None:
        """Say what share of a batch this rank has."""
        data = learner_of(state).data
        loader: object
        if state.training:
            self._watch(state).params = state.params
            # `position` is that of the next batch.
            loader, index = data.train, state.position[1] - 1
        else:
            loader, index = data.valid, state.iter
        if not isinstance(loader, Cut):
            raise _other_data(data)
        samples = loader.length(index)
        part = loader.length_of_part(samples) / samples if samples else None
        if self.weight is None:
            weight: int | Tensor = samples
            share: Share = part or 0.0
        else:
            own, device = self.weight(state), device_of(state)
            mine = torch.as_tensor(own, dtype=torch.float64, device=device)
            weight = self.group.sums([mine])[0]
            share = torch.where(weight == 0, 0.0, mine / weight)
        # Outside of `fit` nobody listens for signals. And the loss is summed over `group`, so a
        # signal can travel with it only if that is everyone.
        flags: Flags | None = state.resources.get(SHARED)
        raised = None
        if flags is not None and self.everyone == self.group:
            raised = flags.raised()
        # Buffers count by samples, whatever the loss does: a batch whose loss counts nothing has
        # been seen by the model all the same, and of means the shares must add up to 1.
        of_buffers = 1 / self.group.size if part is None else part
        said = {"weight": weight, "samples": samples, "share": share, "of_buffers": of_buffers}
        return state.remember(SHARED, {**said, "raised": raised})

    def after_backward(self, state: State) -> State | None:
        """Gradients and buffers as those of the whole batch, in one all-reduce; and its loss, if
        nobody has asked for that before.
        """
        if state.grads is None:  # after_cancel_backward has come before
            return None
        own: dict[str, Tensor | None] = {}
        for name, grad in state.grads.items():
            param = state.params[name]
            if name not in state.frozen and self.group.adds(param):
                own[name] = None if grad is None else placed(grad, param)
        loss = state.loss if self.late else None
        state = self._summed(state, own, loss)
        if self.recorder is None:
            return state
        return self.recorder.after_loss(state)

    def after_cancel_backward(self, state: State) -> State:
        """Buffers, where there are no gradients."""
        return self._summed(state, {})

    def after_cancel_batch(self, state: State) -> State | None:
        """Buffers, which the model may have changed before the batch was cancelled."""
        return self._summed(state, {}) if state.training else None

    def after_batch(self, state: State) -> State:
        """The next batch is another one."""
        if state.training:
            self._watch(state).params = None
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
        """The tallies of all ranks; and a look at what no batch has averaged."""
        self._watch(state).after_phase(state)
        return self._merged(state)

    def after_fit(self, state: State) -> None:
        """A last look."""
        self._watch(state).after_run(state)

    def after_validate(self, state: State) -> State:
        """The tallies of all ranks, and what is collected of every batch, such as predictions."""
        state = self._merged(state)
        for name in self.collecting:
            mine = to_device(state.memory.get(name, ()), torch.device("cpu"))
            batches = zip(*self.group.gathered(mine), strict=True)
            join = functools.partial(joined, "parallel")
            whole = tuple([map_output(join, *parts) for parts in batches])
            state = state.remember(name, to_device(whole, device_of(state)))
        return state

    def _summed(
        self, state: State, grads: Mapping[str, Tensor | None], loss: Tensor | None = None
    ) -> State:
        """The state with gradients that are sums over ranks, and buffers that are means; and with
        the loss of all, if that of this rank is given.

        A gradient that is None on some ranks counts as zero there; None on all stays None.
        """
        buffers = self._averaged(state)
        own = self._own(state, grads, buffers, loss)
        like = next(own.tensors(), None)
        if like is None:
            return state
        if type(like) is Tensor:  # a graph has been checked for what it changes
            self._watch(state).before_sums(state, buffers)
        there = [float(grad is not None) for grad in grads.values()]
        # In the dtype of the others, since every further dtype is a collective of its own.
        present = torch.tensor(there, dtype=like.dtype, device=like.device)
        raised = [] if loss is None else raised_in(state, like)
        sums = own._replace(present=[present], raised=raised).over(self.group)
        # A rank that has all gradients need not look, which would wait for the device. A graph
        # cannot look; but in it a gradient is None by the model, which all ranks have.
        if not all(there) and type(like) is Tensor:
            there = sums.present[0].tolist()
        changes: dict[str, object] = {}
        # What outlives the gradients is copied, since the sums are views of all of them.
        if loss is not None:
            changes["loss"] = sums.loss[0].to(loss.dtype, copy=True)
        if grads:
            new = dict(state.grads or {})
            for name, some, total in zip(grads, there, sums.grads, strict=True):
                new[name] = in_place(total, state.params[name]) if some else None
            changes["grads"] = new
        if buffers:
            means = dict(state.buffers)
            for name, mean in zip(buffers, sums.buffers, strict=True):
                before = buffers[name]
                means[name] = in_place(mean.to(before.dtype, copy=True), before)
            changes["buffers"] = means
        if raised:
            changes["memory"] = {**state.memory, TOLD: sums.raised[0].clone()}
        return state.replace(**changes)

    def _own(
        self,
        state: State,
        grads: Mapping[str, Tensor | None],
        buffers: Mapping[str, Tensor],
        loss: Tensor | None,
    ) -> "_Bucket":
        """What this rank adds to the sums."""
        whole = state.memory.get(SHARED)
        # A batch that was cancelled before before_batch came here has no share yet.
        of_buffers = 1 / self.group.size if whole is None else whole["of_buffers"]
        own = _Bucket([], [], [])
        if loss is not None:
            assert whole is not None, "whoever has a loss has come by before_batch"
            own.loss.append(part_of_mean(loss, whole["share"]))
        for name, grad in grads.items():
            if grad is None:
                own.grads.append(torch.zeros_like(local(state.params[name])))
            else:
                own.grads.append(local(grad))
        for buffer in buffers.values():
            own.buffers.append(part_of_mean(local(buffer), of_buffers))
        return own

    def _averaged(self, state: State) -> dict[str, Tensor]:
        """The buffers that become means over ranks."""
        params = self._watch(state).own
        averaged: dict[str, Tensor] = {}
        for name, value in state.buffers.items():
            # Counters, such as num_batches_tracked, are alike on all ranks (the watch looks after
            # that). So are frozen parameters, and a mean of equal numbers has other bits: shares
            # are rounded.
            if averages(value) and name not in params:
                averaged[name] = value
        return averaged

    def _watch(self, state: State) -> Watch:
        """What around_fit has lent."""
        watch: Watch = state.resources[self.name]
        return watch

    def _merged(self, state: State) -> State:
        """What the Recorder has counted, over all ranks."""
        record = recorded(state)
        if not record.sums:
            return state
        # A metric that is not Mergeable has sums that are tuples.
        named: Mapping[str, Any] = metrics_by_name(learner_of(state).metrics)
        every = self.group.gathered(to_device(dict(record.sums), torch.device("cpu")))
        sums = dict(to_device(every[0], device_of(state)))
        # In one order on all ranks, so that they have the same bits.
        for counted in every[1:]:
            for name, value in to_device(counted, device_of(state)).items():
                if isinstance(value, tuple):
                    total, weight = sums[name]
                    sums[name] = (total + value[0], weight + value[1])
                else:
                    sums[name] = named[name].merge(sums[name], value)
        return state.remember(RECORDER, replace(record, sums=sums))


def _other_data(data: object) -> ValueError:
    return ValueError(
        f"parallel: the learner has other data than parallel has cut: {data!r}. Call parallel on "
        f"the learner that has this data; a callback that lends other data replaces that of "
        f"state.learner.data: replace(state.learner.data, train=loader)."
    )


class _Bucket(NamedTuple):
    """What a rank has of a batch, and what all have of it."""

    loss: list[Tensor]
    grads: list[Tensor]
    buffers: list[Tensor]
    present: Sequence[Tensor] = ()  # which of the gradients are not None
    raised: Sequence[Tensor] = ()  # signals

    def tensors(self) -> Iterator[Tensor]:
        """All of them, in order."""
        return itertools.chain.from_iterable(self)

    def over(self, group: Group) -> "_Bucket":
        """The sums over ranks, in one all-reduce for each dtype."""
        sums = iter(group.sums([*self.tensors()]))
        parts = [list(itertools.islice(sums, len(part))) for part in self]
        return _Bucket(*parts)


@functools.lru_cache(maxsize=64)
def _with(callback: Ranks | GlobalLoss, **changes: Any) -> Ranks | GlobalLoss:
    """The same object in every run, or a compiled batch would be compiled again."""
    return replace(callback, **changes)
