"""An optimizer as a torch.optim.Optimizer, for code that expects one."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from functional_sgd.errors import did_you_mean
from functional_sgd.fusion.fused import donating
from functional_sgd.optimizer import Optimizer, check_optimizer
from functional_sgd.state import State
from functional_sgd.tree import flatten, paths, unflatten

STATE = "functional_sgd"
"""Where the state is, in `optimizer.state` and in the state_dict."""

_TORCH_NAMES = {
    "momentum": "mom",
    "betas": "mom and sqr_mom",
    "alpha": "sqr_mom",
    "weight_decay": "wd",
}


_OURS: dict[str, tuple[str, ...]] = {"betas": ("mom", "sqr_mom"), "momentum": ("mom",)}


class TorchOptimizer(torch.optim.Optimizer):
    """A torch.optim.Optimizer that steps with an optimizer of ours; `to_torch` makes one.

    `optimizer.state["functional_sgd"]` is the state, with slots by the names of the parameters, or
    by their numbers if they were given without names.
    """

    def __init__(self, opt: Optimizer, params: Any, hyper: Mapping[str, Any]) -> None:
        check_optimizer("to_torch", opt)
        self.opt, self.stepper = opt, donating(opt)
        for name in hyper:
            self._check_name(name)
        defaults = {**opt.hyper, **hyper}
        self._known_aliases: dict[int, dict[str, Any]] = {}
        super().__init__(params, {**defaults, **aliases_of(defaults)})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, **extras: Any) -> Any:
        """One step along the gradients in the parameters, which are overwritten; the closure's
        loss, if there is one.

        A parameter without a gradient is left alone. `extras` are what some rules read besides.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        named = self.named_params()
        leaves = {name: param.detach() for name, param in named.items()}
        grads = {
            name: None if param.grad is None else param.grad.detach()
            for name, param in named.items()
        }
        if STATE not in self._entries:
            self._keep(self.opt.init(leaves))
        moved, state = self.stepper(leaves, grads, self._entries[STATE], self.hyper(), **extras)
        self._keep(state)
        for name, param in named.items():
            if moved[name].data_ptr() != param.data_ptr():
                param.copy_(moved[name])
        return loss

    def named_params(self) -> dict[str, Tensor]:
        """The parameters of all groups by name. Raises ValueError if two have the same."""
        every = [param for group in self.param_groups for param in group["params"]]
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        named = dict(zip(names or map(str, range(len(every))), every, strict=True))
        if len(named) < len(every):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"to_torch: two parameters have the name {twice!r}.")
        return named

    def hyper(self) -> dict[str, Any]:
        """The hypers of the next step: one value, or a value for each parameter where the groups
        differ.
        """
        for number, group in enumerate(self.param_groups):
            self._follow_aliases(number, group)
        found: dict[str, Any] = {}
        names = self.opt.names
        for name in dict.fromkeys(
            name for group in self.param_groups for name in group if name in names
        ):
            values = []
            for number, group in enumerate(self.param_groups):
                if name not in group:
                    raise ValueError(
                        f"to_torch: group {number} has no {name!r}, which other groups have. Give "
                        f"it one."
                    )
                values += [group[name]] * len(group["params"])
            shared = all(value is values[0] or _same_number(value, values[0]) for value in values)
            found[name] = (
                values[0]
                if shared and values
                else dict(zip(self.named_params(), values, strict=True))
            )
        return found

    def _follow_aliases(self, number: int, group: dict[str, Any]) -> None:
        """Keep torch's names in a group, and ours, the same: whichever was written last counts.

        Torch's schedulers of momentum (OneCycleLR, CyclicLR) write "betas" or "momentum".
        """
        for name, before in self._known_aliases[number].items():
            given = group.get(name, before)
            if given != before:
                given = given if isinstance(given, tuple) else (given,)
                group.update(zip(_OURS[name], given, strict=True))
        self._known_aliases[number] = aliases_of(group)
        group.update(self._known_aliases[number])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters; what is kept of the others stays."""
        for name in param_group:
            if name in _TORCH_NAMES:
                self._check_name(name)
        known = list(self.named_params())
        super().add_param_group(param_group)
        number = len(self.param_groups) - 1
        self._known_aliases[number] = aliases_of(self.param_groups[number])
        if STATE in self._entries:
            params = {name: param.detach() for name, param in self.named_params().items()}
            before = {name: params[name] for name in known}
            self._keep(self.opt.extend(self._entries[STATE], before, params))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict()` returned. Raises ValueError if it is of another optimizer,
        and changes nothing then.
        """
        before = {"state": self.state, "param_groups": self.param_groups}
        super().load_state_dict(state_dict)
        try:
            if STATE in self._entries:
                self._keep(_fitted(self._entries[STATE], self._fresh_state()))
            elif self.state:
                raise ValueError(
                    "to_torch: the state dict is of an optimizer of torch. from_torch takes its "
                    "state over by name."
                )
        except ValueError:
            self.__setstate__(before)
            raise

    def __getstate__(self) -> dict[str, Any]:
        own = {"opt": self.opt, "stepper": self.stepper, "_known_aliases": self._known_aliases}
        return {**super().__getstate__(), **own}

    def __repr__(self) -> str:
        return f"to_torch({self.opt!r}): {super().__repr__()}"

    @property
    def _entries(self) -> dict[Any, Any]:
        """What torch keeps, under any key: those that are no parameters are saved and loaded as
        they are.
        """
        return self.state

    def _keep(self, state: State) -> None:
        self._entries[STATE] = state

    def _fresh_state(self) -> State:
        return self.opt.init({name: param.detach() for name, param in self.named_params().items()})

    def _check_name(self, name: str) -> None:
        if name not in self.opt.names:
            hint = f"{name!r} is called {_TORCH_NAMES[name]} here. " if name in _TORCH_NAMES else ""
            raise ValueError(
                f"to_torch: no rule reads {name!r}. {hint}{did_you_mean(name, self.opt.names)}"
            )


