"""Where tensors lie in memory."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from functional_sgd.sharded import local

Addresses: TypeAlias = NDArray[Any]
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
