"""Call a compiled kernel on many leaves at once."""

import ctypes
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from functional_sgd.execute import compiler
from functional_sgd.execute.c_source import Kernel

CHUNK = 65_536  # elements: large enough to hide the call, small enough to share out and to stay in the cache

GRAIN = 32_768  # elements that are worth a thread

Pointers = NDArray[np.int64]
"""The address of each leaf of one column."""

Hypers = NDArray[np.float64]
"""A row of scalars for all leaves, or one for each leaf."""


class Shape:
    """How the leaves of a group are cut into chunks."""

    def __init__(self, sizes: Sequence[int]) -> None:
        leaf, start, count = [], [], []
        for index, size in enumerate(sizes):
            for begin in range(0, size, CHUNK):
                leaf.append(index)
                start.append(begin)
                count.append(min(CHUNK, size - begin))
        self.n_leaves, self.n_chunks = len(sizes), len(leaf)
        self.leaf = np.array(leaf, dtype=np.int32)
        self.start = np.array(start, dtype=np.int64)
        self.count = np.array(count, dtype=np.int64)
        self.one_row = np.zeros(self.n_leaves, dtype=np.int32)
        self.own_rows = np.arange(self.n_leaves, dtype=np.int32)
        self.numel = int(sum(sizes))
        self.offsets = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)[:-1])) if sizes else np.zeros(0, np.int64)


class Launcher:
    """A compiled kernel. Raises NoCompiler when it is made, if it cannot be compiled."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.function = _compiled(kernel.source)

    def __call__(
        self, shape: Shape, columns: Mapping[str, Pointers], results: Mapping[str, Pointers], hypers: Hypers
    ) -> None:
        """Run over all leaves: read `columns`, write `results`; `hypers` has a row for all leaves, or one for each."""
        kernel = self.kernel
        table = np.empty((len(kernel.inputs) + len(kernel.outputs), shape.n_leaves), dtype=np.int64)
        for index, name in enumerate(kernel.inputs):
            table[index] = columns[name]
        for index, name in enumerate(kernel.outputs, start=len(kernel.inputs)):
            table[index] = results[name]
        rows = len(hypers)
        scratch = np.empty((rows, max(kernel.n_scalars, 1)), dtype=np.float64)
        row = shape.one_row if rows == 1 else shape.own_rows
        self.function(
            shape.n_leaves, table.ctypes.data, rows, hypers.ctypes.data, row.ctypes.data,
            shape.n_chunks, shape.leaf.ctypes.data, shape.start.ctypes.data, shape.count.ctypes.data,
            scratch.ctypes.data, min(torch.get_num_threads(), 1 + shape.numel // GRAIN),
        )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _compiled(source: str) -> Any:
    function = compiler.load(source).run
    whole, address = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [whole, address, whole, address, address, whole, *[address] * 4, ctypes.c_int]
    function.restype = None
    return function
