"""Keep what passes by in a run: whole batches, or values of your own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

from functional_sgd.autodiff import detached
from functional_sgd.errors import did_you_mean
from loop.callback import Callback, Order
from loop.history import Log
from loop.state import State

# memory would contain itself, and what the run has lent (learner, resources) cannot be saved.
_KEPT = {"x", "y", *(entry.name for entry in fields(State))} - {
    "history",
    "memory",
    "learner",
    "resources",
}


@dataclass(frozen=True)
class CollectData(Callback):
    """Keep what every batch of a run had: `state.memory["collect_data"]` is a Log with a dict for
    each.

    `what` are names of the state's fields, or x and y; a value that a batch did not come to is
    None. `training` says of which phase: True, False, or None for both. Tensors are detached and
    stay where they are: everything that is collected stays in memory (of the device), and in the
    state, until the next run begins or you `forget` it.

    Raises ValueError for a name that is not a field.

    >>> CollectData(what=("pred",), training=False).what
    ('pred',)
    """

    what: Sequence[str] = ("xb", "yb", "pred", "loss")
    training: bool | None = None
    order: ClassVar[int] = Order.REPORT

    def __post_init__(self) -> None:
        if isinstance(self.what, str):
            raise TypeError(
                f"CollectData: what must be names, got {self.what!r}. Put it in a tuple: "
                f"({self.what!r},)."
            )
        for name in self.what:
            if name not in _KEPT:
                raise ValueError(
                    f"CollectData: there is no {name!r} to collect. {did_you_mean(name, _KEPT)}"
                )

    def before_fit(self, state: State) -> State:
        """Start fresh."""
        return state.remember(self.name, Log())

    def after_batch(self, state: State) -> State | None:
        """Keep one batch's."""
        if self.training not in (None, state.training):
            return None
        # A run that donates overwrites params, and whatever else lies in their memory.
        values = {name: state.kept(detached(getattr(state, name))) for name in self.what}
        # There is no log after a callback went back to a state from before the run.
        return state.remember(self.name, state.memory.get(self.name, Log()).append(values))


@dataclass(frozen=True, init=False)
class RecordValues(Callback):
    """Keep values of your own after every training batch: `RecordValues(lr=lambda state:
    state.hyper["lr"])`.

    `state.memory["record_values"]["lr"]` is then a Log of what the function returned for each batch
    of the run; see it with `plot_records`. The state has the batch, its pred, loss and grads, and
    the hypers that it was trained with. A tensor is kept as it is, so that recording waits for no
    device. A batch cancelled before its loss is known is not recorded. Every run starts fresh.

    Raises TypeError for anything but a function, ValueError if there is none.

    >>> RecordValues(lr=lambda state: state.hyper["lr"]).name
    'record_values'
    """

    functions: Mapping[str, Callable[[State], object]]
    order: ClassVar[int] = Order.REPORT

    def __init__(self, **functions: Callable[[State], object]) -> None:
        if not functions:
            raise ValueError(
                "RecordValues: expected functions of the state: "
                'RecordValues(lr=lambda state: state.hyper["lr"]).'
            )
        for name, function in functions.items():
            if not callable(function):
                raise TypeError(
                    f"RecordValues: {name} must be a function of the state, got {function!r}."
                )
        object.__setattr__(self, "functions", functions)

    def before_fit(self, state: State) -> State:
        """Start fresh."""
        return state.remember(self.name, {name: Log() for name in self.functions})

    def after_batch(self, state: State) -> State | None:
        """Keep one batch's."""
        if not state.training or state.loss is None:
            return None
        logs = state.memory.get(self.name, {})
        grown = {}
        for name, function in self.functions.items():
            # A function may return params, which a run that donates overwrites.
            value = state.kept(detached(function(state)))
            grown[name] = logs.get(name, Log()).append(value)
        return state.remember(self.name, grown)
