"""Watch a column of the history: end the run, or lower lr, when it has stopped getting better."""

import math
from dataclasses import KW_ONLY, dataclass, replace
from typing import ClassVar

import optree

from functional_sgd.errors import did_you_mean
from loop.callback import Callback, Order
from loop.callbacks.parts.ending import ended
from loop.callbacks.recorder import Recorder
from loop.callbacks.schedule import Scheduled, check_alone
from loop.disk.encoding import storable
from loop.history import number_text
from loop.run.signals import CancelFit
from loop.run.stages import learner_of
from loop.state import State

ERRORS = {
    *("mse", "rmse", "mae", "msle", "rmsle", "mape", "smape", "wmape", "perplexity", "ppl"),
    *("nll", "bce", "brier", "crps", "deviance", "divergence", "distance"),
    *("wer", "cer", "ter", "mer", "eer", "ece", "fid", "kid", "lpips", "bpc", "bpb"),
}
"""Words of a column's name that say that less is better."""


def better(value: float, best: float | None, mode: str, min_delta: float = 0.0) -> bool:
    """Whether a value is better than the best so far (None: there is none yet) by more than
    min_delta.

    value + min_delta < best for mode "min", value - min_delta > best for "max". NaN is never
    better. Source: fastai.

    >>> better(3.95, 4.0, "min"), better(3.95, 4.0, "min", min_delta=0.1), better(3.95, None, "max")
    (True, False, True)
    """
    if mode == "min":
        bound = math.inf if best is None else best
        return value + min_delta < bound
    bound = -math.inf if best is None else best
    return value - min_delta > bound


def mode_of(monitor: str, mode: str | None = None) -> str:
    """The mode itself, if given; else "min" for a column with "loss" or "error" in its name, or a
    word that is a measure of error (rmse, mae, perplexity); "max" for any other.

    >>> mode_of("valid_loss"), mode_of("rmse"), mode_of("accuracy"), mode_of("accuracy", "min")
    ('min', 'min', 'max', 'min')
    """
    if mode is not None:
        return mode
    is_error = "loss" in monitor or "error" in monitor
    return "min" if is_error or ERRORS & {*monitor.lower().split("_")} else "max"


def check_tracking(who: str, mode: str | None, min_delta: float, patience: int = 1) -> None:
    """Raise ValueError, on behalf of `who`, for settings that make no sense."""
    if mode not in ("min", "max", None):
        raise ValueError(
            f"{who}: mode must be 'min', 'max' or None (by the monitor's name), got {mode!r}."
        )
    if not min_delta >= 0:
        raise ValueError(f"{who}: min_delta must be 0 or more, got {min_delta}.")
    if not isinstance(patience, int) or patience < 1:
        raise ValueError(
            f"{who}: patience must be a whole number of epochs, at least 1, got {patience!r}."
        )


def check_monitor(who: str, state: State, monitor: str) -> None:
    """Raise ValueError, on behalf of `who`, for what can be known to be missing before there is a
    row.
    """
    if monitor == "valid_loss" and learner_of(state).data.valid is None:
        raise ValueError(
            f"{who}: there is no 'valid_loss' without validation data. "
            f"Pass DataLoaders(train, valid), or watch another column: monitor='train_loss'."
        )


def monitored(who: str, state: State, monitor: str) -> float | None:
    """The monitored column of the last row; None if it was not measured. Raises ValueError if there
    is no such column.

    >>> from loop.history import History
    >>> history = History(rows=({"epoch": 0, "valid_loss": 0.5},))
    >>> monitored("me", State({}, {}, {}, {}, history=history), "valid_loss")
    0.5
    """
    row = state.history.rows[-1] if state.history.rows else {}
    if monitor not in row:
        raise ValueError(
            f"{who}: the history has no column {monitor!r}. {did_you_mean(monitor, row)}"
        )
    value: float | None = row[monitor]
    return value


def lower_lr(state: State, factor: float, min_lr: float = 0.0) -> State:
    """The state with lr, a number or a tree of them, divided by factor; no part falls below min_lr,
    and none rises. So with the lr of every part of a partition.

    >>> state = State({}, {}, {}, {"lr": {"weight": 0.5, "bias": 0.1}})
    >>> lower_lr(state, factor=10.0, min_lr=0.03).hyper
    {'lr': {'weight': 0.05, 'bias': 0.03}}
    """
    # The smaller of both: a part that is below min_lr already must not rise to it.
    hyper = dict(state.hyper)
    for name in filter(_is_lr, state.hyper):
        hyper[name] = optree.tree_map(
            lambda leaf: min(leaf, max(leaf / factor, min_lr)), state.hyper[name]
        )
    return state.replace(hyper=hyper)


def check_lowerable(who: str, state: State) -> None:
    """Raise ValueError, on behalf of `who`, if there is no lr to lower, or one is scheduled in this
    run.
    """
    scheduled: list[str] = []
    for resource in state.resources.values():
        if isinstance(resource, Scheduled):
            scheduled += filter(_is_lr, resource.hypers)
    check_alone(who, state, scheduled, own="")
    if not any(map(_is_lr, state.hyper)):
        raise ValueError(
            f"{who}: state.hyper has no 'lr' to change. {did_you_mean('lr', state.hyper)}"
        )


