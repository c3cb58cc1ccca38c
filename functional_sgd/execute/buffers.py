"""Memory for results: one flat buffer for a column of all leaves, used again once the caller has dropped it."""

from collections.abc import Sequence

import torch
from torch import Tensor

_KEPT = 2  # buffers remembered for a column: the caller holds the last result while the next is computed


class Pool:
    """Flat buffers by name. A buffer whose tensors are all gone is handed out again, which saves its page faults."""

    def __init__(self) -> None:
        self._buffers: dict[str, list[Tensor]] = {}

    def take(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        """A flat CPU buffer that nobody else uses; what is in it is left over."""
        known = self._buffers.setdefault(name, [])
        for index, buffer in enumerate(known):
            if buffer.numel() == numel and buffer.dtype == dtype and _unused(buffer):
                known.append(known.pop(index))
                return buffer
        buffer = torch.empty(numel, dtype=dtype)
        known.append(buffer)
        del known[:-_KEPT]
        return buffer


def views(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The buffer, cut into tensors of these shapes."""
    return list(torch._C._nn.unflatten_dense_tensors(buffer, list(like)))


def _unused(buffer: Tensor) -> bool:
    return _users(buffer) == _ALONE


def _users(buffer: Tensor) -> int:
    """How many tensors and other owners share the memory."""
    return int(torch._C._storage_Use_Count(buffer.untyped_storage()._cdata))


_ALONE = _users(torch.empty(1))
