"""The backend of GPUs: one launch of a Triton kernel for all leaves; the host never waits."""

import contextlib
import functools
import linecache
from collections.abc import Hashable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from functional_sgd.fusion.backends.backend import Backend, Runner, Totals, Unavailable
from functional_sgd.fusion.backends.triton.source import COMBINE, triton_source
from functional_sgd.fusion.backends.triton.tables import Tables
from functional_sgd.fusion.buffers import Pool, apart
from functional_sgd.fusion.chunks import cut_up
from functional_sgd.fusion.column import Column
from functional_sgd.fusion.group import Group
from functional_sgd.fusion.kernel import Dtypes
from functional_sgd.fusion.passes import Pass
from functional_sgd.fusion.scalars import Scalars, Value

BLOCK = 1024  # elements that a program loads at once
PROGRAMS = 2048  # as many keep a large GPU busy; more elements make longer programs, up to
LONGEST = 8  # blocks each
WARPS = 4
COMBINED = 256  # parts of a reduction that are loaded at once

Hyper: TypeAlias = float | Tensor | NDArray[np.float64]
"""A number, a tensor on the device (of one value, or one for each leaf), or an array of numbers."""


class TritonBackend(Backend):
    """Kernels in Triton for leaves on a GPU."""

    name = "Triton"

    def treats(self, device: torch.device) -> bool:
        """GPUs with CUDA, or what torch calls so."""
        return device.type == "cuda"

    def kinds(self, work: Pass, scalars: Scalars, group: Group) -> object:
        """Which scalars are numbers, which are read from memory, and in what dtype."""
        return (group.device, *map(_kind, _hypers(work, scalars, group)))

    def compile(self, work: Pass, dtypes: Dtypes, scalars: Scalars, group: Group) -> Runner:
        """The compiled pass. Raises Unavailable if Triton is not there, or does not work."""
        hypers = _hypers(work, scalars, group)
        kinds = dict(zip(work.scalars, map(_kind, hypers), strict=True))
        try:
            return _Kernel(work, dtypes, kinds, group.device)
        except Exception as error:  # of Triton, of what it calls, or because it is not there
            raise Unavailable(
                f"Triton does not work here: {type(error).__name__}: {error}",
                self,
                "Install triton, and gcc or clang, which it uses.",
            ) from error

    def allocate(
        self, pool: Pool, name: str, like: Sequence[Tensor], dtype: torch.dtype
    ) -> list[Tensor]:
        """Tensors in one new buffer; torch's allocator knows when it may hand it out again."""
        return apart(like, dtype)

    def source(self, work: Pass, dtypes: Dtypes) -> str:
        """The Triton text, with steps from memory and hypers as numbers."""
        return triton_source(work, dtypes, ("step",))


class _Kernel:
    """A compiled pass, for scalars of some kinds."""

    def __init__(
        self,
        work: Pass,
        dtypes: Dtypes,
        kinds: dict[str, torch.dtype | None],
        device: torch.device,
    ) -> None:
        self.work, self.device, self.tables = work, device, Tables()
        tensors = [name for name, kind in kinds.items() if kind is not None]
        self.function = loaded(triton_source(work, dtypes, tensors), "fused_rules")
        self.combine = loaded(COMBINE, "combine") if work.takes else None
        self.options = _options()
        # Compiled here and not by the first launch: a failure comes before anything is overwritten.
        if hasattr(self.function, "device_caches"):  # not the interpreter's
            hypers: list[float | torch.dtype] = []
            for kind in kinds.values():
                if kind is None:
                    hypers.append(0.0)
                else:  # warmup takes a dtype in place of a pointer to it
                    hypers += [kind, 0]
            pointer = torch.int64
            with _current(device):
                self.function.warmup(
                    pointer, pointer, torch.float64, 1, *hypers,
                    BLOCK=BLOCK, grid=(1,), **self.options,
                )  # fmt: skip

    def __call__(
        self, group: Group, reads: Sequence[Column], writes: Sequence[Column], scalars: Scalars
    ) -> Totals | None:
        if "programs" not in group.prepared:
            group.prepared["programs"] = _Programs(group.sizes)
        programs: _Programs = group.prepared["programs"]
        n_takes = len(self.work.takes)
        parts = None
        if n_takes:
            shape = (max(programs.count, 1), n_takes)
            parts = torch.empty(shape, dtype=torch.float64, device=self.device)
        arguments: list[float | Tensor] = []
        for hyper in _hypers(self.work, scalars, group):
            arguments += self._arguments(hyper)
        addresses = np.array([column.addresses for column in (*reads, *writes)], dtype=np.int64)
        with _current(self.device):
            table = self._put(addresses)
            # Without reductions nothing is stored there, but the kernel wants a pointer.
            stored = table if parts is None else parts
            if programs.count:
                self.function[(programs.count,)](
                    table,
                    self._put(programs.table, programs),
                    stored,
                    len(group.sizes),
                    *arguments,
                    BLOCK=BLOCK,
                    **self.options,
                )
            return None if parts is None else self._totals(parts, programs, len(group.sizes))

    def _totals(self, parts: Tensor, programs: "_Programs", n_leaves: int) -> Totals:
        assert self.combine is not None
        n_takes = len(self.work.takes)
        totals = torch.empty((n_leaves, n_takes), dtype=torch.float64, device=self.device)
        ends = self._put(programs.ends, (programs, "ends"))
        options = {**self.options, "num_warps": 1}
        for place, take in enumerate(self.work.takes):
            self.combine[(n_leaves,)](
                parts, ends, totals, place, n_takes,
                KIND=take.reduction.combine, BLOCK=COMBINED, **options,
            )  # fmt: skip
        return totals

    def _put(self, array: NDArray[Any], name: Hashable = None) -> Tensor:
        return self.tables.put(array, self.device, name)

    def _arguments(self, hyper: Hyper) -> tuple[float | Tensor, ...]:
        """A number; or a pointer, and whether it points to one value for each leaf."""
        if isinstance(hyper, Tensor):
            return hyper, hyper.dim()
        if isinstance(hyper, np.ndarray):
            return self._put(hyper), 1
        return (hyper,)


