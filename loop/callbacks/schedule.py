"""Let hypers, and numbers inside the model, follow schedules."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import optree

from functional_sgd.errors import did_you_mean
from functional_sgd.hyper import Hyper, is_replaced
from functional_sgd.schedules import Schedule, counts_steps
from loop.callback import Callback, Order
from loop.callbacks.parts.attributes import ROOT, Attribute, attributes_kept, find_attribute
from loop.callbacks.parts.hyper_groups import hyper_groups
from loop.learner import hyper_names
from loop.run.stages import learner_of
from loop.state import State

Schedules: TypeAlias = Any
"""A schedule, a tree of them built like params or a prefix of it, or one for each layer group."""

KEPT = "hypers_before_schedules"
"""Where a state within a run keeps the hypers that schedulers will put back, by their names."""


class Scheduled:
    """What the bracket of a scheduler yields: the hypers that are its to set in this run."""

    def __init__(self, hypers: Collection[str]) -> None:
        self.hypers = hypers


@dataclass(frozen=True)
class ParamScheduler(Callback):
    """Set hypers before every training batch: `ParamScheduler(dict(lr=one_cycle(0.1),
    mom=Linear(0.95, 0.85)))`.

    A schedule is a function of the share of the run's training that is done, from 0 to 1 (the value
    at 1 is never used: batch k of n trains with schedule(k / n)). A tree of schedules, built like
    params or a prefix of it, gives each leaf its own. A list of schedules gives each layer group
    its own: where lr is a tree (by_path), the parameters with the same lr are one group, and groups
    are in the order of params. After the run the hypers are what they were before it; those of a
    run that was stopped are put back when another one begins.

    A schedule of lr is for all parts of a partition, but for those whose own (body.lr) is scheduled
    in this run too, or given to `fit`: these go their own way.

    A key "model.<path>.<attribute>" stands for a number inside the model: `{"model.3.p":
    Linear(0.0, 0.5)}` schedules the p of a Dropout that is the model's layer 3. It is set in
    training phases only, and put back after each of them, whatever way it ends; a compiled model is
    compiled again for every new value.

    Raises ValueError for a schedule that counts steps, and when the run starts if the optimizer
    reads no such hyper, another callback schedules it, the model has no such number, a list is not
    as long as there are groups, or a loader has no length. Source: fastai's ParamScheduler.
    """

    schedules: Mapping[str, Schedules]
    hypers: Mapping[str, Schedules] = field(init=False, repr=False, compare=False)
    attributes: Mapping[str, Schedule] = field(init=False, repr=False, compare=False)
    order: ClassVar[int] = Order.REPORT

    def __post_init__(self) -> None:
        if not isinstance(self.schedules, Mapping):
            raise TypeError(
                f"ParamScheduler: expected a dict of schedules, got {self.schedules!r}. Say "
                f"what it is for: ParamScheduler({{'lr': ...}})."
            )
        hypers: dict[str, Schedules] = {}
        attributes: dict[str, Schedule] = {}
        for name, schedule in self.schedules.items():
            kind = attributes if name.startswith(ROOT) else hypers
            kind[name] = schedule
        _check_hypers(hypers)
        _check_attributes(attributes)
        _check_shares(self.schedules)
        object.__setattr__(self, "hypers", hypers)
        object.__setattr__(self, "attributes", attributes)

    @property
    def eager(self) -> bool:  # type: ignore[override]
        """Whether it changes numbers inside the model, which a compiled batch does not notice."""
        return bool(self.attributes)

    @contextmanager
    def around_fit(self, state: State) -> Iterator[Scheduled]:
        """Say what is scheduled."""
        del state  # its tensors would live as long as the run
        yield Scheduled(self.hypers)

    @contextmanager
    def around_train(self, state: State) -> Iterator[dict[str, Attribute]]:
        """Give the model its numbers back."""
        # During the phase this hides the resource of around_fit, which check_alone looks for.
        # It does so only in before_fit.
        found = self._find(state)
        del state  # its tensors would live as long as the run
        with attributes_kept(found.values()):
            yield found

    def before_fit(self, state: State) -> State:
        """Check the names, and keep the hypers of before."""
        known = {*state.hyper, *hyper_names(learner_of(state))}
        for name in self.hypers:
            if name not in known:
                raise ValueError(
                    f"ParamScheduler: the optimizer reads no {name!r}. {did_you_mean(name, known)}"
                )
        check_alone("ParamScheduler", state, self.hypers, own=self.name)
        self._find(state)
        return self._begin(state)

    def before_train(self, state: State) -> None:
        """Check that the run's length is known."""
        if state.n_iter is None:
            raise ValueError(
                "ParamScheduler: data.train has no len(), so no share of a run is known. Give it "
                "one."
            )

    def before_batch(self, state: State) -> State | None:
        """Set the values of a training batch."""
        if not state.training:
            return None
        name = self.name
        if name not in state.memory:  # a callback went back to a state from before the run
            state = self._begin(state)
        for path, schedule in self.attributes.items():
            state.resources[name][path].set(schedule(state.pct_train))
        groups = state.memory[name]["groups"]
        values = {}
        for key, part in self.hypers.items():
            values[key] = values_at(part, state.pct_train, groups.get(key))
        # What is there of a part is its own: `keep_hypers` has taken out what is replaced.
        return state.replace(hyper={**state.hyper, **values})

    def after_fit(self, state: State) -> State | None:
        """Put the hypers back."""
        return put_back(state, self.name)

    def _begin(self, state: State) -> State:
        # Find the groups once, before the run: where schedules cross, two groups have equal values,
        # and a resumed run could not tell them apart.
        groups = {}
        for name, part in self.hypers.items():
            if isinstance(part, (list, tuple)):
                groups[name] = _group_of_each(state, name, len(part))
        return keep_hypers(state, self.name, self.hypers).remember(self.name, {"groups": groups})

    def _find(self, state: State) -> dict[str, Attribute]:
        model = learner_of(state).model
        return {path: find_attribute("ParamScheduler", model, path) for path in self.attributes}