def _is_lr(name: str) -> bool:
    """Whether a hyper is lr, of all parameters or of a part of them."""
    return name.rpartition(".")[2] == "lr"


@storable
@dataclass(frozen=True)
class Tracked:
    """What a Tracker remembers: the best value so far, and the epochs since."""

    best: float | None = None
    wait: int = 0


@dataclass(frozen=True)
class Tracker(Callback):
    """Watch a column of the history; what happens when it has not got better for `patience` epochs
    is `worn_out`.

    `monitor` is the column: valid_loss, train_loss or a metric. `mode` says whether "min" or "max"
    is good; None decides by the name (see mode_of). An epoch is better if it beats the best so far
    by more than `min_delta`; one in which nothing was measured (None) does not count at all. Every
    run starts fresh; with `reset_on_fit=False` it must beat the best of the runs before it.
    `state.memory[name]` is a Tracked: the best value and the epochs since, after the run too.
    """

    monitor: str = "valid_loss"
    patience: int = 1
    _: KW_ONLY
    min_delta: float = 0.0
    mode: str | None = None
    reset_on_fit: bool = True
    run_after: ClassVar[tuple[type, ...]] = (Recorder,)

    def __post_init__(self) -> None:
        check_tracking(type(self).__name__, self.mode, self.min_delta, self.patience)

    def before_fit(self, state: State) -> State:
        """Start the counters."""
        check_monitor(type(self).__name__, state, self.monitor)
        best = None if self.reset_on_fit else self.tracked(state).best
        return state.remember(self.name, Tracked(best))

    def after_epoch(self, state: State) -> State | None:
        """Count."""
        value = monitored(type(self).__name__, state, self.monitor)
        if value is None:
            return None
        tracked = self.tracked(state)
        if better(value, tracked.best, mode_of(self.monitor, self.mode), self.min_delta):
            return state.remember(self.name, Tracked(value))
        tracked = replace(tracked, wait=tracked.wait + 1)
        state = state.remember(self.name, tracked)
        return self.worn_out(state) if tracked.wait >= self.patience else state

    def tracked(self, state: State) -> Tracked:
        """What this tracker remembers in a state."""
        found: Tracked = state.memory.get(self.name, Tracked())
        return found

    def worn_out(self, state: State) -> State:
        """What to do after `patience` epochs without anything better."""
        raise NotImplementedError


@dataclass(frozen=True)
class EarlyStopping(Tracker):
    """End the run when a column of the history has not got better for `patience` epochs.

    Options: see Tracker. The parameters are those of the last epoch, not of the best. Why the run
    has ended is in `state.memory["ended"]`, and Progress shows it. Raises ValueError for a monitor
    that is no column: before the run if there is no validation data, else after the first epoch.
    Source: fastai.

    >>> EarlyStopping(monitor="accuracy", patience=3).name
    'early_stopping'
    """

    order: ClassVar[int] = Order.STOP

    def worn_out(self, state: State) -> State:
        """Enough."""
        best = self.tracked(state).best
        than = "been a number" if best is None else f"got better than {number_text(best)}"
        where = f"after epoch {state.epoch}"
        why = f"{self.monitor} has not {than} (patience={self.patience}"
        why += f", min_delta={self.min_delta})" if self.min_delta else ")"
        raise CancelFit(ended(state, f"{type(self).__name__} {where}: {why}"))


@dataclass(frozen=True)
class ReduceLROnPlateau(Tracker):
    """Divide lr by `factor` when a column of the history has not got better for `patience` epochs,
    and count again.

    Options: see Tracker. lr may be a tree; no part of it falls below `min_lr`; that of a part of a
    partition (body.lr) is lowered too. It stays reduced in
    the state after the run: `fit(..., lr=...)` sets it again. Raises ValueError for a monitor that
    is no column (see EarlyStopping), and when the run starts if lr is scheduled in it. Source:
    fastai.

    >>> ReduceLROnPlateau(patience=3, factor=2.0).name
    'reduce_lr_on_plateau'
    """

    factor: float = 10.0
    min_lr: float = 0.0
    order: ClassVar[int] = Order.ADAPT

    def __post_init__(self) -> None:
        super().__post_init__()
        check_reduction("ReduceLROnPlateau", self.factor, self.min_lr)

    def before_fit(self, state: State) -> State:
        """Check lr, and start the counters."""
        check_lowerable("ReduceLROnPlateau", state)
        return super().before_fit(state)

    def worn_out(self, state: State) -> State:
        """Lower lr."""
        rested = state.remember(self.name, replace(self.tracked(state), wait=0))
        return lower_lr(rested, self.factor, self.min_lr)


def check_reduction(who: str, factor: float, min_lr: float) -> None:
    """Raise ValueError, on behalf of `who`, for a factor or a bound that would not lower lr."""
    if not factor > 1:
        raise ValueError(f"{who}: factor divides lr, so it must be above 1, got {factor}.")
    if not min_lr >= 0:
        raise ValueError(f"{who}: min_lr must be 0 or more, got {min_lr}.")
