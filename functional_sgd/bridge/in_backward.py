"""Steps inside of backward: each parameter moves as soon as its gradient is there, which is then
released.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from functional_sgd.chaining import Chain
from functional_sgd.fusion.fused import Fused, fuse
from functional_sgd.hyper import Hyper, collect
from functional_sgd.memory import same_place
from functional_sgd.optimizer import Optimizer
from functional_sgd.signature import STEP
from functional_sgd.state import State, check_state, check_steps
from functional_sgd.tree import paths

WHO = "step_in_backward"
"""Named in errors."""


class InBackward:
    """Parameters that step while `loss.backward()` runs; `step_in_backward` makes one.

    `hyper` is a dict of the hypers that the next steps have; write a schedule's numbers into it.
    """

    def __init__(
        self, opt: Chain, params: Mapping[str, Tensor], hyper: Mapping[str, Hyper]
    ) -> None:
        self.opt, self.hyper = opt, {**opt.hyper, **hyper}
        # In the order of the leaves of a tree, which the steps of a state are in.
        self.params = {name: params[name] for name in paths(dict(params))}
        self._stepper = fuse(opt, donate=True)
        self._states = {n: opt.init({n: leaf.detach()}) for n, leaf in self.params.items()}
        self._hooks = [self._hook(name) for name in self.params]

    def _hook(self, name: str) -> RemovableHandle:
        """What calls the step of a parameter when its gradient is complete."""
        param: Any = self.params[name]  # torch has no types for its method
        hook: RemovableHandle = param.register_post_accumulate_grad_hook(lambda _: self._move(name))
        return hook

    @torch.no_grad()
    def _move(self, name: str) -> None:
        """One step of one parameter, whose gradient is let go."""
        param = self.params[name]
        hyper = _of_param(name, self.hyper)
        leaf, grad = {name: param.detach()}, {name: param.grad}
        param.grad = None
        try:
            moved, self._states[name] = self._stepper(leaf, grad, self._states[name], hyper)
        except Exception:
            param.grad = grad[name]  # of a step that was not taken
            raise
        if not same_place(moved[name], leaf[name]):
            param.copy_(moved[name])

    @property
    def state(self) -> State:
        """The state of all parameters, as `opt.init(params)` would give it: what to save.

        Slots are the tensors themselves, which later steps overwrite.
        """
        entries: State = {STEP: torch.cat([one[STEP] for one in self._states.values()])}
        for slot in self.opt.plan.slots:
            entries[slot] = {name: one[slot][name] for name, one in self._states.items()}
        return entries

    @state.setter
    def state(self, state: State) -> None:
        """Go on from the state of a run that may have been an ordinary one; it is copied.

        It may be of more parameters than step here. Raises ValueError if it does not fit.
        """
        check_state(WHO, state, self.opt.plan.entries)
        slots = self.opt.plan.slots
        states: dict[str, State] = {name: {} for name in self.params}
        for name, own in states.items():
            before = self._states[name]
            for slot in slots:
                own[slot] = {name: _kept(slot, name, state[slot], before[slot][name])}
        # Counts are in the order of the slots: that of the params of the run, which may be more.
        names = paths(state[slots[0]]) if slots else list(self.params)
        check_steps(WHO, state[STEP], len(names))
        for name, own in states.items():
            own[STEP] = self._states[name][STEP].clone().copy_(state[STEP][names.index(name)])
        # Only when all of it was found, so that a state that does not fit changes nothing.
        self._states = states

    def remove(self) -> None:
        """Let backward leave gradients where they are again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def step_in_backward(opt: Optimizer, params: Mapping[str, Tensor], **hyper: Hyper) -> InBackward:
    """Step every parameter during backward, as soon as its gradient is complete, and release that:
    all gradients together never exist, which saves as much memory as the parameters take.

    `params` are tensors that require gradients, by name: `dict(model.named_parameters())`, or some
    of them, if others get another optimizer. `hyper` overrides defaults, with numbers or with
    {name: number}. The loop has no `step` and no `zero_grad`; every backward is a step, so there is
    no accumulation over several. Numbers are those of the same optimizer after backward.

    Only chains in which leaves do not matter to each other can do this. Raises TypeError for
    anything else, and ValueError for chains that need all gradients together (the norm of all), the
    caller's columns or loss, or random numbers, which depend on the place among all leaves, and for
    a hyper that no rule reads, or that has no value for one of the parameters.

    Source: LOMO (Lv et al. 2023); torch's tutorial "optimizer step in backward".

    >>> from functional_sgd import sgd
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.ones_(model.weight)
    >>> running = step_in_backward(sgd(lr=0.1), dict(model.named_parameters()))
    >>> model(torch.tensor([[2.0]])).sum().backward()  # the gradient is 2
    >>> model.weight.item(), model.weight.grad
    (0.800000011920929, None)
    >>> running.hyper["lr"] = 0.05  # of the next step
    """
    opt = opt.opt if isinstance(opt, Fused) else opt
    if not isinstance(opt, Chain):
        raise TypeError(
            f"{WHO}: expected a chain of rules, got {opt!r}. Give each part of a "
            f"partition its own parameters, in a call of its own."
        )
    _check_alone(opt, hyper)
    for name in params:
        own = _of_param(name, hyper)
        collect(WHO, opt.plan.defaults, own, {}, opt.plan.ranges)
    for name, param in params.items():
        if not (param.is_leaf and param.requires_grad):
            raise ValueError(
                f"{WHO}: {name!r} must be a leaf that requires a gradient. Leave it "
                f"out, or call requires_grad_() first."
            )
    return InBackward(opt, params, hyper)


