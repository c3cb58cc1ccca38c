"""Memory for results: large leaves share a flat buffer, which is used again once the caller has
dropped it.
"""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

LARGE = (
    16_384  # elements: from here on, the page faults of fresh memory cost more than making views
)

_KEPT = 2  # buffers remembered for a column: the caller holds the last result while the next is computed


class Pool:
    """Flat buffers by name. A buffer whose tensors are all gone is handed out again, which saves
    its page faults.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, list[Tensor]] = {}

    def take(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        """A flat CPU buffer that nobody else uses; what is in it is left over."""
        known = self._buffers.setdefault(name, [])
        for index, buffer in enumerate(known):
            if buffer.numel() == numel and buffer.dtype == dtype and _users(buffer) == _ALONE:
                known.append(known.pop(index))
                return buffer
        buffer = torch.empty(numel, dtype=dtype, device="cpu")
        known.append(buffer)
        del known[:-_KEPT]
        return buffer


def results(
    pool: Pool, name: str, like: Sequence[Tensor], large: bool, dtype: torch.dtype
) -> list[Tensor]:
    """Contiguous CPU tensors of these shapes to write into, some of them large; what is in them is
    left over.
    """
    with _outside_inference():
        if not large and like[0].dtype == dtype:
            return list(
                map(torch.empty_like, like)
            )  # without further arguments, torch takes half as long
        shapes = [tensor.shape for tensor in like if tensor.numel() >= LARGE]
        pieces = iter(views(pool.take(name, sum(shape.numel() for shape in shapes), dtype), shapes))
        return [
            next(pieces) if one.numel() >= LARGE else torch.empty_like(one, dtype=dtype)
            for one in like
        ]


def apart(like: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Tensors of these shapes in one new buffer on their GPU, each beginning at a multiple of 16
    elements.

    Torch's allocator hands out a GPU's memory again by itself, and knows when it may.
    """
    sizes = [tensor.numel() for tensor in like]
    room = [-size % 16 for size in sizes]
    with _outside_inference():
        buffer = torch.empty(sum(sizes) + sum(room), dtype=dtype, device=like[0].device)
        cut = buffer.split_with_sizes(
            [part for pair in zip(sizes, room, strict=True) for part in pair]
        )
        return [piece.data.view(tensor.shape) for piece, tensor in zip(cut[::2], like, strict=True)]


def views(buffer: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """The buffer, cut into tensors of these shapes; to autograd they do not know each other."""
    pieces = buffer.split_with_sizes([shape.numel() for shape in shapes])
    return [
        piece.data if len(shape) == 1 else piece.data.view(shape)
        for piece, shape in zip(pieces, shapes, strict=True)
    ]


def _outside_inference() -> AbstractContextManager[Any]:
    """Where tensors can be used for training later."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def _users(buffer: Tensor) -> tuple[int, int]:
    """How many tensors and other owners share the memory, and how many hold its storage in Python."""
    storage = buffer.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata)), sys.getrefcount(storage)


_ALONE = _users(torch.empty(1, device="cpu"))
