"""Functions of Triton kernels that draw random numbers and round."""

from functional_sgd.randomness import BLOCK, PARITY, ROTATIONS, SHORT
from functional_sgd.rounding import INFINITE, MAGNITUDE, SMALLEST_HALF


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
def short_bits(k0, k1, index, draw: tl.constexpr):
    # A quarter of the bits at a counter that four elements of a block share.
    place = index % {BLOCK} // {BLOCK // 4}
    counter = index // {BLOCK} * {BLOCK // 4} + index % {BLOCK // 4}
    x, y = threefry(k0, k1, counter, {SHORT} + draw)
    word = tl.where(place < 2, x, y)
    return tl.where(place % 2 == 0, word & 0xFFFF, word >> 16).to(tl.int32)
"""

RANDOM_FUNCTIONS = _threefry() + _SHORT
"""`randomness.threefry`, and short draws."""

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
    found = ((size + random) & -65536) | (bits ^ size)
    return tl.where(size < {INFINITE}, found, bits).to(tl.float32, bitcast=True)


@triton.jit
def neighbour_float16(value, random):
    bits = value.to(tl.int32, bitcast=True)
    size = bits & {MAGNITUDE}
    few = size.to(tl.float32, bitcast=True) * 16777216.0 + random.to(tl.float32) * {2.0**-16}
    few = (tl.floor(few) * {2.0**-24}).to(tl.int32, bitcast=True)
    found = tl.where(size < {SMALLEST_HALF}, few, (size + (random >> 3)) & -8192)
    found = found | (bits ^ size)
    return tl.where(size < {INFINITE}, found, bits).to(tl.float32, bitcast=True)
"""
"""Rounding to nearest, and to one of two neighbours."""
