"""Where code is running: on tensors with memory, or inside a transform or a compiler."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


def transformed() -> bool:
    """Whether tensors may be stand-ins: under torch.func transforms (vmap, grad, ...) or in
    torch.compile.

    >>> transformed(), torch.func.vmap(lambda x: x + transformed())(torch.zeros(2))
    (False, tensor([1., 1.]))
    """
    compiling: bool = torch.compiler.is_compiling()
    return compiling or torch._C._functorch.maybe_current_level() is not None


def recorded() -> bool:
    """Whether operations are written down, or done on stand-ins: `transformed`, or in a mode such
    as make_fx's.
    """
    return transformed() or torch._C._len_torch_dispatch_stack() > 0


def followed(values: Iterable[Any]) -> bool:
    """Whether what is done with these tensors is written down: `recorded`, or tracked by autograd.

    >>> followed([torch.zeros(1)]), followed([torch.zeros(1, requires_grad=True)])
    (False, True)
    """
    # Forward-mode derivatives do not show in requires_grad.
    if recorded() or torch.autograd.forward_ad._current_level >= 0:
        return True
    tensors = (value for value in values if isinstance(value, torch.Tensor))
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def known(condition: torch.Tensor, involved: Callable[[], Iterable[Any]] = tuple) -> bool | None:
    """What a 0-d condition says, if a branch may be taken: on the CPU, and not while a program is
    recorded.

    Nor if derivatives by any of what `involved()` gives are tracked, which must be there on either
    branch.

    >>> mapped = torch.vmap(lambda x: x if known(x > 0) is None else -x)
    >>> known(torch.tensor(True)), mapped(torch.ones(1))
    (True, tensor([1.]))
    """
    if recorded() or condition.device.type != "cpu":
        return None
    tracked = any(value.requires_grad for value in involved() if isinstance(value, torch.Tensor))
    return None if tracked else bool(condition)


def known_for_all(condition: torch.Tensor) -> bool | None:
    """What a condition says, if a branch may be taken: on the CPU, where it is the same for all
    members of a batch, and not while a program is recorded.

    `known` does not look into batches. A rule that torch.vmap maps over matrices of one
    shape has a step for each of them, but mostly these are the same.

    >>> torch.vmap(lambda step: step + known_for_all(step > 1))(torch.tensor([2, 3]))
    tensor([3, 4])
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return None
    while torch._C._functorch.is_functorch_wrapped_tensor(condition):
        condition = torch._C._functorch.get_unwrapped(condition)
    if condition.device.type != "cpu":
        return None
    with torch._C._DisableFuncTorch():
        says = set(condition.reshape(-1).tolist())
    return says.pop() if len(says) == 1 else None
