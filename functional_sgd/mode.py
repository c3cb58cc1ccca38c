"""Where code is running: on tensors with memory, or inside a transform or a compiler."""

import torch


def transformed() -> bool:
    """Whether tensors may be stand-ins: under torch.func transforms (vmap, grad, ...) or in torch.compile.

    >>> transformed(), torch.func.vmap(lambda x: x + transformed())(torch.zeros(2))
    (False, tensor([1., 1.]))
    """
    compiling: bool = torch.compiler.is_compiling()
    return compiling or torch._C._functorch.maybe_current_level() is not None
