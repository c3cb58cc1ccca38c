"""Whether a derivative may go through a step: kernels have none."""

from typing import Any

import torch
from torch import Tensor

from functional_sgd.call import Leaves
from functional_sgd.guard import Guard


class Tracked(Exception):
    """A rule that torch runs has made something that is tracked, of tensors that it closes over."""


def is_differentiated(leaves: Leaves, guard: Guard | None, donate: bool) -> bool:
    """Whether somebody may differentiate through the step.

    A donated step overwrites its arguments, so it has no derivative: tracked params are trained
    where they are, if they are leaves of the autograd graph, and nothing else may be tracked.
    """
    # Forward-mode tangents do not show in requires_grad.
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    values: list[Any] = [*leaves.shared.values(), *leaves.numbers.values()]
    for column in (*leaves.separate.values(), *leaves.given.values()):
        values += column
    params: list[Tensor] = []
    # Trees that the guard recognises have the same requires_grad as its own.
    if not (leaves.matches_guard and guard is not None and not guard.tracked):
        params = list(filter(_is_tracked, leaves.params))
        values += leaves.grads
        for slot in leaves.slots.values():
            values += slot
    tracked = any(map(_is_tracked, values))
    if donate and (tracked or not all(param.is_leaf for param in params)):
        raise ValueError(
            "fuse: a donated step overwrites its arguments, so no derivative can go through it, "
            "but hypers, gradients or state are tracked, or params were computed from tracked "
            "tensors. Detach them, or fuse without donate."
        )
    return not donate and (tracked or bool(params))


def _is_tracked(value: Any) -> bool:
    return getattr(value, "requires_grad", False)
