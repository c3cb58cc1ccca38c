"""Average the parameters over the steps, and evaluate with the average."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from loop.callback import Callback, Order
from loop.disk.encoding import storable
from loop.metrics.tally import widened
from loop.replaced import TRAINED, is_replaced, with_weights
from loop.state import State, Tensors


@storable
@dataclass(frozen=True, eq=False)
class Averaged:
    """What AverageParams remembers."""

    average: Tensors = field(default_factory=dict)
    buffers: Tensors = field(default_factory=dict)
    count: int = 0  # how many params are in the average
    steps: int = 0  # steps since the share `start` of the run
    cancelled: bool = False  # whether the step at hand does not count


@dataclass(frozen=True)
class AverageParams(Callback):
    """Keep an average of the parameters; validation uses it, and so do `validate` and `predict`
    after the run if this is among the learner's callbacks; else give them `at_average(state)`.

    With a decay in [0, 1) it is exponential: average = decay * average + (1 - decay) * params.
    Debiased, it begins at zero and is divided by 1 - decay**count, so that it is a weighted mean of
    the params it has seen; else it begins with the first params. `decay=None` is the plain mean
    (SWA). The average moves after every `every`-th step (`every=len(data.train)` is once an epoch),
    once the share `start` of the run's training is done; a run with `start` above 0 begins a new
    average, else an average goes on from run to run. A cancelled step does not count.

    Floating-point buffers (BatchNorm's statistics) are averaged too, unless `buffers=False`;
    `refresh_buffers` measures them again. The average is in float32 where params are in half
    precision.

    `at_average(state)` is the state with the average as its params. With `evaluate`, params and
    buffers are the average from before_batch to after_batch of validation batches; what was trained
    is put back on every way out. Of two such callbacks, validation uses the one with the higher
    order.

    `state.memory[name]` is an Averaged. Raises ValueError if decay or start is not in [0, 1), or
    every is below 1. Sources: Polyak and Juditsky 1992; Izmailov et al. 2018 (SWA); the numbers are
    those of torch.optim.swa_utils.
    """

    decay: float | None = 0.999
    debias: bool = True
    every: int = 1
    start: float = 0.0
    evaluate: bool = True
    buffers: bool = True
    order: ClassVar[int] = Order.AVERAGE

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 <= self.decay < 1:
            raise ValueError(
                f"AverageParams: decay must be in [0, 1), or None for a plain mean, got "
                f"{self.decay}."
            )
        if not 0 <= self.start < 1:
            raise ValueError(
                f"AverageParams: start must be a share of the run in [0, 1), got {self.start}."
            )
        if self.every < 1:
            raise ValueError(f"AverageParams: every must be at least 1 step, got {self.every}.")

    def before_fit(self, state: State) -> State:
        """Begin with nothing, or with what earlier runs have averaged."""
        # A state taken in the middle of a validation batch has the average as its params.
        return put_back(state).remember(self.name, self._memory(state))

    def before_step(self, state: State) -> State | None:
        """This step will count, unless it is cancelled."""
        # A signal of an outer scope in after_cancel_step skips after_step, which clears the mark.
        return self._change(state, cancelled=False) if self._memory(state).cancelled else None

    def after_cancel_step(self, state: State) -> State:
        """This step does not count."""
        # after_step also runs after a cancelled step, and must not count it.
        return self._change(state, cancelled=True)

    def after_step(self, state: State) -> State | None:
        """Let the average move."""
        memory = self._memory(state)
        if memory.cancelled:
            return self._change(state, cancelled=False)
        if state.pct_train < self.start:
            begun = memory.count or memory.steps
            return state.remember(self.name, Averaged()) if begun else None
        steps, count = memory.steps + 1, memory.count + 1
        if steps % self.every:
            return self._change(state, steps=steps)
        weight = newest_weight(count, self.decay, self.debias)
        # The first params become the average itself, and the next step may overwrite them.
        params = state.params if memory.average else state.kept(state.params)
        average = moved(memory.average, params, weight)
        buffers = moved(memory.buffers, _continuous(state.buffers), weight) if self.buffers else {}
        return self._change(state, average=average, buffers=buffers, count=count, steps=steps)

    def before_batch(self, state: State) -> State | None:
        """Validate on the average; and begin a new one, where training goes on from other
        params.
        """
        if is_replaced(state):
            return state.remember(self.name, Averaged()) if state.training else None
        memory = self._memory(state)
        if state.training or not self.evaluate or not memory.count:
            return None
        # With two averages, the first one has already put the trained tensors aside.
        kept = state.memory.get(TRAINED, {"params": state.params, "buffers": state.buffers})
        params, buffers = _averages(state, memory)
        return state.replace(params=params, buffers=buffers).remember(TRAINED, kept)

    def after_batch(self, state: State) -> State:
        """Put back what was trained."""
        return put_back(state)

    # A bracket closes on every way out but cannot change the state, so all events that may follow a
    # signal put the params back.
    def after_cancel_validate(self, state: State) -> State:
        """Put back what was trained: the signal has skipped after_batch."""
        return put_back(state)

    def after_cancel_epoch(self, state: State) -> State:
        """Put back what was trained: the signal has skipped after_batch."""
        return put_back(state)

    def after_cancel_fit(self, state: State) -> State:
        """Put back what was trained: the signal has skipped after_batch."""
        return put_back(state)

    def _memory(self, state: State) -> Averaged:
        memory: Averaged = state.memory.get(self.name, Averaged())
        return memory

    def _change(self, state: State, **changes: Any) -> State:
        return state.remember(self.name, replace(self._memory(state), **changes))


def at_average(state: State, name: str = "average_params") -> State:
    """The state with the average in place of its params, and of its buffers as far as they were
    averaged.

    `name` is that of the AverageParams. A state in whose run nothing has been averaged yet comes
    back as it is. Raises ValueError if no AverageParams of this name has taken part.
    """
    memory = state.memory.get(name)
    if memory is None:
        raise ValueError(
            f"at_average: the state remembers no {name!r}, only {sorted(state.memory)}. "
            f"Fit with AverageParams() among the callbacks first."
        )
    params, buffers = _averages(state, memory)
    return with_weights(state, params, buffers)


def _averages(state: State, memory: Averaged) -> tuple[Tensors, Tensors]:
    """The params and buffers, of which those that were averaged are averages."""
    return _average_of(state.params, memory.average), _average_of(state.buffers, memory.buffers)


def put_back(state: State) -> State:
    """The state with the tensors that were trained, if a validation batch had replaced them by an
    average.
    """
    kept = state.memory.get(TRAINED)
    if kept is None:
        return state
    return state.forget(TRAINED).replace(params=kept["params"], buffers=kept["buffers"])


def newest_weight(count: int, decay: float | None, debias: bool = True) -> float:
    """What the newest of `count` values weighs in their average, so that average += weight * (value
    - average).

    1 / count for the plain mean; (1 - decay) / (1 - decay**count) for the debiased exponential one,
    whose average / (1 - decay**count) this is; else 1 - decay. The first value always weighs 1.

    >>> newest_weight(4, None), newest_weight(2, 0.5), newest_weight(2, 0.75, debias=False)
    (0.25, 0.6666666666666666, 0.25)
    """
    if decay is None:
        return 1 / count
    if debias:
        return (1 - decay) / (1 - decay**count)
    return 1 - decay if count > 1 else 1.0


@torch.no_grad()
def moved(average: Tensors, values: Tensors, weight: float) -> Tensors:
    """The average, moved by `weight` towards the values; a value that is not in it yet begins its
    own.

    >>> moved({"a": torch.tensor(1.0)}, {"a": torch.tensor(3.0), "b": torch.tensor(5.0)}, 0.25)
    {'a': tensor(1.5000), 'b': tensor(5.)}
    """
    new = {}
    for name, value in values.items():
        precise = _precise(value)
        new[name] = torch.lerp(average[name], precise, weight) if name in average else precise
    return new


def _average_of(tensors: Tensors, average: Tensors) -> Tensors:
    return {name: average.get(name, value).to(value.dtype) for name, value in tensors.items()}


def _continuous(tensors: Tensors) -> Tensors:
    kept = {}
    for name, value in tensors.items():
        is_continuous = value.is_floating_point() or value.is_complex()
        if is_continuous:
            kept[name] = value
    return kept


def _precise(value: Tensor) -> Tensor:
    # In bfloat16 the average would hardly move: most steps are below half of its last digit.
    return widened(value.detach())
