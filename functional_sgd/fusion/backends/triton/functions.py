"""Functions of Triton kernels that draw random numbers and round."""

import torch

from functional_sgd.blocks import CUT, LARGEST_SCALE, SIGN
from functional_sgd.randomness import BLOCK, PARITY, ROTATIONS
from functional_sgd.rounding import INFINITE, LARGEST, MAGNITUDE, OVER, SMALLEST_HALF


def _threefry() -> str:
    """`randomness.threefry` in Triton: both of its words."""
    lines = [
        "",
        "",
        "@triton.jit",
        "def threefry(k0, k1, index, draw: tl.constexpr):",
        f"    k2 = k0 ^ k1 ^ tl.full((), {PARITY:#x}, tl.uint32)",
        "    x = index.to(tl.uint32) + k0",
        "    y = ((index.to(tl.uint64) >> 32).to(tl.uint32)"
        " ^ tl.full((), draw << 16, tl.uint32)) + k1",
    ]
    for group in range(5):
        for r in ROTATIONS[group % 2]:
            lines.append("    x = x + y")
            lines.append(f"    y = ((y << {r}) | (y >> {32 - r})) ^ x")
        one, two = (group + 1) % 3, (group + 2) % 3
        lines.append(f"    x = x + k{one}")
        lines.append(f"    y = y + k{two} + tl.full((), {group + 1}, tl.uint32)")
    return "\n".join([*lines, "    return x, y", ""])


_SHORT = f"""

@triton.jit
def short_bits(k0, k1, index):
    # A quarter of the bits at a counter that four elements of a block share.
    place = index % {BLOCK} // {BLOCK // 4}
    counter = index // {BLOCK} * {BLOCK // 4} + index % {BLOCK // 4}
    x, y = threefry(k0, k1, counter, 0)
    word = tl.where(place < 2, x, y)
    return tl.where(place % 2 == 0, word & 0xFFFF, word >> 16).to(tl.int32)
"""

RANDOM_FUNCTIONS = _threefry() + _SHORT
"""`randomness.threefry`, and short draws."""

# tl.int32 is signed: -65536 is the mask 0xFFFF0000, and -8192 is 0xFFFFE000.
ROUNDING_FUNCTIONS = f"""

@triton.jit
def rounded_bfloat16(value):
    # By hand, since the interpreter's own conversion cuts off.
    bits = value.to(tl.int32, bitcast=True)
    found = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where((bits & {MAGNITUDE}) < {INFINITE}, found, bits).to(tl.float32, bitcast=True)


@triton.jit
def rounded_float16(value):
    return value.to(tl.float16).to(tl.float32)


@triton.jit
def neighbour_bfloat16(value, random):
    bits = value.to(tl.int32, bitcast=True)
    size = bits & {MAGNITUDE}
    found = (size + random) & -65536
    most = tl.minimum(found, {LARGEST[torch.bfloat16]})
    found = tl.where(size < {OVER[torch.bfloat16]}, most, found) | (bits ^ size)
    return tl.where(size < {INFINITE}, found, bits).to(tl.float32, bitcast=True)


@triton.jit
def neighbour_float16(value, random):
    bits = value.to(tl.int32, bitcast=True)
    size = bits & {MAGNITUDE}
    few = size.to(tl.float32, bitcast=True) * 16777216.0 + random.to(tl.float32) * {2.0**-16}
    few = (tl.floor(few) * {2.0**-24}).to(tl.int32, bitcast=True)
    found = tl.where(size < {SMALLEST_HALF}, few, (size + (random >> 3)) & -8192)
    most = tl.minimum(found, {LARGEST[torch.float16]})
    found = tl.where(size < {OVER[torch.float16]}, most, found) | (bits ^ size)
    return tl.where(size < {INFINITE}, found, bits).to(tl.float32, bitcast=True)
"""
"""Rounding to nearest, and to one of two neighbours."""

BLOCK_FUNCTIONS = f"""

@triton.jit
def block_scale(value, inside, BLOCK: tl.constexpr):
    # For every element the largest power of two in its block.
    sizes = tl.where(inside, value.to(tl.int32, bitcast=True) & {MAGNITUDE}, 0)
    blocks = tl.reshape(sizes, (BLOCK // {BLOCK}, {BLOCK}))
    largest = tl.max(blocks, axis=1)[:, None] & {INFINITE}
    each = tl.broadcast_to(largest, (BLOCK // {BLOCK}, {BLOCK}))
    return tl.reshape(each, (BLOCK,)).to(tl.float32, bitcast=True)


@triton.jit
def encoded(
    value, scale, random, bits: tl.constexpr, offset: tl.constexpr, most: tl.constexpr,
    signed: tl.constexpr,
):
    of_scale = scale.to(tl.int32, bitcast=True)
    has_one = (of_scale > 0) & (of_scale < {LARGEST_SCALE})
    reciprocal = tl.where(has_one, {LARGEST_SCALE} - of_scale, 0).to(tl.float32, bitcast=True)
    size = tl.abs(value) * reciprocal + offset
    code = ((size.to(tl.int32, bitcast=True) + (random << 4)) >> {CUT}) - (bits >> {CUT})
    code = tl.where(code < most, code, most)
    if signed:
        return tl.where(value.to(tl.int32, bitcast=True) < 0, code | {SIGN}, code)
    return tl.where((code == 0) & (value > 0), 1, code)


@triton.jit
def decode(
    codes, scale, bits: tl.constexpr, offset: tl.constexpr, most: tl.constexpr,
    signed: tl.constexpr,
):
    whole = codes.to(tl.int32)
    value = (((whole & most) << {CUT}) + bits).to(tl.float32, bitcast=True) - offset
    value = value * scale
    if signed:
        return tl.where(whole >= {SIGN}, -value, value)
    return value
"""
"""Numbers of 8 bits: `functional_sgd.blocks` in Triton."""
