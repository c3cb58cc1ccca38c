"""Rounding to dtypes in which leaves are kept: the same bits in every executor."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from functional_sgd.precision import HALVES
from functional_sgd.randomness import Key

CUT = {torch.bfloat16: 16, torch.float16: 13}
"""How many bits a number of float32 has more."""

LARGEST = {torch.bfloat16: 0x7F7F0000, torch.float16: 0x477FE000}
"""The bits of the largest finite number."""

OVER = {dtype: bits + (1 << (CUT[dtype] - 1)) for dtype, bits in LARGEST.items()}
"""The bits of the number half way from that to the next, from which on the nearest is infinity."""

SMALLEST_HALF = 0x38800000
"""The bits of 2**-14, from which on float16 has 11 significant bits; below it counts in 2**-24."""

INFINITE = 0x7F800000
"""The bits of float32's infinity; those of NaN are more."""

MAGNITUDE = 0x7FFFFFFF


def overridable(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that symbols may stand in for tensors of, as they may for those of torch."""

    @functools.wraps(function)
    def called(*args: Any) -> Any:
        if has_torch_function(args):
            return handle_torch_function(called, args, *args)
        return function(*args)

    return called


@overridable
def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest number that bfloat16 or float16 has, in the dtype of the value; of two that are
    as near, the one whose last bit is 0. For another dtype the value as it is.

    >>> rounded(torch.tensor([1.0, 1.003, 1.006]), torch.bfloat16)
    tensor([1.0000, 1.0000, 1.0078])
    """
    return value.to(torch.float32).to(dtype).to(value.dtype) if dtype in HALVES else value


def rounded_randomly(value: Tensor, dtype: torch.dtype, key: Key, draw: int = 0) -> Tensor:
    """One of the two neighbours that bfloat16 or float16 has, in the dtype of the value: the nearer
    the likelier, so that the mean is the value. For another dtype the value as it is.

    The chance is a multiple of 2**-16 (of 2**-13 for float16). What is no number or infinite stays.
    A number becomes infinite only where `rounded` may: from 65520 on in float16, whose largest
    number is 65504.
    A second draw in the same rule needs another number. A derivative goes through as if the value
    had not been rounded.

    >>> from functional_sgd.randomness import key_of
    >>> key = key_of(torch.tensor(0), torch.tensor(1), leaf=0, position=0)
    >>> rounded_randomly(torch.full((4,), 1.003), torch.bfloat16, key)
    tensor([1.0078, 1.0000, 1.0000, 1.0000])
    """
    found: Tensor = neighbour(value, key.short(value, draw), dtype)
    return found


@overridable
def neighbour(value: Tensor, short: Tensor, dtype: torch.dtype) -> Tensor:
    """The neighbour that 16 random bits choose: they are added below what is cut off then."""
    if dtype not in HALVES:
        return value
    found: Tensor = _Neighbour.apply(value, short, dtype)
    return found


class _Neighbour(torch.autograd.Function):
    """`neighbour`, which a derivative goes through."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, short: Tensor, dtype: torch.dtype) -> Tensor:
        bits = value.to(torch.float32).contiguous().view(torch.int32)
        size, sign = bits & MAGNITUDE, bits & ~MAGNITUDE
        cut = CUT[dtype]
        # Only as many random bits as are cut off; more would change the bits that stay.
        found = (size + (short >> (16 - cut))) & -(1 << cut)
        if dtype == torch.float16:
            # Below SMALLEST_HALF float16 has the multiples of 2**-24, so how many bits must be cut
            # depends on the number.
            few = size.view(torch.float32) * 2.0**24 + short.to(torch.float32) * 2.0**-16
            few = (few.floor() * 2.0**-24).view(torch.int32)
            found = torch.where(size < SMALLEST_HALF, few, found)
        # What the nearest number is finite for does not become infinite.
        found = torch.where(size < OVER[dtype], found.clamp(max=LARGEST[dtype]), found)
        # NaN keeps its bits: after the cut they could be those of infinity, and the sum could
        # overflow.
        found = torch.where(size < INFINITE, found | sign, bits)
        return found.view(torch.float32).to(value.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None

    @staticmethod
    def jvp(ctx: Any, value: Tensor, short: Any, dtype: Any) -> Tensor:
        return value.clone()