def values_at(
    schedule: Schedules, position: float, group_of: Mapping[str, int] | None = None
) -> Hyper:
    """A schedule's value, or the tree of values of a tree of schedules, or of a list of them and
    each leaf's group.

    >>> schedules = [lambda position: position, lambda position: 2 * position]
    >>> values_at(schedules, 0.25, {"weight": 1, "bias": 0})
    {'weight': 0.5, 'bias': 0.25}
    """
    if callable(schedule):
        return schedule(position)
    if group_of is None:
        return optree.tree_map(lambda part: part(position), schedule)
    values = [part(position) for part in schedule]
    return {name: values[group] for name, group in group_of.items()}


def keep_hypers(state: State, who: str, names: Iterable[str]) -> State:
    """The state that remembers these hypers, for `put_back`, before the callback `who`
    sets them; without those of parts that they replace.

    A part keeps its own if that was given to this `fit`, or is scheduled by another callback.

    >>> state = State({}, {}, {}, {"lr": 0.1, "body.lr": 0.2}, begun_with={"given": ["body.lr"]})
    >>> keep_hypers(state, "me", ["lr"]).hyper
    {'lr': 0.1, 'body.lr': 0.2}
    >>> keep_hypers(state.replace(begun_with={}), "me", ["lr"]).hyper
    {'lr': 0.1}
    """
    sets = tuple(names)
    stays = {*state.begun_with.get("given", ())}
    for resource in state.resources.values():
        if isinstance(resource, Scheduled):
            stays.update(resource.hypers)
    # In a training phase other resources may hide those.
    for other in state.memory.get(KEPT, {}).values():
        stays.update(other["sets"])
    before, hyper = {}, {}
    for name, value in state.hyper.items():
        is_dropped = is_replaced(name, sets) and name not in stays
        if name in sets or is_dropped:
            before[name] = value
        if not is_dropped:
            hyper[name] = value
    # In the state, since a stopped run never reaches after_fit: the next run puts back.
    kept = {**state.memory.get(KEPT, {}), who: {"sets": sets, "before": before}}
    return state.replace(hyper=hyper).remember(KEPT, kept)


