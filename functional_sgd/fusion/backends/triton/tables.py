"""Small arrays on a device: what was sent before is not sent again."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KEPT = 32  # tables that a kernel remembers; a call uses two, and one for each hyper by leaf

SPARE = 8  # pieces of pinned memory of a size for a capture, at most


class Tables:
    """Arrays on a device, by their content or by a name for it.

    A captured graph reads its tables at every replay, from the addresses that it was captured with.
    So what is put during a capture is copied there by the graph itself, from pinned host memory
    that must have been there before (torch refuses to copy from other memory, and pinning waits),
    and both live as long as this object, which the optimizer holds.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._spare: dict[int, list[Tensor]] = {}  # pinned memory by size, for captures
        self._wanted: dict[int, int] = {}  # how many of each size
        self._captured: list[Tensor] = []

    def put(self, array: NDArray[Any], device: torch.device, name: Hashable = None) -> Tensor:
        """The array on a device. A name stands for its content, which is compared otherwise.

        A table is used on the stream on which it was sent: it needs no synchronisation there. While
        a graph is being captured nothing is sent yet, so tables from before are not used, nor those
        of the capture after it.
        """
        if _capturing(device):
            host = self._spare_memory(array.nbytes)
            sent = _sent(array, device, host)
            self._captured += [host, sent]
            return sent
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
        content = array.tobytes() if name is None else name
        key = (device, stream, array.shape, array.dtype.str, content)
        if key in self._known:
            self._known.move_to_end(key)
        else:
            self._known[key] = _sent(array, device, _pinned(array.nbytes, device))
            if len(self._known) > KEPT:
                self._known.popitem(last=False)
            alike = sum(known.nbytes == array.nbytes for known in self._known.values())
            # At least two: the tables of addresses and of chunks may have the same size.
            self._wanted[array.nbytes] = min(max(alike, 2), SPARE)
        # Also when nothing is sent: a capture may have used the spare memory up.
        self._keep_spare(array.nbytes, device)
        return self._known[key]

    def _keep_spare(self, size: int, device: torch.device) -> None:
        """As many pieces of pinned memory as there are tables of a size: a capture may need all."""
        spare = self._spare.setdefault(size, [])
        while len(spare) < self._wanted[size]:
            spare.append(_pinned(size, device))

    def _spare_memory(self, size: int) -> Tensor:
        spare = self._spare.get(size)
        if not spare:
            raise RuntimeError(
                f"fuse: a CUDA graph is being captured, and there is no pinned memory of {size} "
                f"bytes left for the tables of this step. Take an ordinary step (or two, for a "
                f"second capture) with the same trees before capturing."
            )
        return spare.pop()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _sent(array: NDArray[Any], device: torch.device, host: Tensor) -> Tensor:
    """The array on its way to the device, through host memory that is given."""
    host.numpy()[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    dtype = torch.from_numpy(array[:0]).dtype
    return host.to(device, non_blocking=True).view(dtype).view(array.shape)


def _pinned(size: int, device: torch.device) -> Tensor:
    """Host memory from which a device can copy by itself.

    Torch does not hand it out again before such a copy is done.
    """
    return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
