"""Columns as numbers of 8 bits, with a scale for each block of 256 elements: the same bits in every
executor.

A code is a float of few bits, relative to the largest power of two that is in its block: 4 bits of
exponent, 3 of mantissa and a sign, or 5 and 3 where no value is negative. So large and small
numbers of a block are as exact, to an eighth of themselves, and no root or table is needed. Below
the smallest power of two codes are evenly spaced down to 0, since what is encoded is the value plus
that power.
"""

import torch
from torch import Tensor

from functional_sgd.randomness import BLOCK, Key
from functional_sgd.rounding import INFINITE, MAGNITUDE, overridable

OFFSET = {True: 2.0**-14, False: 2.0**-30}
"""What is added to a value, in units of its block's scale, by whether it may be negative."""

OFFSET_BITS = {True: 0x38800000, False: 0x30800000}
"""The bits of these numbers."""

LARGEST_CODE = {True: 0x7F, False: 0xFF}

CUT = 20
"""How many bits of float32's mantissa a code does without."""

SIGN = 0x80

LARGEST_SCALE = 0x7F000000
"""The bits of 2**127, which has no reciprocal: larger numbers are not encoded."""


def count_of(size: int) -> int:
    """How many blocks so many elements have; the last one may be shorter."""
    return -(-size // BLOCK)


@overridable
def block_scale(value: Tensor) -> Tensor:
    """The largest power of two in each block of 256 elements, in logical order: float32, one number
    for each block. It is 0 where all are 0 (or below 1.2e-38), infinite where one is not finite.

    >>> block_scale(torch.tensor([0.3, -5.0]))
    tensor([4.])
    """
    flat = value.detach().to(torch.float32).reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -flat.shape[0] % BLOCK)).contiguous()
    # The bits of magnitudes have the order of the magnitudes, so integers can be compared. Without
    # its mantissa the largest is a power of two. NaN and infinity have the largest exponent and
    # win.
    sizes = padded.view(torch.int32) & MAGNITUDE
    largest = sizes.reshape(-1, BLOCK).amax(1) & INFINITE
    return largest.view(torch.float32)


def encode(value: Tensor, scale: Tensor, key: Key, draw: int = 0, signed: bool = True) -> Tensor:
    """Codes of 8 bits for values, given the scales of their blocks: one of the two neighbours that
    have codes, so chosen that the mean of what is decoded is the value.

    Without a sign, a value that is not 0 never becomes 0, so that one may divide by it.
    """
    found: Tensor = encoded(value, scale, key.short(value, draw), signed)
    return found


@overridable
def encoded(value: Tensor, scale: Tensor, short: Tensor, signed: bool) -> Tensor:
    """The codes that 16 random bits choose: they are added below what is cut off then."""
    value = value.detach().to(torch.float32).contiguous()
    # Multiplying by the reciprocal is exact for powers of two. In a block of zeros, a division
    # would give NaN.
    size = value.abs() * _spread(_reciprocal(scale), value) + OFFSET[signed]
    # The 16 random bits fill the upper part of the 20 bits that are cut off. + binds tighter than
    # >>.
    code = (size.view(torch.int32) + (short << 4) >> CUT) - (OFFSET_BITS[signed] >> CUT)
    code = code.clamp(max=LARGEST_CODE[signed])  # what is not finite
    if signed:
        negative = value.view(torch.int32) < 0
        return torch.where(negative, code | SIGN, code).to(torch.uint8)
    return torch.where((code == 0) & (value > 0), 1, code).to(torch.uint8)


@overridable
def decode(codes: Tensor, scale: Tensor, signed: bool = True) -> Tensor:
    """The values of codes, in float32."""
    whole = codes.to(torch.int32)
    code = whole & LARGEST_CODE[signed]
    size = ((code << CUT) + OFFSET_BITS[signed]).view(torch.float32) - OFFSET[signed]
    value = size * _spread(scale.to(torch.float32), size)
    if not signed:
        return value
    return torch.where(whole >= SIGN, -value, value)


def _reciprocal(scale: Tensor) -> Tensor:
    """1 / scale for powers of two, 0 where there is none."""
    bits = scale.to(torch.float32).view(torch.int32)
    # The stored exponents of a power of two and of its reciprocal add up to 254, the exponent of
    # LARGEST_SCALE.
    has_one = (bits > 0) & (bits < LARGEST_SCALE)
    return torch.where(has_one, LARGEST_SCALE - bits, 0).view(torch.float32)


def _spread(numbers: Tensor, like: Tensor) -> Tensor:
    """The number of its block for every element."""
    each = numbers.unsqueeze(1).expand(-1, BLOCK).reshape(-1)
    return each[: like.numel()].reshape(like.shape)