def put_back(state: State, who: str) -> State:
    """The state with the hypers as they were before `who` set them, and without its memory.

    One that was not given then is gone. A state that `who` has not begun with stays as it is: the
    run ended before that, or went back to a state from before it.

    >>> state = keep_hypers(State({}, {}, {}, {"lr": 0.1}), "me", ["lr", "mom"])
    >>> put_back(state.replace(hyper={"lr": 3.0, "mom": 0.9}), "me").hyper
    {'lr': 0.1}
    """
    kept = dict(state.memory.get(KEPT, {}))
    if who not in kept:
        return state
    own = kept.pop(who)
    others = {name: value for name, value in state.hyper.items() if name not in own["sets"]}
    state = state.forget(who).replace(hyper={**others, **own["before"]})
    return state.remember(KEPT, kept) if kept else state.forget(KEPT)


def put_all_back(state: State) -> State:
    """The state with the hypers of before the run that it was stopped in, if it was in one."""
    # In reverse, since a later scheduler may have found values that an earlier one had set.
    for who in reversed(state.memory.get(KEPT, {})):
        state = put_back(state, who)
    return state


def check_unscheduled(who: str, state: State, hyper: str, own: str = "") -> None:
    """Raise ValueError if there is no such hyper to change, or a scheduler of this run (not `own`)
    would undo it.
    """
    if hyper not in state.hyper:
        raise ValueError(
            f"{who}: state.hyper has no {hyper!r} to change. {did_you_mean(hyper, state.hyper)}"
        )
    check_alone(who, state, [hyper], own)


def check_alone(who: str, state: State, hypers: Iterable[str], own: str) -> None:
    """Raise ValueError if a scheduler of this run (not `own`) sets one of these hypers."""
    for name, resource in state.resources.items():
        if name == own or not isinstance(resource, Scheduled):
            continue
        for hyper in hypers:
            if hyper in resource.hypers:
                raise ValueError(
                    f"{who}: {hyper!r} is scheduled by {name!r} in this run, which would overwrite "
                    f"every change at the next batch. Use one of the two."
                )


def _check_hypers(hypers: Mapping[str, Schedules]) -> None:
    for name, schedule in hypers.items():
        for leaf in optree.tree_leaves(schedule):
            if not callable(leaf):
                raise TypeError(
                    f"ParamScheduler: the schedule of {name!r} must be a function of the share "
                    f"of the run, got {leaf!r}. One that does not change is Constant(0.1)."
                )


def _check_attributes(attributes: Mapping[str, object]) -> None:
    for path, schedule in attributes.items():
        if not callable(schedule):
            raise TypeError(
                f"ParamScheduler: {path!r} is one number, so its schedule is a function: "
                f"{schedule!r}."
            )


def _check_shares(schedules: Mapping[str, Schedules]) -> None:
    for name, schedule in schedules.items():
        if any(map(counts_steps, optree.tree_leaves(schedule))):
            raise ValueError(
                f"ParamScheduler: the schedule of {name!r} counts steps, but gets the share of "
                f"the run, from 0 to 1. Give its lengths as shares, or schedule the optimizer: "
                f"scheduled(opt, {name}=...)."
            )


def _group_of_each(state: State, name: str, count: int) -> dict[str, int]:
    if name not in state.hyper:
        raise ValueError(
            f"ParamScheduler: {name!r} has no value yet, so there are no groups. Pass fit(..., "
            f"{name}=...)."
        )
    groups, group_of = hyper_groups("ParamScheduler", state.params, state.hyper, [name])
    if len(groups) != count:
        raise ValueError(
            f"ParamScheduler: {name!r} has a list of {count} schedules, but there are "
            f"{len(groups)} layer groups "
            f"(parameters with the same {name} are one group). Give one schedule for each group, "
            f"or a tree of them: "
            f"by_path(params, {{'head.*': ..., '*': ...}})."
        )
    return group_of
