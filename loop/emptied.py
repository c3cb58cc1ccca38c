"""Models whose parameters were given to a state, and get others back by `Learner.load`."""

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from functional_sgd.fusion.spent import SPENDER, give_up, spender_of
from loop.state import Tensors

_WITHOUT: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()
"""Models without parameters, and what refuses to let them be used."""


def taken_from(module: nn.Module) -> tuple[Tensors, Tensors]:
    """What `split` gives, with the module's own parameters in place of copies.

    The module is left with NaN. Calling it, or asking for its state_dict, is an error from here on.
    """
    params: Tensors = {}
    frozen: Tensors = {}
    for name, own in module.named_parameters():
        (params if own.requires_grad else frozen)[name] = own.detach()
        give_up(own, "Learner.init(donate=True)")
    anything: Any = module  # whose registering of the second hook has no types
    _WITHOUT[module] = [
        module.register_forward_pre_hook(_refuse_call),
        anything.register_state_dict_pre_hook(_refuse_state_dict),
    ]
    buffers = {name: own.detach().clone() for name, own in module.named_buffers()}
    return params, {**frozen, **buffers}


def check_filled(module: nn.Module) -> None:
    """Raise ValueError for a model without parameters."""
    if module in _WITHOUT:
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
    without = _WITHOUT.pop(module, [])
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
    for handle in without:
        handle.remove()


def _refuse_call(module: nn.Module, args: Any) -> None:
    if spender_of(next(module.parameters(), None)):  # in a run, others are in place
        raise _refused(module, "called")


def _refuse_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise _refused(module, "asked for its state_dict")


def _refused(module: nn.Module, what: str) -> RuntimeError:
    return RuntimeError(
        f"{type(module).__name__} was {what}, but its parameters were taken by "
        f"Learner.init(donate=True). Give it those of a state: learner.load(state)."
    )
