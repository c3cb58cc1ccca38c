"""Let lr follow a scheduler of torch.optim.lr_scheduler."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from functional_sgd.hyper import Hyper, with_hypers
from loop.callback import Callback, Order
from loop.callbacks.parts.hyper_groups import hyper_groups
from loop.callbacks.recorder import Recorder
from loop.callbacks.schedule import (
    Scheduled,
    check_alone,
    check_unscheduled,
    keep_hypers,
    put_back,
)
from loop.callbacks.tracking import check_monitor, monitored
from loop.disk.encoding import storable
from loop.learner import hyper_names
from loop.run.stages import learner_of
from loop.state import State

KEYS = {"lr": "lr", "mom": "momentum"}
"""Our name of a hyper -> torch's, in a parameter group."""


@storable
@dataclass(frozen=True)
class Taken:
    """What TorchScheduler remembers: enough to bring another scheduler to the same place."""

    start: Mapping[str, Hyper]  # those that the run began with
    sets: tuple[str, ...] = ()  # those that the scheduler sets
    steps: int = 0
    metrics: tuple[float, ...] = ()  # what each step was told, of ReduceLROnPlateau
    first: int = 0  # train_iter when the run began


@dataclass(frozen=True)
class TorchScheduler(Callback):
    """Let any scheduler of torch set lr: `TorchScheduler(partial(CosineAnnealingLR, T_max=100))`.

    `make(optimizer)` returns the scheduler; it is called when the run starts, and again when one is
    resumed, with a torch.optim.SGD whose only use is to be scheduled: a parameter group for each
    layer group (parameters with the same lr are one; see ParamScheduler), lr and momentum as in
    state.hyper. Its lr becomes our lr. OneCycleLR and CyclicLR set momentum too: it becomes our
    `mom`, if the optimizer reads it.

    The scheduler steps after every training batch, so that the first batch has the first lr; or
    with `every="epoch"` after every epoch. torch's ReduceLROnPlateau steps by epoch, with the
    column `monitor` of the history; an epoch in which it was not measured does not count. After the
    run the hypers are what they were before it.

    How many steps were taken is all that the state remembers: to resume a run they are taken again,
    3 microseconds each. So `make` must give the same scheduler each time.

    Raises TypeError if `make` is no function or makes no scheduler, and ValueError if it is one for
    another optimizer, if there is no lr, if another callback schedules what it sets, or if there is
    no such column.
    """

    make: Callable[[torch.optim.Optimizer], object]
    every: str = "batch"
    monitor: str = "valid_loss"
    order: ClassVar[int] = Order.STEP_LR
    run_after: ClassVar[tuple[type, ...]] = (Recorder,)

    def __post_init__(self) -> None:
        if not callable(self.make):
            raise TypeError(
                f"TorchScheduler: make must be a function from an optimizer to a scheduler, such "
                f"as "
                f"partial(CosineAnnealingLR, T_max=100), got {type(self.make).__name__}."
            )
        if self.every not in ("batch", "epoch"):
            raise ValueError(
                f"TorchScheduler: every must be 'batch' or 'epoch', got {self.every!r}."
            )

    @contextmanager
    def around_fit(self, state: State) -> Iterator["Driver"]:
        """Lend a place for the scheduler."""
        del state  # its tensors would live as long as the run
        yield Driver(self.make)

    def before_fit(self, state: State) -> State:
        """Make the scheduler, and set the hypers of the first batch."""
        # Its own Driver, which around_fit has lent, is a Scheduled too.
        check_unscheduled("TorchScheduler", state, "lr", own=self.name)
        return self._begin(state)

    def before_batch(self, state: State) -> State | None:
        """Catch up with a batch that had no after_batch, since an outer signal had ended it."""
        return self._catch_up(state)

    def after_batch(self, state: State) -> State | None:
        """Step, after a training batch."""
        return self._catch_up(state)

    def after_epoch(self, state: State) -> State | None:
        """Step, after an epoch."""
        return self._step(state) if self.every == "epoch" else None

    def after_fit(self, state: State) -> State | None:
        """Put the hypers back."""
        return put_back(state, self.name)

    def _begin(self, state: State) -> State:
        known = hyper_names(learner_of(state))
        values = with_hypers(learner_of(state).opt.hyper, state.hyper)
        start: dict[str, Hyper] = {}
        for name in KEYS:
            if name in known and name in values:
                start[name] = values[name]
        driver = self._driver(state, Taken(start))
        if driver.wants_metric:
            if self.every == "batch":
                raise ValueError(
                    "TorchScheduler: ReduceLROnPlateau looks at epochs. Pass every='epoch'."
                )
            check_monitor("TorchScheduler", state, self.monitor)
        # Which hypers it sets is known only once the scheduler is made.
        sets = tuple(name for name in driver.sets if name in known)
        check_alone("TorchScheduler", state, sets, own=self.name)
        kept = driver.kept = Taken(start, sets, first=state.train_iter)
        state = keep_hypers(state, self.name, kept.sets).remember(self.name, kept)
        return _set_hypers(state, driver, kept)

    def _catch_up(self, state: State) -> State | None:
        """As many steps as batches were trained."""
        if not state.training or self.every != "batch":
            return None
        kept = state.memory.get(self.name)
        if kept is None:  # a callback went back to a state from before the run
            return self._begin(state)
        caught_up = None
        for _ in range(state.train_iter - kept.first - kept.steps):
            caught_up = self._step(caught_up or state)
        return caught_up

    def _step(self, state: State) -> State | None:
        if self.name not in state.memory:  # a callback went back to a state from before the run
            state = self._begin(state)
        kept: Taken = state.memory[self.name]
        driver, metrics = self._driver(state, kept), kept.metrics
        if driver.wants_metric:
            metric = monitored("TorchScheduler", state, self.monitor)
            if metric is None:
                return None
            metrics = (*metrics, metric)
        kept = replace(kept, steps=kept.steps + 1, metrics=metrics)
        driver.step(kept)
        return _set_hypers(state.remember(self.name, kept), driver, kept)

    def _driver(self, state: State, kept: Taken) -> "Driver":
        driver: Driver = state.resources[self.name]
        # By identity: the scheduler has taken the steps of exactly this memory. After a resume, or
        # when a callback has gone back to an older state, the memory is another object.
        if driver.kept is not kept:
            driver.replay(kept, state)
        return driver