def _kept(slot: str, name: str, values: object, like: Tensor) -> Tensor:
    """A copy of a slot of one parameter, in the dtype and on the device of `like`."""
    cure = "Was it made for other params? opt.init(params) makes one."
    if not isinstance(values, Mapping) or name not in values:
        known = ", ".join(paths(values)) or "nothing"
        raise ValueError(
            f"{WHO}: state[{slot!r}] must have a tensor for {name!r}, got only {known}. {cure}"
        )
    value = values[name]
    found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    if found != like.shape:
        raise ValueError(
            f"{WHO}: state[{slot!r}] of {name!r} must have the shape {tuple(like.shape)}, got "
            f"{found}. {cure}"
        )
    return like.detach().clone().copy_(value.detach())


def _check_alone(opt: Chain, hyper: Mapping[str, Hyper]) -> None:
    """Raise ValueError if a leaf cannot step without the others."""
    together = [rule for rule in opt.rules if rule.needs_tree]
    if together:
        raise ValueError(
            f"{WHO}: {together[0]!r} needs all gradients together, which never exist "
            f"here. Use a rule for each leaf (clip_leaf_norm, clip_value), or step after backward."
        )
    if opt.plan.numbers:
        raise ValueError(
            f"{WHO}: {opt!r} keeps {opt.plan.numbers[0]!r} of the whole tree. Step after backward."
        )
    missing = [name for name in (*opt.plan.given, *opt.required) if name not in hyper]
    if missing:
        raise ValueError(
            f"{WHO}: {opt!r} reads {missing[0]!r} at every step, which backward does "
            f"not have. Give it as a number, or step after backward."
        )


def _of_param(name: str, hyper: Mapping[str, Hyper]) -> dict[str, Any]:
    """The hypers of one parameter. Raises ValueError if one has no value for it."""
    own = {}
    for key, value in hyper.items():
        if isinstance(value, Mapping) and name not in value:
            raise ValueError(
                f"{WHO}: {key!r} has no value for {name!r}, only for "
                f"{', '.join(map(str, value)) or 'nothing'}. Give one number, or one for each "
                f"parameter."
            )
        own[key] = value[name] if isinstance(value, Mapping) else value
    return own
