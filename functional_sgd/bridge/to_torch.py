"""An optimizer as a torch.optim.Optimizer, for code that expects one."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from functional_sgd.bridge.slots import Slots, detached, named_in
from functional_sgd.errors import NAMES_ELSEWHERE, did_you_mean
from functional_sgd.fusion.fused import donating
from functional_sgd.hyper import Hyper, is_replaced, wider_names, with_hypers
from functional_sgd.memory import same_place
from functional_sgd.optimizer import Optimizer, check_optimizer
from functional_sgd.ranges import check_number
from functional_sgd.state import State

_OURS = {name: NAMES_ELSEWHERE[name] for name in ("betas", "momentum", "weight_decay")}


_OF_TORCH = ("params", "param_names")
"""What every group has besides hypers."""


@dataclass(frozen=True, eq=False)
class Saved:
    """What was saved of a parameter, as something that torch hands on without a look inside.

    It would round everything to the dtype of the parameter, and slots of half-precision ones are
    float32.
    """

    own: Mapping[str, object]


class Group(dict[str, Any]):
    """A param group without an "lr", which says so to torch's schedulers."""

    def __missing__(self, name: str) -> Any:
        parts = [repr(other) for other in self if other.endswith(f".{name}")]
        if parts:
            cure = (
                f"the parts have {', '.join(parts)}. Write to these, or give all parts one: "
                f"to_torch(opt, params, {name}=...)."
            )
        else:
            cure = (
                f"there are {', '.join(map(repr, self))}. If scheduled(opt, {name}=...) sets it, "
                f"leave that or the other scheduler out."
            )
        raise KeyError(f"to_torch: expected a group with {name!r}, but {cure}")


