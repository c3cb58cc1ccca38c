"""Call a compiled kernel on many leaves at once."""

import ctypes
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from functional_sgd.fusion import compiler
from functional_sgd.fusion.source import Kernel

CHUNK = 65_536  # elements: large enough to hide the call, small enough to share out and to stay in the cache

_WHOLE, _ADDRESS = ctypes.c_int64, ctypes.c_void_p
_SIGNATURE = (_WHOLE, _ADDRESS, _WHOLE, _ADDRESS, _ADDRESS, _WHOLE, *[_ADDRESS] * 4, ctypes.c_int)

GRAIN = 32_768  # elements that are worth a thread

Pointers: TypeAlias = Sequence[int]
"""The address of each leaf of one column."""


class Buffer:
    """An array, and where it lies (asking numpy takes a microsecond)."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array
        self.address: int = array.ctypes.data


def cut_up(
    sizes: Sequence[int], chunk: int
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int32]]:
    """Leaves of these sizes in chunks of at most so many elements: the leaf of each chunk, its
    start, its length.
    """
    leaf, start, count = [], [], []
    for index, size in enumerate(sizes):
        for begin in range(0, size, chunk):
            leaf.append(index)
            start.append(begin)
            count.append(min(chunk, size - begin))
    return (
        np.array(leaf, dtype=np.int32),
        np.array(start, dtype=np.int64),
        np.array(count, dtype=np.int32),
    )


class Shape:
    """How the leaves of a group are cut into chunks."""

    def __init__(self, sizes: Sequence[int]) -> None:
        leaf, start, count = cut_up(sizes, CHUNK)
        self.n_leaves, self.n_chunks = len(sizes), len(leaf)
        self.leaf, self.start, self.count = (
            Buffer(leaf),
            Buffer(start),
            Buffer(count.astype(np.int64)),
        )
        self.one_row = Buffer(np.zeros(self.n_leaves, dtype=np.int32))
        self.own_rows = Buffer(np.arange(self.n_leaves, dtype=np.int32))
        self.threads = 1 + sum(sizes) // GRAIN  # as many as are worth it


class Launcher:
    """A compiled kernel and what it is called with. Raises NoCompiler when it is made, if it cannot
    be compiled.

    One call at a time: the arrays are used again.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.function = compiler.function_of(kernel.source, *_SIGNATURE)
        self._buffers: dict[tuple[int, int], tuple[Buffer, Buffer, Buffer]] = {}

    def __call__(
        self, shape: Shape, rows: Sequence[Sequence[float]], columns: Sequence[Pointers]
    ) -> None:
        """Run over all leaves. `rows` of hypers are one, or one for each leaf; `columns` are the
        kernel's inputs, then its outputs.
        """
        table, hypers, scratch = self._arrays(shape.n_leaves, len(rows))
        known: dict[int, int] = {}
        for index, addresses in enumerate(columns):
            same = known.setdefault(
                id(addresses), index
            )  # a column that is overwritten is both read and written
            table.array[index] = addresses if same == index else table.array[same]
        hypers.array[:] = rows
        self.function(
            shape.n_leaves, table.address, len(rows), hypers.address,
            (shape.one_row if len(rows) == 1 else shape.own_rows).address,
            shape.n_chunks, shape.leaf.address, shape.start.address, shape.count.address,
            scratch.address, min(torch.get_num_threads(), shape.threads),
        )  # fmt: skip

    def _arrays(self, n_leaves: int, n_rows: int) -> tuple[Buffer, Buffer, Buffer]:
        """The table of pointers, the hypers, and room for what is made of them."""
        key = (n_leaves, n_rows)
        if key not in self._buffers:
            kernel = self.kernel
            if len(self._buffers) >= 16:
                self._buffers.clear()
            self._buffers[key] = (
                Buffer(
                    np.empty((len(kernel.inputs) + len(kernel.outputs), n_leaves), dtype=np.int64)
                ),
                Buffer(np.empty((n_rows, len(kernel.hypers)), dtype=np.float64)),
                Buffer(np.empty((n_rows, max(kernel.n_scalars, 1)), dtype=np.float64)),
            )
        return self._buffers[key]
