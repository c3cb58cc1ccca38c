"""Call a Triton kernel on many leaves at once: one launch, and the host never waits for the device."""

import contextlib
import functools
import linecache
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from functional_sgd.fusion.compiler import NoCompiler
from functional_sgd.fusion.launch import Pointers, cut_up
from functional_sgd.fusion.source import Kernel

BLOCK = 1024  # elements that a program loads at once
PROGRAMS = (
    2048  # as many keep a large GPU busy; more elements make longer programs, up to LONGEST blocks
)
LONGEST = 8
WARPS = 4

KEPT = 32  # tables that a launcher remembers; a call uses two, and one for each hyper that differs by leaf

_KEPT_FOR_GRAPHS: list[
    Tensor
] = []  # captured graphs read them again at every replay, so they are never freed


Hyper: TypeAlias = float | Tensor | NDArray[Any]
"""A number, a tensor on the device (of one value, or one for each leaf), or an array of numbers,
one for each leaf.
"""


class NoTriton(NoCompiler):
    """There is no working Triton."""

    cure = "Install triton, and gcc or clang, which it uses."


def treats(device: torch.device) -> bool:
    """Whether leaves on this device are for Triton."""
    return device.type == "cuda"


class Chunks:
    """How the leaves of a group are cut up among programs."""

    def __init__(self, sizes: Sequence[int]) -> None:
        blocks = min(max(sum(sizes) // (BLOCK * PROGRAMS), 1), LONGEST)
        self.table = np.array(
            cut_up(sizes, blocks * BLOCK), dtype=np.int64
        )  # leaf, start, count: a row each
        self.n_leaves, self.n_chunks = len(sizes), self.table.shape[1]


class Tables:
    """Small arrays on a device. What was sent before is not sent again."""

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._spare: dict[
            int, Tensor
        ] = {}  # pinned memory by size, for captures, which may not ask for any

    def put(self, array: NDArray[Any], device: torch.device, name: Hashable = None) -> Tensor:
        """The array on a device. A name stands for its content, which is compared otherwise.

        A table is used on the stream on which it was sent: it needs no synchronisation there. While
        a graph is being captured nothing is sent yet, so tables from before are not used, nor those
        of the capture after it.
        """
        if _capturing(device):
            host = self._spare.pop(array.nbytes, None)
            sent = _send(
                array,
                device,
                torch.empty(array.nbytes, dtype=torch.uint8) if host is None else host,
            )
            _KEPT_FOR_GRAPHS.extend(sent)
            return sent[1]
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
        key = (
            device,
            stream,
            array.shape,
            array.dtype.str,
            array.tobytes() if name is None else name,
        )
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        self._known[key] = _send(array, device, _pinned(array.nbytes, device))[1]
        if array.nbytes not in self._spare:
            self._spare[array.nbytes] = _pinned(array.nbytes, device)
        if len(self._known) > KEPT:
            self._known.popitem(last=False)
        if len(self._spare) > KEPT:
            del self._spare[next(iter(self._spare))]
        return self._known[key]


def kind_of(hyper: Hyper) -> torch.dtype | None:
    """The dtype of a hyper that the kernel reads from memory; None for a number."""
    if isinstance(hyper, Tensor):
        return hyper.dtype
    return torch.float64 if isinstance(hyper, np.ndarray) else None


class DeviceLauncher:
    """A Triton kernel for hypers of these kinds. Raises NoTriton when it is made, if it cannot be
    compiled.
    """

    def __init__(
        self, kernel: Kernel, kinds: Mapping[str, torch.dtype | None], device: torch.device
    ) -> None:
        self.kernel, self.device, self.tables = kernel, device, Tables()
        try:
            self.function, self.options = _loaded(kernel.source), _options()
            if hasattr(self.function, "device_caches"):  # not the interpreter's
                hypers = [
                    arg for kind in kinds.values() for arg in ([0.0] if kind is None else [kind, 0])
                ]
                with _current(device):
                    self.function.warmup(
                        torch.int64, torch.int64, 1, *hypers, BLOCK=BLOCK, grid=(1,), **self.options
                    )
        except Exception as error:  # of Triton, of what it calls, or because it is not there
            raise NoTriton(f"Triton does not work here: {type(error).__name__}: {error}") from error

    def __call__(
        self, chunks: Chunks, hypers: Sequence[Hyper], columns: Sequence[Pointers]
    ) -> None:
        """Run over all leaves. `columns` are the kernel's inputs, then its outputs."""
        if not chunks.n_chunks:
            return
        with _current(self.device):
            self.function[(chunks.n_chunks,)](
                self._put(np.array(columns, dtype=np.int64)),
                self._put(chunks.table, chunks),
                chunks.n_leaves,
                *(arg for hyper in hypers for arg in self._arguments(hyper)),
                BLOCK=BLOCK,
                **self.options,
            )

    def _put(self, array: NDArray[Any], name: Hashable = None) -> Tensor:
        return self.tables.put(array, self.device, name)

    def _arguments(self, hyper: Hyper) -> tuple[Any, ...]:
        """A number; or a pointer, and whether it points to one value for each leaf."""
        if not isinstance(hyper, (Tensor, np.ndarray)):
            return (hyper,)
        tensor = hyper if isinstance(hyper, Tensor) else self._put(hyper)
        return tensor, tensor.dim()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _send(array: NDArray[Any], device: torch.device, host: Tensor) -> tuple[Tensor, Tensor]:
    """The array in host memory, and on its way to the device."""
    host.numpy()[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    dtype = torch.from_numpy(array[:0]).dtype
    return host, host.to(device, non_blocking=True).view(dtype).view(array.shape)


def _pinned(size: int, device: torch.device) -> Tensor:
    """Host memory from which a device can copy by itself; torch does not hand it out again before
    that is done.
    """
    return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a GPU the current one, if it is not."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


@functools.lru_cache(maxsize=256)
def _loaded(source: str) -> Any:
    """The kernel of a source, as a Triton function; Triton reads its lines again, from linecache."""
    name = f"<functional_sgd kernel {hash(source):x}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    space: dict[str, Any] = {"__name__": "functional_sgd.fusion.kernel"}
    exec(compile(source, name, "exec"), space)
    return space["fused_rules"]


@functools.cache
def _options() -> dict[str, Any]:
    """Every operation rounds as torch's does: no fused multiply-add, and small numbers are not set
    to zero.
    """
    exact = {"enable_fp_fusion": False}
    with contextlib.suppress(ImportError, AttributeError):
        from triton.backends.nvidia.compiler import CUDAOptions

        if torch.version.hip is None and "enable_reflect_ftz" in CUDAOptions.__dataclass_fields__:
            exact["enable_reflect_ftz"] = False
    return {"num_warps": WARPS, **exact}