class TorchOptimizer(torch.optim.Optimizer):
    """A torch.optim.Optimizer that steps with an optimizer of ours; `to_torch` makes one.

    `optimizer.state[param]` has the slots of a parameter by their names ("step", "grad_avg"), and
    numbers of the whole tree; what is written to them in place counts. `optimizer.opt_state` is the
    same state as `opt` sees it, with slots by the names of the parameters, or by their numbers if
    they were given without names.
    """

    def __init__(self, opt: Optimizer, params: Iterable[Any], hyper: Mapping[str, Hyper]) -> None:
        check_optimizer("to_torch", opt)
        self.opt, self.stepper = opt, donating(opt)
        for name, value in hyper.items():
            self._check_name(name)
            check_number("to_torch", name, value)
        if isinstance(params, torch.nn.Module):
            raise TypeError(
                "to_torch: expected parameters, got a module. Pass module.named_parameters()."
            )
        defaults = with_hypers(opt.hyper, hyper)
        # torch's __init__ calls add_param_group, which needs both.
        self._known_aliases: dict[int, dict[str, Hyper]] = {}
        self._slots = Slots(opt, [])
        super().__init__(params, {**defaults, **aliases_of(defaults)})
        # torch's __init__ has made a list of groups and a state of its own.
        self._slots.regroup(self.param_groups, None)
        self._show(self._slots)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, **extras: Any) -> Any:
        """One step along the gradients in the parameters, which are overwritten; the closure's
        loss, if there is one.

        A parameter without a gradient is left alone. `extras` are what some rules read besides;
        those that read the loss (`value`: polyak_sgd, momo) get that of the closure, unless it is
        given. For `sam` the closure is called twice, the second time at the perturbed params, and
        must clear the gradients first. Raises ValueError if there is none for it, or no loss.
        """
        if closure is None and self.opt.perturbs:
            raise ValueError(
                f"to_torch: {self.opt!r} takes the gradient a second time, at other params, which "
                f"needs a closure; got none. Pass step(closure), a function that clears the "
                f"gradients, computes the loss, calls backward and returns the loss."
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.state is not self._slots:  # somebody has put other state there
            self._slots.adopt(self.param_groups, self.state)
            self._show(self._slots)
        named = self.named_params()
        leaves = detached(named)
        before, hyper = self._slots.state_for(leaves), self.hyper()
        if "value" in self.opt.names:
            hyper, extras = self._with_value(hyper, extras, loss)
        grads = _grads(named)
        if closure is not None and self.opt.perturbs:
            there = self.opt.perturb(leaves, grads, before, hyper)
            grads = _grads_at(there, named, closure)
        moved, state = self.stepper(leaves, grads, before, hyper, **extras)
        self._slots.keep(state)
        for name, param in named.items():
            # Optimizers that cannot donate return new tensors.
            if not same_place(moved[name], leaves[name]):
                param.copy_(moved[name])
        return loss

    def _with_value(
        self, hyper: dict[str, Hyper], extras: dict[str, Any], loss: Any
    ) -> tuple[dict[str, Hyper], dict[str, Any]]:
        """Hypers and extras, with the loss of the closure if none is given."""
        if "value" not in extras and loss is not None:
            extras = {**extras, "value": loss.detach() if isinstance(loss, Tensor) else loss}
        if "value" in extras:  # it wins over a number in the groups
            hyper = {name: value for name, value in hyper.items() if name != "value"}
        elif "value" not in hyper and "value" in self.opt.required:
            raise ValueError(
                f"to_torch: {self.opt!r} reads 'value', the loss, which only its caller knows; got "
                f"none. Pass step(value=loss), or step(closure), a function that clears the "
                f"gradients, computes the loss, calls backward and returns the loss."
            )
        return hyper, extras

    def named_params(self) -> dict[str, Tensor]:
        """The parameters of all groups by name. Raises ValueError if two have the same."""
        return self._slots.named()

    @property
    def opt_state(self) -> State:
        """The state of `opt`: `opt.init(named_params())` before the first step.

        A state that is assigned is copied: that of `from_torch`, say. ValueError if it does not
        fit.
        """
        return self._slots.whole()

    @opt_state.setter
    def opt_state(self, state: State) -> None:
        self._slots.put(state)

    def hyper(self) -> dict[str, Hyper]:
        """The hypers of the next step: one value, or a value for each parameter where the groups
        differ.
        """
        for number, group in enumerate(self.param_groups):
            self._follow_aliases(number, group)
        found: dict[str, Hyper] = {}
        known = self.opt.names
        in_groups: dict[str, None] = {}  # a set that keeps its order
        for group in self.param_groups:
            in_groups |= dict.fromkeys(group)
        for name in in_groups:
            if name not in known:
                continue
            # The hypers of parts stand for "lr" where only some groups have one for all parts.
            in_all = all(name in group for group in self.param_groups)
            if not in_all and any(is_replaced(other, (name,)) for other in in_groups):
                continue
            values = []
            for number, group in enumerate(self.param_groups):
                values += [self._value(name, number, group)] * len(group["params"])
            # Tensors are compared by identity, since their values may be on a device.
            shared = all(value is values[0] or _same_number(value, values[0]) for value in values)
            if shared and values:
                found[name] = values[0]
            else:
                found[name] = dict(zip(self.named_params(), values, strict=True))
        return found

    def _value(self, name: str, number: int, group: Mapping[str, Any]) -> Hyper:
        """A hyper of a group. Raises ValueError if it has none."""
        default = self.opt.hyper.get(name)
        # "lr" in a group is for all parts of a partition: it wins over "body.lr" unless somebody
        # has set that too.
        own = group.get(name, default)
        if own is default or _same_number(own, default):
            for wider in wider_names(name):
                if wider in group and wider not in self.opt.hyper:
                    return group[wider]
        if name not in group:
            raise ValueError(
                f"to_torch: group {number} has no {name!r}, which other groups have. Give it one."
            )
        return group[name]

    def _follow_aliases(self, number: int, group: dict[str, Any]) -> None:
        """Keep torch's names in a group, and ours, the same: whichever was written last counts.

        Torch's schedulers of momentum (OneCycleLR, CyclicLR) write "betas" or "momentum", and
        schedules of weight decay "weight_decay".
        """
        for name, before in self._known_aliases[number].items():
            given = group.get(name, before)
            if given != before:
                each = tuple(given) if isinstance(given, (tuple, list)) else (given,)
                if len(each) != len(_OURS[name]):
                    raise ValueError(
                        f"to_torch: {name!r} of group {number} must have a number for each of "
                        f"{' and '.join(_OURS[name])}, got {given!r}. Write as many, or "
                        f"group[{_OURS[name][0]!r}]."
                    )
                group.update(zip(_OURS[name], each, strict=True))
        self._known_aliases[number] = aliases_of(group)
        group.update(self._known_aliases[number])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters; what is kept of the others stays."""
        # A group may have entries of others (a scheduler's initial_lr), so only names are refused
        # that hypers have elsewhere, and those that look like a slip of the pen.
        others = set(NAMES_ELSEWHERE) - self.opt.names
        known = {*self.opt.names, *others, *_OF_TORCH}
        for name in param_group:
            slip = name not in known and difflib.get_close_matches(name, known, cutoff=0.8)
            if name in others or slip:
                self._check_name(name)
        before = self.named_params() if self._slots.tree is not None else None
        super().add_param_group(param_group)
        self.param_groups[-1] = _with_hint(self.param_groups[-1])
        number, group = len(self.param_groups) - 1, self.param_groups[-1]
        try:
            new = named_in(self.param_groups)
            if before is not None:
                old = detached(before)
                state = self.opt.extend(self._slots.state_for(old), old, detached(new))
                self._slots.regroup(self.param_groups, state)
        except Exception:
            self.param_groups.pop()  # or every later step would fail
            raise
        self._known_aliases[number] = aliases_of(group)
        # torch has filled in its names from the defaults, which the group's own momenta outdo.
        group.update(self._known_aliases[number])

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's: {"state": {number: {slot: tensor}}, "param_groups": [...]}."""
        # What is loaded must not show two momenta, of which nobody knows which was written last.
        for number, group in enumerate(self.param_groups):
            self._follow_aliases(number, group)
        packed = super().state_dict()
        # Plain dicts, so that what is saved does not depend on this optimizer.
        plain = {number: dict(own) for number, own in packed["state"].items()}
        return {**packed, "state": plain}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict()` returned. Raises ValueError if it is of another optimizer,
        and changes nothing then.

        Parameters are matched by their place, as in torch.optim; those of which nothing was saved
        begin afresh.
        """
        hook = self.register_load_state_dict_pre_hook(_unseen)  # after those of others
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        own = {"opt": self.opt, "stepper": self.stepper, "_known_aliases": self._known_aliases}
        # Pickling should not create a state that nobody has used.
        state = {}
        if self._slots.tree is not None:
            state = {param: dict(kept) for param, kept in self.state.items()}
        return {**super().__getstate__(), **own, "state": state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what was pickled, or what torch has made of a loaded state dict."""
        given = dict(state)
        groups, saved = list(map(_with_hint, given["param_groups"])), given.pop("state")
        given["param_groups"] = groups
        # Missing when unpickling, present when a state dict is loaded.
        if "_slots" not in self.__dict__:
            self._slots = Slots(given["opt"], groups)
        self._slots.adopt(groups, _opened(saved))
        super().__setstate__({**given, "state": self._slots})

    def __repr__(self) -> str:
        return f"to_torch({self.opt!r}): {super().__repr__()}"

    def _show(self, slots: Any) -> None:  # torch has declared a defaultdict
        """Let torch find the slots where it looks for what is kept of a parameter."""
        self.state = slots

    def _check_name(self, name: str) -> None:
        if name not in self.opt.names:
            raise ValueError(
                f"to_torch: no rule reads {name!r}. {did_you_mean(name, self.opt.names)}"
            )


def to_torch(opt: Optimizer, params: Iterable[Any], **hyper: Hyper) -> TorchOptimizer:
    """The optimizer as a torch.optim.Optimizer, which steps in place: for torch's schedulers,
    GradScaler and trainers.

    `params` are parameters, (name, parameter) pairs as module.named_parameters() gives them, or
    dicts with "params" and own hypers: param groups, as in torch.optim. `hyper` are defaults that
    win over those of `opt`. Each group has every hyper under our name ("lr", "mom", "wd"), and what
    is written there counts at the next step. All groups are stepped together, so clip_norm sees all
    parameters. With names, path patterns (partition) match them.

    The values are those of `opt` on a dict of the parameters, which it overwrites, so it is fused
    and donates by itself. `optimizer.state[param]` has the slots of a parameter, as in torch.optim.
    Momenta and the weight decay are also found under torch's names ("betas", "momentum",
    "weight_decay"), which OneCycleLR, CyclicLR and the schedules of others write to. For `sam`,
    `step` wants a closure. Raises ValueError for a
    hyper that no rule reads.

    >>> import torch
    >>> from functional_sgd import sgd
    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = to_torch(sgd(), [weight], lr=0.5)
    >>> (3 * weight).sum().backward()
    >>> optimizer.step()
    >>> weight.data
    tensor([-0.5000])
    """
    return TorchOptimizer(opt, params, hyper)


def aliases_of(hypers: Mapping[str, Hyper]) -> dict[str, Hyper]:
    """Some hypers under torch's names: "betas", or "momentum"; and "weight_decay"."""
    found: dict[str, Hyper] = {}
    for name, ours in _OURS.items():
        if name == "momentum" and "betas" in found:
            continue
        if all(own in hypers for own in ours):
            values = tuple(hypers[own] for own in ours)
            found[name] = values if len(ours) > 1 else values[0]
    return found


def _with_hint(group: dict[str, Any]) -> dict[str, Any]:
    """The group itself, as torch.optim keeps the one that it was given; another without an lr."""
    return group if "lr" in group else Group(group)


def _unseen(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict, with what was saved of each parameter as one thing."""
    unseen = {number: Saved(own) for number, own in state_dict["state"].items()}
    return {**state_dict, "state": unseen}


def _opened(saved: Mapping[object, Any]) -> dict[Tensor, Mapping[str, object]]:
    """What was saved, by parameter. Raises ValueError for what is of no parameter."""
    found: dict[Tensor, Mapping[str, object]] = {}
    for param, own in saved.items():
        if not isinstance(param, Tensor):
            raise ValueError(
                f"to_torch: the state dict does not fit: expected what is kept of each parameter, "
                f"by its number, got {param!r}. Was it saved by an earlier version, or for more "
                f"parameters? Make it again with state_dict()."
            )
        found[param] = own.own if isinstance(own, Saved) else own
    return found


def _grads(named: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    found: dict[str, Tensor | None] = {}
    for name, param in named.items():
        found[name] = None if param.grad is None else param.grad.detach()
    return found


def _grads_at(
    there: Mapping[str, Tensor], named: Mapping[str, Tensor], closure: Callable[[], object]
) -> dict[str, Tensor | None]:
    """The gradients that the closure makes at other values of the parameters, which are put
    back.
    """
    before = {name: param.detach().clone() for name, param in named.items()}
    try:
        for name, param in named.items():
            param.copy_(there[name])
        with torch.enable_grad():
            closure()
    finally:
        for name, param in named.items():
            param.copy_(before[name])
    return _grads(named)


def _same_number(one: object, other: object) -> bool:
    return isinstance(one, (int, float)) and isinstance(other, (int, float)) and one == other
