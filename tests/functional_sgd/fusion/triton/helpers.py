"""Triton kernels without a GPU: Triton's interpreter runs them with numpy, on leaves that lie on
the CPU.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import optree
import pytest
import torch

from functional_sgd.fusion.backends.c.launch import CBackend
from functional_sgd.fusion.backends.triton import launch
from functional_sgd.fusion.backends.triton.launch import TritonBackend
from tests.functional_sgd.fusion.helpers import draw

Tree = Any

FUNCTIONS = {
    **{
        name: getattr(np, name)
        for name in "exp expm1 log log1p log2 sin cos tanh trunc rint fmod copysign".split()
    },
    "pow": np.power,
    "atan2": np.arctan2,
}
"""What kernels use of CUDA's library of functions, which the interpreter does not have."""


class Library:
    """Stands in for triton.language.extra.libdevice."""

    def __getattr__(self, name: str) -> Any:
        return functools.partial(_apply, FUNCTIONS[name])


def _apply(function: Any, *args: Any) -> Any:
    from triton.language import tensor
    from triton.runtime.interpreter import TensorHandle

    largest = max(args, key=lambda arg: arg.handle.data.size)
    assert len({arg.dtype for arg in args}) == 1, "libdevice takes arguments of one dtype"
    data = function(*(arg.handle.data for arg in args)).astype(largest.handle.data.dtype)
    return tensor(TensorHandle(data, largest.dtype), largest.type)


def _reduced(function: Any) -> Any:
    """tl.sum and its kin are compiled functions, which the interpreter cannot call."""

    def reduce(value: Any, axis: int | None = None) -> Any:
        from triton.language import block_type, tensor
        from triton.runtime.interpreter import TensorHandle

        data = np.asarray(function(value.handle.data, axis), dtype=value.handle.data.dtype)
        kind = value.dtype if axis is None else block_type(value.dtype, list(data.shape))
        return tensor(TensorHandle(data.reshape(data.shape or 1), value.dtype), kind)

    return reduce


@contextmanager
def interpreting() -> Iterator[None]:
    """Leaves on the CPU are treated as if they were on a GPU, by interpreted kernels."""
    extra = pytest.importorskip("triton.language.extra")
    import triton.language

    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setattr(extra, "libdevice", Library(), raising=False)
        for name in ("sum", "max", "min"):
            patch.setattr(triton.language, name, _reduced(getattr(np, name)))
        patch.setattr(TritonBackend, "treats", lambda self, where: True)
        patch.setattr(CBackend, "treats", lambda self, where: False)
        launch.loaded.cache_clear()
        try:
            yield
        finally:
            launch.loaded.cache_clear()


@pytest.fixture
def interpreted() -> Iterator[None]:
    """`interpreting`, for a test."""
    with interpreting():
        yield


@contextmanager
def pretending() -> Iterator[None]:
    """Kernels are compiled as for an H200, whether there is one or not; they cannot be launched."""
    driver = pytest.importorskip("triton.runtime").driver
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", Driver())
        launch.loaded.cache_clear()
        try:
            yield
        finally:
            launch.loaded.cache_clear()


def odd_sizes(dtype: torch.dtype) -> Tree:
    """Leaves that are empty, 0-d, about as long as a block, longer, and one without a gradient."""
    block = launch.BLOCK
    shapes = {
        "a": (0, 3),
        "b": [(), (block - 1,)],
        "c": (4, block // 4),
        "idle": (4,),
        "more": (2 * block + 1,),
    }
    return optree.tree_map(
        lambda shape: draw(shape, dtype, 1 + sum(shape)), shapes, is_leaf=lambda x: type(x) is tuple
    )
