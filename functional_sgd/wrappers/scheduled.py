"""Hypers that are functions of the step."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from functional_sgd.errors import did_you_mean
from functional_sgd.hyper import Hyper, is_replaced
from functional_sgd.optimizer import Optimizer, check_names
from functional_sgd.precision import widest
from functional_sgd.schedules import Schedule, counts_steps, is_shape
from functional_sgd.state import State, check_state
from functional_sgd.tree import Tree
from functional_sgd.wiring import CALLS
from functional_sgd.wrappers.wrapper import INNER, Wrapper, no_calls


@dataclass(frozen=True, repr=False)
class Scheduled(Wrapper):
    """An optimizer whose hypers follow schedules; `scheduled` makes one."""

    schedules: Mapping[str, Schedule] = field(default_factory=dict, hash=False)
    steps: int | None = None

    name: ClassVar[str] = "scheduled"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None and self.steps < 1:
            raise ValueError(
                f"scheduled: steps must be at least 1, got {self.steps!r}. Give the length of the "
                f"run."
            )
        known = self.opt.names
        for name, schedule in self.schedules.items():
            if name not in known:
                raise ValueError(f"scheduled: no rule reads {name!r}. {did_you_mean(name, known)}")
            if not callable(schedule):
                raise TypeError(
                    f"scheduled: {name!r} must be a function of the step, got {schedule!r}. "
                    f"A number that stays is the default of the chain."
                )
            if self.steps is None and is_shape(schedule):
                raise ValueError(
                    f"scheduled: {schedule!r} runs over positions from 0 to 1, so the length of "
                    f"the run must be known: "
                    f"scheduled(opt, steps=1000, {name}=...), or {name}=Stretch(..., 1000)."
                )
            if self.steps is not None and counts_steps(schedule):
                raise ValueError(
                    f"scheduled: {schedule!r} counts steps, but with steps={self.steps} it would "
                    f"get positions from 0 to 1. Leave steps out, or give its lengths as shares."
                )

    @property
    def hyper(self) -> dict[str, Hyper]:
        """The hypers and their defaults; those that are scheduled have none, and are not in it."""
        every = self.opt.hyper.items()
        return {name: value for name, value in every if not self._is_scheduled(name)}

    @property
    def required(self) -> tuple[str, ...]:
        """The hypers and extras that the caller must pass."""
        return tuple(name for name in self.opt.required if not self._is_scheduled(name))

    def init(self, params: Tree) -> State:
        """A fresh state: there was no call, and the optimizer inside begins."""
        return {CALLS: no_calls(params), INNER: self.opt.init(params)}

    def __call__(
        self,
        params: Tree,
        grads: Tree,
        state: State,
        hyper: Mapping[str, Hyper] | None = None,
        **extras: Any,
    ) -> tuple[Tree, State]:
        """One step with the hypers of this step: (new params, new state)."""
        check_state(self.name, state, (CALLS, INNER))
        hyper = check_names(self.name, hyper, extras, self.names)
        # The optimizer refuses a hyper that comes both in the dict and by keyword.
        values = {n: v for n, v in self.values(state[CALLS]).items() if n not in extras}
        params, inner = self.opt(params, grads, state[INNER], {**values, **hyper}, **extras)
        return params, {CALLS: state[CALLS] + 1, INNER: inner}

    def perturb(
        self, params: Tree, grads: Tree, state: State, hyper: Mapping[str, Hyper] | None = None
    ) -> Tree:
        """Where the optimizer inside wants the gradient, with the hypers of this step."""
        check_state(self.name, state, (CALLS, INNER))
        values = {**self.values(state[CALLS]), **(hyper or {})}
        return self.opt.perturb(params, grads, state[INNER], values)

    def values(self, calls: Tensor) -> dict[str, Any]:
        """The scheduled hypers of the call that follows after `calls` others."""
        position = calls.to(widest(calls.device))
        if self.steps is not None:
            position = (position / self.steps).clamp(0, 1)
        return {name: schedule(position) for name, schedule in self.schedules.items()}

    def _is_scheduled(self, name: str) -> bool:
        # A schedule of lr is one of head.lr, too, where a partition has that.
        return name in self.schedules or is_replaced(name, self.schedules)

    def __repr__(self) -> str:
        parts = [repr(self.opt)]
        if self.steps is not None:
            parts.append(f"steps={self.steps}")
        parts += [f"{name}={value!r}" for name, value in self.schedules.items()]
        return f"scheduled({', '.join(parts)})"


def scheduled(opt: Optimizer, /, *, steps: int | None = None, **hypers: Schedule) -> Scheduled:
    """The optimizer, with each of these hypers computed from the number of steps that the state has
    behind it.

    A schedule is a function of one number, given as a 0-d float64 tensor, so that it can be
    compiled, mapped over and differentiated: use torch's operators, not `if` or math. Without
    `steps` the number is how many steps there were: 0 at the first. With `steps`, the length of the
    run, it is the position steps_so_far / steps, which stays at 1 afterwards; that is what the
    shapes in functional_sgd.schedules take. What a schedule returns is used as a hyper: a
    number, a 0-d tensor, or a tree prefix of them. A hyper that is passed at the call wins.

    Raises ValueError for a hyper that the optimizer does not have, for a shape without `steps`,
    and for a schedule that counts steps with them.

    >>> import torch
    >>> from functional_sgd import sgd
    >>> from functional_sgd.schedules import Linear
    >>> opt, params = scheduled(sgd(), steps=4, lr=Linear(1.0, 0.0)), torch.tensor([8.0])
    >>> state = opt.init(params)
    >>> for _ in range(2):
    ...     params, state = opt(params, torch.tensor([1.0]), state)  # lr is 1, then 0.75
    >>> params
    tensor([6.2500])
    """
    return Scheduled(opt, hypers, steps)
