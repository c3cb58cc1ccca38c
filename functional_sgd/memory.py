"""Where tensors lie in memory."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from functional_sgd.sharded import local

Addresses: TypeAlias = NDArray[np.int64]
"""Where tensors begin, as an array of 64-bit integers."""


def addresses_of(tensors: Sequence[Tensor]) -> Addresses:
    """Where tensors begin. Raises RuntimeError for one that has no one place, such as a sparse
    one.
    """
    return np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))


def memory_of(tensor: Tensor) -> int:
    """What tells the memory of a tensor from any other; 0 for one that has no one place."""
    tensor = local(tensor)
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else 0


def same_place(one: Tensor, other: Tensor) -> bool:
    """Whether one is surely the other, or a view of it that begins there; of DTensors this
    process's pieces are compared.

    >>> same_place(torch.zeros(1), torch.zeros(1))
    False
    """
    one, other = local(one), local(other)
    # 0 is where tensors begin that have no memory of their own: those of some classes.
    return one is other or one.data_ptr() == other.data_ptr() != 0
