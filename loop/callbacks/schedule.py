"""Let hypers follow schedules."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import optree

from functional_sgd.wiring import did_you_mean
from loop.callback import Callback
from loop.learner import hyper_names
from loop.stages import learner_of
from loop.state import State


@dataclass(frozen=True)
class ParamScheduler(Callback):
    """Set hypers before every training batch: `ParamScheduler(dict(lr=one_cycle(0.1), mom=Linear(0.95, 0.85)))`.

    A schedule is a function of the share of the run's training that is done, from 0 to 1 (the value at 1 is never
    used: batch k of n trains with schedule(k / n)). A tree of schedules, built like params or a prefix of it, gives
    each leaf or group its own. After the run the hypers are what they were before it.

    Raises ValueError when the run starts if the optimizer reads no such hyper, or a loader has no length.
    """

    schedules: Mapping[str, Any]
    order: ClassVar[int] = 60

    def before_fit(self, state: State) -> State:
        """Check the names, and keep the hypers of before."""
        known = {*state.hyper, *hyper_names(learner_of(state))}
        for name in self.schedules:
            if name not in known:
                raise ValueError(f"ParamScheduler: the optimizer reads no {name!r}. {did_you_mean(name, known)}")
        return state.remember(self.name, {name: state.hyper[name] for name in self.schedules if name in state.hyper})

    def before_train(self, state: State) -> None:
        """Check that the run's length is known."""
        if state.n_iter is None:
            raise ValueError("ParamScheduler: data.train has no len(), so no share of a run is known. Give it one.")

    def before_batch(self, state: State) -> State | None:
        """Set the hypers of a training batch."""
        if not state.training:
            return None
        values = {name: values_at(schedule, state.pct_train) for name, schedule in self.schedules.items()}
        return state.replace(hyper={**state.hyper, **values})

    def after_fit(self, state: State) -> State:
        """Put the hypers back."""
        kept = state.memory.get(self.name)
        if kept is None:  # the run ended before it began, or went back to a state from before it
            return state
        names = [name for name in state.hyper if name in kept or name not in self.schedules]
        return state.replace(hyper={name: kept.get(name, state.hyper[name]) for name in names}).forget(self.name)


def values_at(schedule: Any, position: float) -> Any:
    """A schedule's value, or the tree of values of a tree of schedules."""
    return schedule(position) if callable(schedule) else optree.tree_map(lambda part: part(position), schedule)
