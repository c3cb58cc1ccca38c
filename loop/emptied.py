"""Models whose parameters were given to a state, and get others back by `Learner.load`."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from functional_sgd.fusion.spent import SPENDER, give_up
from functional_sgd.placing import is_at_work
from loop.state import Tensors


class Refusal:
    """Hooks of a model without parameters, which refuse to let them be used. A copy of the model
    has a copy of it: it knows the parameters of that one.
    """

    def __init__(self, module: nn.Module) -> None:
        self.own = list(module.parameters())

    def call(self, module: nn.Module, args: object) -> None:
        """Refuse a call, unless others are in place, as in a run."""
        first = next(module.parameters(), None)
        if first is not None and first is self.own[0]:
            raise _refused(module, "called")

    def state_dict(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        """Refuse to be saved."""
        raise _refused(module, "asked for its state_dict")


def _refusals(module: nn.Module) -> Iterator[tuple[dict[int, Callable[..., object]], int]]:
    """Where such hooks are: a dict of hooks, and the key in it."""
    for layer in module.modules():
        for hooks in (layer._forward_pre_hooks, layer._state_dict_pre_hooks):
            for key, hook in [*hooks.items()]:
                if isinstance(getattr(hook, "__self__", None), Refusal):
                    yield hooks, key


def taken_from(module: nn.Module) -> tuple[Tensors, Tensors]:
    """What `split` gives, with the module's own parameters in place of copies.

    The module is left with NaN. Calling it, or asking for its state_dict, is an error from here on.
    """
    params: Tensors = {}
    frozen: Tensors = {}
    for name, own in module.named_parameters():
        group = params if own.requires_grad else frozen
        group[name] = own.detach()
        give_up(own, "Learner.init(donate=True)")
    anything: Any = module  # whose registering of the second hook has no types
    refusal = Refusal(module)
    module.register_forward_pre_hook(refusal.call)
    anything.register_state_dict_pre_hook(refusal.state_dict)
    buffers = {name: own.detach().clone() for name, own in module.named_buffers()}
    return params, {**frozen, **buffers}


def check_filled(module: nn.Module) -> None:
    """Raise ValueError for a model without parameters, or a copy of one; and RuntimeError for one
    in which a run has put others, which would pass for its first weights.
    """
    if is_at_work(module):
        raise RuntimeError(
            f"Learner.init: expected a {type(module).__name__} with tensors of its own, got one at "
            f"work: a batch has put those of its state in their places. Call init before the run, "
            f"and give the state to the callback."
        )
    if any(_refusals(module)):
        raise ValueError(
            f"Learner.init: the parameters of this {type(module).__name__} were taken by an "
            f"earlier init(donate=True). Give it those of a state first: learner.load(state)."
        )


def fill(
    module: nn.Module, given: Mapping[str, Tensor], own: Mapping[str, Tensor], alias: bool
) -> None:
    """Copy tensors into those of a module, which has parameters from here on; or with `alias`, let
    them be the same memory.
    """
    without = [*_refusals(module)]
    for name, value in given.items():
        here = own[name]
        if without:
            vars(here).pop(SPENDER, None)
        if alias and value.device == here.device and value.dtype == here.dtype:
            here.data = value
        # A parameter that was given up is a single NaN, expanded: nothing can be copied into it.
        elif without and isinstance(here, nn.Parameter):
            here.data = value.to(here.device, here.dtype, copy=True)
        else:
            here.copy_(value)
    for hooks, place in without:
        del hooks[place]


def _refused(module: nn.Module, what: str) -> RuntimeError:
    return RuntimeError(
        f"{type(module).__name__} was {what}, but its parameters were taken by "
        f"Learner.init(donate=True). Give it those of a state: learner.load(state)."
    )