class Driver(Scheduled):
    """A scheduler at work, and the memory whose steps it has taken: a cache of what can be computed
    from that.
    """

    scheduler: Any
    optimizer: torch.optim.Optimizer
    group_of: Mapping[str, int]

    def __init__(self, make: Callable[[torch.optim.Optimizer], object]) -> None:
        super().__init__(["lr"])
        self.make = make
        self.kept: Taken | None = None

    def replay(self, kept: Taken, state: State) -> None:
        """Start fresh, and take all steps of this memory."""
        start = kept.start
        groups, self.group_of = hyper_groups("TorchScheduler", state.params, start, list(start))
        keys = [KEYS[name] for name in start]
        param_groups = []
        for values in groups:
            hypers = dict(zip(keys, values, strict=True))
            param_groups.append({"params": [torch.zeros(())], **hypers})
        self.optimizer = torch.optim.SGD(param_groups, lr=1.0)
        self.scheduler = self.make(self.optimizer)
        if not callable(getattr(self.scheduler, "step", None)):
            raise TypeError(f"TorchScheduler: make returned no scheduler, but {self.scheduler!r}.")
        if getattr(self.scheduler, "optimizer", self.optimizer) is not self.optimizer:
            raise ValueError(
                "TorchScheduler: make returned a scheduler of another optimizer. Use the one that "
                "it is given."
            )
        self.wants_metric = isinstance(self.scheduler, ReduceLROnPlateau)
        self.sets = ["lr", "mom"] if _cycles_momentum(self.scheduler) else ["lr"]
        self.optimizer.step()  # or torch warns that its step has never been called
        metrics = iter(kept.metrics)
        for _ in range(kept.steps):
            self._take(metrics)
        self.kept = kept

    def step(self, kept: Taken) -> None:
        """Take the last step of this memory."""
        self._take(iter(kept.metrics[-1:]))
        self.kept = kept

    def values(self, name: str) -> Hyper:
        """A hyper's value now: a number, or a tree of them if there are groups."""
        of_group = [float(group[KEYS[name]]) for group in self.optimizer.param_groups]
        if len(of_group) == 1:
            return of_group[0]
        return {param: of_group[group] for param, group in self.group_of.items()}

    def _take(self, metrics: Iterator[float]) -> None:
        self.kept = None  # until it has gone well
        if self.wants_metric:
            self.scheduler.step(next(metrics))
        else:
            self.scheduler.step()


def _set_hypers(state: State, driver: Driver, kept: Taken) -> State:
    values = {name: driver.values(name) for name in kept.sets}
    # What is there of a part is its own (see keep_hypers).
    return state.replace(hyper={**state.hyper, **values})


def _cycles_momentum(scheduler: object) -> bool:
    if getattr(scheduler, "cycle_momentum", False):
        return True
    # SequentialLR and ChainedScheduler contain other schedulers.
    return any(map(_cycles_momentum, getattr(scheduler, "_schedulers", ())))