class _Programs:
    """How the leaves of a group are cut up among programs."""

    def __init__(self, sizes: Sequence[int]) -> None:
        blocks = min(max(sum(sizes) // (BLOCK * PROGRAMS), 1), LONGEST)
        leaf, start, count = cut_up(sizes, blocks * BLOCK)
        self.table = np.array([leaf, start, count], dtype=np.int64)
        self.count = len(leaf)
        each = np.bincount(leaf, minlength=len(sizes)) if len(leaf) else np.zeros(len(sizes))
        self.ends = np.concatenate([[0], np.cumsum(each)]).astype(np.int64)


def _hypers(work: Pass, scalars: Scalars, group: Group) -> list[Hyper]:
    """For each scalar of a pass a number, or where the device finds it."""
    return [_on_device(scalars.find(name, group), group.device) for name in work.scalars]


def _on_device(one: Value, device: torch.device) -> Hyper:
    if isinstance(one.value, Tensor):
        if one.value.device.type == "cpu" and device.type != "cpu":
            numbers = one.value.detach().numpy()  # in host memory: to be read is not to wait
            return numbers.astype(np.float64) if one.each else float(numbers)
        return _readable(one.value.to(device))
    if not one.each:
        return float(one.value)
    if any(isinstance(value, Tensor) for value in one.value):
        return torch.stack([_number_on(value, device) for value in one.value])
    return np.array(one.value, dtype=np.float64)


def _number_on(value: float | Tensor, device: torch.device) -> Tensor:
    """A number on the device: filled in there, since the host would wait for a copy."""
    if isinstance(value, Tensor) and (value.device.type != "cpu" or device.type == "cpu"):
        return value.to(device, torch.float64)
    return torch.full((), float(value), dtype=torch.float64, device=device)


def _readable(value: Tensor) -> Tensor:
    """A tensor of numbers as a kernel can read them."""
    known = (torch.float64, torch.float32, torch.int64)
    value = value if value.dtype in known else value.double()
    return value.contiguous()


def _kind(hyper: Hyper) -> torch.dtype | None:
    """The dtype of a hyper that the kernel reads from memory; None for a number."""
    if isinstance(hyper, Tensor):
        return hyper.dtype
    return torch.float64 if isinstance(hyper, np.ndarray) else None


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a GPU the current one, if it is not."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


@functools.lru_cache(maxsize=256)
def loaded(source: str, function: str) -> Any:
    """A kernel of a source, as a Triton function; Triton reads its lines again, from linecache."""
    name = f"<functional_sgd kernel {hash(source):x}>"
    # With mtime None, linecache.checkcache keeps an entry for which there is no file.
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    space: dict[str, object] = {"__name__": "functional_sgd.fusion.backends.triton.kernel"}
    exec(compile(source, name, "exec"), space)
    return space[function]


@functools.cache
def _options() -> dict[str, int]:
    """Every operation rounds as torch's does: no fused multiply-add, no flushing of subnormals."""
    exact = {"enable_fp_fusion": False}
    with contextlib.suppress(ImportError, AttributeError):
        from triton.backends.nvidia.compiler import CUDAOptions

        if torch.version.hip is None and "enable_reflect_ftz" in CUDAOptions.__dataclass_fields__:
            exact["enable_reflect_ftz"] = False
    return {"num_warps": WARPS, **exact}
