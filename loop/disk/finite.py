"""Whether what was learned is worth keeping."""

from collections.abc import Mapping

import torch
from torch import Tensor


def not_finite(params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> str:
    """What is not finite, in words: the first param with NaN or inf in it, or buffer with NaN (inf
    is what masks are made of); nothing if all are.

    >>> not_finite({"weight": torch.tensor([1.0, torch.nan])}, {})
    "params['weight']"
    """
    for name, value in params.items():
        if not torch.isfinite(_numbers(value)).all():
            return f"params[{name!r}]"
    for name, value in buffers.items():
        if torch.isnan(_numbers(value)).any():
            return f"buffers[{name!r}]"
    return ""


def _numbers(tensor: Tensor) -> Tensor:
    """A tensor of which it can be asked: not every operator knows numbers of 8 bits."""
    small = tensor.is_floating_point() and tensor.itemsize == 1
    return tensor.detach().float() if small else tensor.detach()
