"""The backend of CPUs: C, compiled once and kept on disk."""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from functional_sgd.fusion.backends.backend import Backend, Runner, Totals, Unavailable
from functional_sgd.fusion.backends.c import compiler
from functional_sgd.fusion.backends.c.source import c_source
from functional_sgd.fusion.buffers import Pool, results
from functional_sgd.fusion.chunks import cut_up
from functional_sgd.fusion.column import Column
from functional_sgd.fusion.group import Group
from functional_sgd.fusion.kernel import Dtypes, body_of
from functional_sgd.fusion.passes import Pass
from functional_sgd.fusion.scalars import Scalars

CHUNK = 65_536  # elements: enough to hide the call, few enough to share out and to stay in cache

GRAIN = 32_768  # elements that are worth a thread

_WHOLE, _ADDRESS = ctypes.c_int64, ctypes.c_void_p
_SIGNATURE = (_WHOLE, _ADDRESS, _WHOLE, _ADDRESS, _ADDRESS, _WHOLE, *[_ADDRESS] * 6, ctypes.c_int)


class CBackend(Backend):
    """Kernels in C for leaves on a CPU."""

    name = "C"

    def treats(self, device: torch.device) -> bool:
        """CPUs."""
        return device.type == "cpu"

    def probe(self) -> None:
        """Raise Unavailable unless a function that does nothing can be compiled and loaded."""
        self._function("void run(void) {}\n")

    def _function(self, source: str, *argtypes: type) -> Callable[..., None]:
        try:
            return compiler.function_of(source, *argtypes)
        except compiler.NoCompiler as error:
            raise Unavailable(str(error), self, error.cure, error.retry_at) from error

    def compile(self, work: Pass, dtypes: Dtypes, scalars: Scalars, group: Group) -> Runner:
        """The compiled pass. Raises Unavailable without a compiler."""
        return _Kernel(work, self._function(c_source(work, dtypes), *_SIGNATURE))

    def allocate(
        self, pool: Pool, name: str, like: Sequence[Tensor], dtype: torch.dtype
    ) -> list[Tensor]:
        """Memory that is used again once the caller has dropped what was in it."""
        return results(pool, name, like, dtype)

    def source(self, work: Pass, dtypes: Dtypes) -> str:
        """The C text."""
        return c_source(work, dtypes)


class _Buffer:
    """An array, and where it lies (asking numpy takes a microsecond)."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array
        self.address: int = array.ctypes.data


class _Buffers:
    """What a kernel is called with besides columns, for so many leaves: each is used again."""

    def __init__(self, table: tuple[int, int], n_parts: int) -> None:
        self.table = _Buffer(np.empty(table, dtype=np.int64))
        self.parts = _Buffer(np.empty(max(n_parts, 1)))
        self._rows: dict[int, tuple[_Buffer, _Buffer]] = {}

    def rows(self, n_rows: int, n_numbers: int, room: int) -> tuple[_Buffer, _Buffer]:
        """(rows of numbers, what a kernel computes of each row before it begins)."""
        if n_rows not in self._rows:
            rows, scratch = np.empty((n_rows, n_numbers)), np.empty(n_rows * room)
            self._rows[n_rows] = _Buffer(rows), _Buffer(scratch)
        return self._rows[n_rows]


class _Chunks:
    """How the leaves of a group are cut into chunks."""

    def __init__(self, sizes: Sequence[int]) -> None:
        leaf, start, count = cut_up(sizes, CHUNK)
        self.n_leaves, self.n_chunks = len(sizes), len(leaf)
        self.leaf, self.start = _Buffer(leaf), _Buffer(start)
        self.count = _Buffer(count.astype(np.int64))
        self.one_row = _Buffer(np.zeros(self.n_leaves, dtype=np.int32))
        self.own_rows = _Buffer(np.arange(self.n_leaves, dtype=np.int32))
        self.threads = 1 + sum(sizes) // GRAIN  # as many as are worth it


class _Kernel:
    """A compiled pass. One call at a time: its buffers are used again."""

    def __init__(self, work: Pass, function: Callable[..., None]) -> None:
        self.function = function
        self.scalars, self.n_takes = work.scalars, len(work.takes)
        self.n_columns = len(work.reads) + len(work.outputs)
        self.room = len(body_of(work).crossing) + 1  # of each row
        self.no_totals = _Buffer(np.empty(1))
        self._buffers: dict[tuple[int, int], _Buffers] = {}

    def __call__(
        self, group: Group, reads: Sequence[Column], writes: Sequence[Column], scalars: Scalars
    ) -> Totals | None:
        if "chunks" not in group.prepared:
            group.prepared["chunks"] = _Chunks(group.sizes)
        chunks: _Chunks = group.prepared["chunks"]
        key = chunks.n_leaves, chunks.n_chunks
        if key not in self._buffers:
            # Bounds the memory kept for trees whose sizes keep changing.
            if len(self._buffers) >= 16:
                self._buffers.clear()
            shape = self.n_columns, chunks.n_leaves
            self._buffers[key] = _Buffers(shape, chunks.n_chunks * self.n_takes)
        buffers = self._buffers[key]
        table = buffers.table
        known: dict[int, int] = {}
        for place, column in enumerate((*reads, *writes)):
            # A column that is overwritten is both read and written; its addresses are copied once.
            same = known.setdefault(id(column), place)
            table.array[place] = column.addresses if same == place else table.array[same]
        numbers = scalars.columns(self.scalars, group)
        n_rows = max(map(len, numbers), default=1)
        rows, scratch = buffers.rows(n_rows, len(numbers), self.room)
        if n_rows == 1:
            row_of_leaf = chunks.one_row
            rows.array[0] = [one[0] for one in numbers]
        else:
            row_of_leaf = chunks.own_rows
            for place, one in enumerate(numbers):
                rows.array[:, place] = one
        totals = self.no_totals
        if self.n_takes:  # which are handed out, so they are new ones
            totals = _Buffer(np.empty((chunks.n_leaves, self.n_takes)))
        self.function(
            chunks.n_leaves, table.address, n_rows, rows.address,
            row_of_leaf.address, chunks.n_chunks, chunks.leaf.address, chunks.start.address,
            chunks.count.address, scratch.address, buffers.parts.address, totals.address,
            min(torch.get_num_threads(), chunks.threads),
        )  # fmt: skip
        return torch.from_numpy(totals.array) if self.n_takes else None
