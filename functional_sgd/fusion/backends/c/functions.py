"""Functions of C kernels: half precision, remainders, random numbers."""

from functional_sgd.randomness import BLOCK, PARITY, ROTATIONS, SHORT

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
static inline float neighbour_bfloat16(float f, uint32_t random) {
    uint32_t u; memcpy(&u, &f, 4);
    uint32_t size = u & 0x7fffffffu, found = ((size + random) & 0xffff0000u) | (u ^ size);
    found = size < 0x7f800000u ? found : u;
    memcpy(&f, &found, 4);
    return f;
}
static inline float neighbour_float16(float f, uint32_t random) {
    uint32_t u; memcpy(&u, &f, 4);
    uint32_t size = u & 0x7fffffffu, found = (size + (random >> 3)) & 0xffffe000u, few;
    float rest = floorf(fabsf(f) * 0x1p24f + (float)(int32_t)random * 0x1p-16f) * 0x1p-24f;
    memcpy(&few, &rest, 4);
    found = (size < 0x38800000u ? few : found) | (u ^ size);
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
    """`randomness.threefry` in C: one of its two words; and a short draw."""
    lines = [
        "static inline uint32_t threefry(uint32_t k0, uint32_t k1, uint64_t i, uint32_t draw,"
        " int word) {",
        f"    const uint32_t k2 = k0 ^ k1 ^ {PARITY:#x}u;",
        "    uint32_t x = (uint32_t)i + k0, y = ((uint32_t)(i >> 32) ^ (draw << 16)) + k1;",
    ]
    for group in range(5):
        lines += [
            f"    x += y; y = ((y << {r}) | (y >> {32 - r})) ^ x;" for r in ROTATIONS[group % 2]
        ]
        one, two = (group + 1) % 3, (group + 2) % 3
        lines.append(f"    x += k{one}; y += k{two} + {group + 1}u;")
    lines += ["    return word ? y : x;", "}"]
    lines += [
        "static inline uint32_t short_bits(uint32_t k0, uint32_t k1, uint64_t i, uint32_t draw) {",
        f"    const uint32_t place = i % {BLOCK} / {BLOCK // 4};",
        f"    const uint64_t counter = i / {BLOCK} * {BLOCK // 4} + i % {BLOCK // 4};",
        f"    const uint32_t x = threefry(k0, k1, counter, {SHORT}u + draw, place >> 1);",
        "    return place & 1 ? x >> 16 : x & 0xffffu;",
        "}",
    ]
    return "\n" + "\n".join(lines) + "\n"


RANDOM_FUNCTIONS = _threefry()
"""What a kernel has that draws."""
