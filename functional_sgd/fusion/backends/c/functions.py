"""Functions of C kernels: half precision, remainders, random numbers."""

from functional_sgd.blocks import CUT, LARGEST_SCALE
from functional_sgd.randomness import BLOCK, PARITY, ROTATIONS
from functional_sgd.rounding import INFINITE, MAGNITUDE

# memcpy and not a pointer cast: to read a float through an integer pointer is undefined in C.
# to_bfloat16: adding 0x7fff plus the last bit kept rounds to nearest, ties to even.
# neighbour_bfloat16, neighbour_float16: from the largest number on, half a step leads no further.
# neighbour_float16: below 2**-14 float16 is evenly spaced, so multiples of 2**-24 are rounded.
FUNCTIONS = """\
#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float from_bfloat16(uint16_t x) {
    uint32_t u = (uint32_t)x << 16; float f; memcpy(&f, &u, 4);
    return f;
}
static inline uint16_t to_bfloat16(float f) {
    uint32_t u; memcpy(&u, &f, 4);
    uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return f != f ? 0x7fc0 : (uint16_t)rounded;
}
static inline uint16_t high_half(float f) {
    uint32_t u; memcpy(&u, &f, 4);
    return u >> 16;
}
static inline float neighbour_bfloat16(float f, uint32_t random) {
    uint32_t u; memcpy(&u, &f, 4);
    uint32_t size = u & 0x7fffffffu, found = (size + random) & 0xffff0000u;
    found = (size < 0x7f7f8000u && found > 0x7f7f0000u ? 0x7f7f0000u : found) | (u ^ size);
    found = size < 0x7f800000u ? found : u;
    memcpy(&f, &found, 4);
    return f;
}
static inline float neighbour_float16(float f, uint32_t random) {
    uint32_t u; memcpy(&u, &f, 4);
    uint32_t size = u & 0x7fffffffu, found = (size + (random >> 3)) & 0xffffe000u, few;
    float rest = floorf(fabsf(f) * 0x1p24f + (float)(int32_t)random * 0x1p-16f) * 0x1p-24f;
    memcpy(&few, &rest, 4);
    found = size < 0x38800000u ? few : found;
    found = (size < 0x477ff000u && found > 0x477fe000u ? 0x477fe000u : found) | (u ^ size);
    found = size < 0x7f800000u ? found : u;
    memcpy(&f, &found, 4);
    return f;
}
static inline double remainder_double(double a, double b) {
    double r = fmod(a, b);
    return (r != 0 && (r < 0) != (b < 0)) ? r + b : r;
}
static inline float remainder_float(float a, float b) {
    float r = fmodf(a, b);
    return (r != 0 && (r < 0) != (b < 0)) ? r + b : r;
}
"""
"""What every kernel has."""


def _threefry() -> str:
    """`randomness.threefry` in C: both of its words, one of them, the short draws of a block."""
    lines = [
        "static inline void both_words(uint32_t k0, uint32_t k1, uint32_t x, uint32_t y,"
        " uint32_t *one, uint32_t *two) {",
        f"    const uint32_t k2 = k0 ^ k1 ^ {PARITY:#x}u;",
        "    x += k0; y += k1;",
    ]
    for group in range(5):
        for r in ROTATIONS[group % 2]:
            lines.append(f"    x += y; y = ((y << {r}) | (y >> {32 - r})) ^ x;")
        one, two = (group + 1) % 3, (group + 2) % 3
        lines.append(f"    x += k{one}; y += k{two} + {group + 1}u;")
    lines += [
        "    *one = x; *two = y;",
        "}",
        "static inline uint32_t threefry(uint32_t k0, uint32_t k1, uint64_t i, uint32_t draw,"
        " int word) {",
        "    uint32_t x, y;",
        "    both_words(k0, k1, (uint32_t)i, (uint32_t)(i >> 32) ^ (draw << 16), &x, &y);",
        "    return word ? y : x;",
        "}",
        "/* Short draws of a block: four of them, a quarter of it apart, share a counter. */",
        "static inline void short_block(uint32_t k0, uint32_t k1, uint64_t block,"
        " uint16_t *restrict out) {",
        f"    const uint64_t first = block * {BLOCK // 4};",
        "    const uint32_t high = (uint32_t)(first >> 32);",
        "    #pragma omp simd",
        f"    for (uint32_t j = 0; j < {BLOCK // 4}; ++j) {{",
        "        uint32_t x, y;",
        "        both_words(k0, k1, (uint32_t)first + j, high, &x, &y);",
        f"        out[j] = x, out[j + {BLOCK // 4}] = x >> 16;",
        f"        out[j + {BLOCK // 2}] = y, out[j + {3 * BLOCK // 4}] = y >> 16;",
        "    }",
        "}",
    ]
    return "\n" + "\n".join(lines) + "\n"


RANDOM_FUNCTIONS = _threefry()
"""What a kernel has that draws."""

# reciprocal_of: u - 1 wraps around for 0, so one comparison rules out 0 and too large scales.
BLOCK_FUNCTIONS = f"""
static inline float float_of(uint32_t u) {{ float f; memcpy(&f, &u, 4); return f; }}
static inline uint32_t bits_of(float f) {{ uint32_t u; memcpy(&u, &f, 4); return u; }}
static inline uint32_t magnitude_of(float f) {{ return bits_of(f) & {MAGNITUDE:#x}u; }}
static inline float scale_of(uint32_t largest) {{ return float_of(largest & {INFINITE:#x}u); }}
static inline float reciprocal_of(float scale) {{
    const uint32_t u = bits_of(scale);
    return float_of(u - 1 < {LARGEST_SCALE - 1:#x}u ? {LARGEST_SCALE:#x}u - u : 0);
}}
static inline uint32_t encoded(float f, float scale, uint32_t random, uint32_t offset,
                               uint32_t most, uint32_t sign) {{
    const uint32_t u = bits_of(fabsf(f) * reciprocal_of(scale) + float_of(offset));
    uint32_t code = ((u + (random << 4)) >> {CUT}) - (offset >> {CUT});
    code = code < most ? code : most;
    return sign ? code | (bits_of(f) >> 24 & sign) : code | ((code == 0) & (f > 0));
}}
static inline float decoded(uint32_t code, float scale, uint32_t offset, uint32_t most,
                            uint32_t sign) {{
    const float size = float_of(((code & most) << {CUT}) + offset) - float_of(offset);
    return float_of(bits_of(size * scale) | (code & sign) << 24);
}}
"""
"""What a kernel has that treats numbers of 8 bits: `functional_sgd.blocks` in C."""
