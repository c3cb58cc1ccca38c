"""Complex leaves, which rules and slots have as real ones with a last axis of 2."""

import torch
from torch import Tensor


def as_real(leaf: Tensor) -> Tensor:
    """A complex tensor as pairs of reals, in the same memory, but for a conjugate that torch has
    put off; a real one as it is.

    >>> as_real(torch.tensor([1 + 2j]))
    tensor([[1., 2.]])
    """
    # A conjugate that is put off is not in memory; others come back as they are.
    return torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf


def as_complex(pairs: Tensor, like: Tensor) -> Tensor:
    """Pairs of reals as complex numbers, if `like` is complex; else the tensor as it is.

    >>> as_complex(torch.tensor([[1.0, 2.0]]), like=torch.tensor([0j]))
    tensor([1.+2.j])
    """
    return torch.view_as_complex(pairs) if like.is_complex() else pairs
