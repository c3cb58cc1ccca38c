"""The Euclidean norms of many leaves at once: one pass over memory, with all threads."""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from functional_sgd.fusion import compiler
from functional_sgd.fusion.c_source import CONVERSIONS, loaded, stored_type
from functional_sgd.fusion.launch import Buffer, Pointers, Shape

_LANES = 32

_SOURCE = """\
{conversions}
static inline double square({number} x) {{ return x * x; }}

/* norms[l] = sqrt(sum of the squares of leaf l), in double precision. Leaves come in chunks: chunk c is
   count[c] elements of leaf[c], from start[c]. The order of additions does not depend on the number of threads. */
void run(int64_t n_leaves, char *const *pointers, int64_t n_chunks, const int32_t *leaf, const int64_t *start,
         const int64_t *count, double *squares, double *norms, int threads) {{
    int64_t grain = n_chunks / (8 * threads) + 1;
    #pragma omp parallel for schedule(dynamic, grain) num_threads(threads) if (n_chunks > 1 && threads > 1)
    for (int64_t c = 0; c < n_chunks; ++c) {{
        const {stored} *in = (const {stored} *)pointers[leaf[c]] + start[c];
        double lane[{lanes}] = {{0}}, sum = 0; /* many sums, so that none waits for the last addition to it */
        int64_t i = 0;
        for (; i + {lanes} <= count[c]; i += {lanes})
            for (int k = 0; k < {lanes}; ++k) lane[k] += square({load_lane});
        for (; i < count[c]; ++i) sum += square({load});
        for (int k = 0; k < {lanes}; ++k) sum += lane[k];
        squares[c] = sum;
    }}
    for (int64_t l = 0; l < n_leaves; ++l) norms[l] = 0;
    for (int64_t c = 0; c < n_chunks; ++c) norms[leaf[c]] += squares[c];
    for (int64_t l = 0; l < n_leaves; ++l) norms[l] = sqrt(norms[l]);
}}
"""


def norms_on_cpu(shape: Shape, dtype: torch.dtype, addresses: Pointers) -> Tensor:
    """The norm of each leaf of a column, float64. Raises NoCompiler."""
    function = _compiled(dtype)
    pointers = Buffer(np.array(addresses, dtype=np.int64))
    squares, norms = Buffer(np.empty(shape.n_chunks)), Buffer(np.empty(shape.n_leaves))
    function(
        shape.n_leaves, pointers.address, shape.n_chunks, shape.leaf.address, shape.start.address, shape.count.address,
        squares.address, norms.address, min(torch.get_num_threads(), shape.threads),
    )  # fmt: skip
    return torch.from_numpy(norms.array)


def norms_by_torch(tensors: Sequence[Tensor], precision: torch.dtype) -> Tensor:
    """The same with torch's operators, on whatever device."""
    return torch.stack(list(torch._foreach_norm(list(tensors), dtype=precision))).double()


@functools.cache
def _compiled(dtype: torch.dtype) -> Any:
    source = _SOURCE.format(
        conversions=CONVERSIONS,
        stored=stored_type(dtype),
        number="float"
        if dtype == torch.float16
        else "double",  # float is exact for squares of float16, and faster
        load=loaded("in", "i", dtype),
        load_lane=loaded("in", "i + k", dtype),
        lanes=_LANES,
    )
    whole, address = ctypes.c_int64, ctypes.c_void_p
    return compiler.function_of(source, whole, address, whole, *[address] * 5, ctypes.c_int)
