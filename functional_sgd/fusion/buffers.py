"""Memory for results: large leaves share a buffer, which is used again once it was dropped."""

import itertools
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# Elements: from here on, the page faults of fresh memory cost more than making views.
LARGE = 16_384

# Buffers remembered for a column: the caller holds the last result while the next is computed.
_KEPT = 2


class Pool:
    """Flat buffers by name, handed out again once all of their tensors are gone.

    Memory that has been used before costs no page faults: a pure step takes a third of the time.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, list[Tensor]] = {}

    def take(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        """A flat CPU buffer that nobody else uses; what is in it is left over."""
        known = self._buffers.setdefault(name, [])
        # Another process may read what has been sent to it, and nobody here knows for how long.
        known[:] = [one for one in known if not one.is_shared()]  # type: ignore[no-untyped-call]
        for index, buffer in enumerate(known):
            if buffer.numel() == numel and buffer.dtype == dtype and _users(buffer) == _ALONE:
                # The last one used goes last, so that the oldest is forgotten first.
                known.append(known.pop(index))
                return buffer
        buffer = torch.empty(numel, dtype=dtype, device="cpu")
        known.append(buffer)
        del known[:-_KEPT]
        return buffer


def results(pool: Pool, name: str, like: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """CPU tensors laid out like these to write into; what is in them is left over."""
    with _outside_inference():
        large = [tensor for tensor in like if tensor.numel() >= LARGE]
        if not large and like[0].dtype == dtype:
            return list(map(torch.empty_like, like))  # half the time without further arguments
        buffer = pool.take(name, sum(map(Tensor.numel, large)), dtype)
        pieces = iter(views(buffer, large))
        made = []
        for one in like:
            if one.numel() >= LARGE:
                made.append(next(pieces))
            else:
                made.append(torch.empty_like(one, dtype=dtype))
        return made


def apart(like: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Tensors of these shapes in one new buffer on their GPU, each beginning at a 16th element.

    Torch's allocator hands out a GPU's memory again by itself, and knows when it may.
    """
    sizes = [tensor.numel() for tensor in like]
    # 16 elements of one byte make the 16-byte alignment that Triton's wide loads need.
    room = [-size % 16 for size in sizes]
    parts = list(itertools.chain.from_iterable(zip(sizes, room, strict=True)))
    with _outside_inference():
        buffer = torch.empty(sum(parts), dtype=dtype, device=like[0].device)
        pieces = buffer.split_with_sizes(parts)[::2]  # without the room between them
        return [piece.data.view(one.shape) for piece, one in zip(pieces, like, strict=True)]


def views(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The buffer, cut into tensors laid out like these; to autograd they do not know each other."""
    pieces = buffer.split_with_sizes([one.numel() for one in like])
    # `.data`, because views of one base share a version counter: writing to one leaf would
    # invalidate what autograd has saved of another.
    made = []
    for piece, one in zip(pieces, like, strict=True):
        made.append(piece.data.as_strided(one.shape, one.stride(), piece.storage_offset()))
    return made


def lies_alone(tensor: Tensor) -> bool:
    """Whether a tensor has all of its memory, and no other tensor shares it."""
    all_of_it = tensor.nbytes == tensor.untyped_storage().nbytes()
    return all_of_it and not tensor.requires_grad and _users(tensor) == _ALONE


def _outside_inference() -> AbstractContextManager[object]:
    """Where tensors can be used for training later."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def _users(buffer: Tensor) -> tuple[int, int]:
    """How many tensors and other owners share the memory, and how many hold it in Python."""
    storage = buffer.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata)), sys.getrefcount(storage)


# Measured, because counting adds references of its own.
_ALONE = _users(torch.empty(1, device="cpu"))