def to_torch(opt: Optimizer, params: Iterable[Any], **hyper: Any) -> TorchOptimizer:
    """The optimizer as a torch.optim.Optimizer, which steps in place: for torch's schedulers,
    GradScaler and trainers.

    `params` are parameters, (name, parameter) pairs as module.named_parameters() gives them, or
    dicts with "params" and own hypers: param groups, as in torch.optim. `hyper` are defaults that
    win over those of `opt`. Each group has every hyper under our name ("lr", "mom", "wd"), and what
    is written there counts at the next step. All groups are stepped together, so clip_norm sees all
    parameters. With names, path patterns (partition) match them.

    The values are those of `opt` on a dict of the parameters, which it overwrites, so it is fused
    and donates by itself. Momenta are also found under torch's names ("betas", "momentum"), which
    OneCycleLR and CyclicLR write to. Raises ValueError for a hyper that no rule reads.

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


def aliases_of(hypers: Mapping[str, Any]) -> dict[str, Any]:
    """The momenta among some hypers under torch's names: "betas", or "momentum"."""
    for name, ours in _OURS.items():
        if all(own in hypers for own in ours):
            values = tuple(hypers[own] for own in ours)
            return {name: values if len(ours) > 1 else values[0]}
    return {}


def _fitted(state: Any, like: State) -> State:
    """A copy of the state on the devices of `like`. Raises ValueError if the two are built
    differently.
    """
    leaves, found = flatten(state)
    wanted, spec = flatten(like)
    if found != spec or any(
        leaf.shape != other.shape for leaf, other in zip(leaves, wanted, strict=True)
    ):
        missing = next(iter(sorted({*paths(like)} ^ {*paths(state)})), "a shape")
        raise ValueError(
            f"to_torch: the state dict does not fit: {missing!r} differs. "
            f"Load it into the same optimizer, with the same parameters and names."
        )
    pairs = zip(leaves, wanted, strict=True)
    fitted: State = unflatten(
        spec, [leaf.to(other.device, other.dtype, copy=True) for leaf, other in pairs]
    )
    return fitted


def _same_number(one: Any, other: Any) -> bool:
    return isinstance(one, (int, float)) and isinstance(other, (int, float)) and one == other
