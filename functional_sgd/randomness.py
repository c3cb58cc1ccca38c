"""Randomness as data: numbers that are a function of (seed, step, leaf, element).

A rule with a keyword `key` draws from it with `uniform` and `normal`. The same key gives the same
numbers, bit for bit, leaf by leaf, in a kernel on any device, after a resume and in a fork.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from functional_sgd.sharded import distributed, element_numbers, over_pieces

# Rotations and parity are those of threefry2x32 in Random123.
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
# torch has hardly any arithmetic for unsigned integers, so 32-bit words are kept in int64.
_MASK = 0xFFFFFFFF
PARITY = 0x1BD11BDA

ROUNDS = 20

SHORT = 0xFFFF
"""The place in a chain that the key of short draws belongs to; no rule has it."""

FACTOR = 46427
"""Short draws of a chain are those of one key, times different powers of this, mod 2**16: a power
takes a twentieth of the time of new bits. It is the factor for which pairs that are up to 160
powers apart lie on the finest lattices: their shortest vector is 61 of the 275 that could be.
"""

DRAWS = 8
"""Short draws that a rule may make."""

BLOCK = 256
"""Elements in a row that kernels treat together, where they must: short draws of a block come from
64 counters, each of which has bits for four elements, 64 places apart.
"""

_CENTRAL = (
    (-39.69683028665376, 220.9460984245205, -275.9285104469687),
    (138.3577518672690, -30.66479806614716, 2.506628277459239),
    (-54.47609879822406, 161.5858368580409, -155.6989798598866),
    (66.80131188771972, -13.28068155288572, 1.0),
)
"""Acklam's rational approximation of the normal quantile in the middle, of p - 0.5 squared."""

_TAIL = (
    (-0.5249186823879564, -9.097996200171837, -21.679749835915683, -5.502736026582449),
    (1.15844337526301,),
    (0.013054273727679883, 0.9240287015675325, 5.917144920295236, 6.5722561787572165),
    (1.0,),
)
"""A rational approximation of the quantile in the tail, of -log(p) / 5, to 3e-8 of its value.

Fitted to p in [2**-34, 0.0243]. The usual ones take a root, and torch's own float32 root is an ulp
off for a fifth of all numbers on processors with AVX-512.
"""

_TAIL_BEGINS = 0.02425


class Key(Protocol):
    """What draws are made from: the words of a leaf, or a symbol that stands for them."""

    def bits(self, like: Any, draw: int) -> tuple[Any, Any]:
        """Two columns of random numbers shaped like `like`: in [0, 1), and in (0, 0.5)."""

    def short(self, like: Any, draw: int) -> Any:
        """A column of 16 random bits each, as whole numbers."""


@dataclass(frozen=True)
class LeafKey:
    """The key of a rule for one leaf at one step: two words of 32 bits, as 0-d int64 tensors, that
    all rules have in common, and the rule's position.
    """

    common: tuple[Tensor, Tensor]
    position: int
    leaf: Tensor | None = None  # the DTensor, if draws are for its piece on this process

    @property
    def words(self) -> tuple[Tensor, Tensor]:
        """Two words that are the rule's own."""
        return words_at(self.common, self.position)

    def bits(self, like: Tensor, draw: int) -> tuple[Tensor, Tensor]:
        """`bits_of`, for a column that may be a DTensor."""
        words = self.words
        if distributed(like):
            draws: tuple[Tensor, Tensor] = over_pieces(
                lambda piece, leaf: bits_of(words, piece, draw, leaf), like
            )
            return draws
        return bits_of(words, like, draw, self.leaf)

    def short(self, like: Tensor, draw: int) -> Tensor:
        """`short_of`, times the rule's and the draw's own factor."""
        words, factor = words_at(self.common, SHORT), factor_of(self.position, draw)
        if distributed(like):
            (made,) = over_pieces(
                lambda piece, leaf: (multiple(short_of(words, piece, leaf), factor),), like
            )
            bits: Tensor = made
            return bits
        return multiple(short_of(words, like, self.leaf), factor)


@dataclass(frozen=True)
class TrialKey:
    """The key of a trial run, in which every draw is the same number."""

    def bits(self, like: Tensor, draw: int) -> tuple[Tensor, Tensor]:
        """The same numbers for every element."""
        return torch.full_like(like, 0.75), torch.full_like(like, 0.25)

    def short(self, like: Tensor, draw: int) -> Tensor:
        """The same bits for every element."""
        return torch.full_like(like, 0x4000, dtype=torch.int32)


def uniform(key: Key, like: Tensor, draw: int = 0) -> Tensor:
    """Uniform random numbers in [0, 1), of the shape and dtype of `like`; multiples of 2**-24.

    A second draw in the same rule needs another number: `uniform(key, grad, draw=1)`.

    >>> from functional_sgd.randomness import key_of
    >>> key = key_of(torch.tensor(0), torch.tensor(1), leaf=0, position=0)
    >>> uniform(key, torch.zeros(3))
    tensor([0.1387, 0.8497, 0.4858])
    """
    drawn: Tensor = key.bits(like, 2 * draw)[0]
    return drawn


def normal(key: Key, like: Tensor, draw: int = 0) -> Tensor:
    """Normal random numbers (mean 0, variance 1), of the shape and dtype of `like`; up to 6.2.

    The quantile function of a uniform number, in arithmetic that rounds alike everywhere: that is
    what makes the bits the same in every executor, where log and cos of libraries differ.

    >>> from functional_sgd.randomness import key_of
    >>> key = key_of(torch.tensor(0), torch.tensor(1), leaf=0, position=0)
    >>> normal(key, torch.zeros(3))
    tensor([-0.8920,  0.0096,  1.7126])
    """
    side, tail = key.bits(like, 2 * draw + 1)
    size = -_quantile(tail)
    drawn: Tensor = torch.where(side < 0.5, -size, size)
    return drawn


def key_of(seed: Tensor, step: Tensor, leaf: int | Tensor, position: int) -> LeafKey:
    """The key of a rule, by its position in the chain, for one leaf at one step.

    For the test of a rule that draws. Leaves are counted in tree order, from 0, as positions are;
    `seed` is state["seed"], and step is 1 at the first update.

    With a vector of leaf numbers, the words of all these leaves.
    """
    # step * 0 turns the leaf's number into a tensor like the step: on its device, and in its batch.
    words = threefry((seed & _MASK, (seed >> 32) & _MASK), (step & _MASK, step * 0 + leaf))
    return LeafKey(words, position)


def words_at(common: tuple[Tensor, Tensor], position: int) -> tuple[Tensor, Tensor]:
    """The words of a place in a chain, made of those of a leaf at a step."""
    return threefry(common, (common[0] * 0 + position, common[0] * 0))


def bits_of(
    words: Sequence[Tensor], like: Tensor, draw: int, leaf: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Element i (in logical order) has the bits of threefry2x32 at the counter (i, draw)."""
    index = element_numbers(like, leaf)
    # Draws are 2**48 counters apart, which is more than a leaf has elements.
    high = (index >> 32) ^ (draw << 16)
    one, two = threefry(tuple(word.to(like.device) for word in words), (index, high))
    # float32 holds 24 bits exactly, so float32 and float64 get the same numbers. The added half
    # keeps the tail away from 0, whose quantile is infinite.
    return (one >> 8).to(like.dtype) * 2**-24, ((two >> 1).to(like.dtype) + 0.5) * 2**-32


def short_of(words: Sequence[Tensor], like: Tensor, leaf: Tensor | None = None) -> Tensor:
    """16 random bits for each element, in int32: four elements share threefry2x32 at one counter,
    and have a quarter of its bits each.
    """
    index = element_numbers(like, leaf)
    counter = index // BLOCK * (BLOCK // 4) + index % (BLOCK // 4)
    made = threefry(tuple(word.to(like.device) for word in words), (counter, counter >> 32))
    place = index % BLOCK // (BLOCK // 4)
    word = torch.where(place < 2, *made)
    return torch.where(place % 2 == 0, word & 0xFFFF, word >> 16).to(torch.int32)


def multiple(short: Tensor, factor: int) -> Tensor:
    """Other short random numbers: the product, mod 2**16."""
    # The product of two 16-bit numbers does not fit into int32.
    return (short.to(torch.int64) * factor & 0xFFFF).to(torch.int32)


def factor_of(position: int, draw: int) -> int:
    """What the short draws of a rule are multiplied by. Raises ValueError beyond the eighth."""
    if not 0 <= draw < DRAWS:
        raise ValueError(f"a rule has short draws 0 to {DRAWS - 1}, got draw={draw}.")
    return pow(FACTOR, DRAWS * position + draw + 1, 1 << 16)


def threefry(key: Sequence[Tensor], counter: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """threefry2x32 with 20 rounds, in int64 tensors that hold words of 32 bits.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Random123).

    >>> zero = torch.tensor(0)
    >>> [f"{word.item():08x}" for word in threefry((zero, zero), (zero, zero))]
    ['6b200159', '99ba4efe']
    """
    words = (key[0], key[1], key[0] ^ key[1] ^ PARITY)
    one, two = (counter[0] + words[0]) & _MASK, (counter[1] + words[1]) & _MASK
    for group in range(ROUNDS // 4):
        for rotation in ROTATIONS[group % 2]:
            one = (one + two) & _MASK
            two = (((two << rotation) | (two >> (32 - rotation))) & _MASK) ^ one
        one = (one + words[(group + 1) % 3]) & _MASK
        two = (two + words[(group + 2) % 3] + group + 1) & _MASK
    return one, two


def _quantile(p: Tensor) -> Tensor:
    """The normal quantile of p in (0, 0.5): negative numbers."""
    offset = p - 0.5
    square = offset * offset
    middle = offset * _polynomial(_CENTRAL[0] + _CENTRAL[1], square)
    middle = middle / _polynomial(_CENTRAL[2] + _CENTRAL[3], square)
    far = torch.where(p < _TAIL_BEGINS, p, _TAIL_BEGINS)
    place = -0.2 * _log(far)
    outer = _polynomial(_TAIL[0] + _TAIL[1], place) / _polynomial(_TAIL[2] + _TAIL[3], place)
    return torch.where(p < _TAIL_BEGINS, outer, middle)


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    value: Any = coefficients[0]
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    result: Tensor = value
    return result


def _log(p: Tensor) -> Tensor:
    """log(p) for p in [2**-33, 1), from operations that are rounded alike everywhere."""
    mantissa, exponent = p, p * 0.0
    for power in (16, 8, 4, 2, 1):  # until the mantissa is in [0.5, 1)
        small = mantissa < 2.0**-power
        mantissa = torch.where(small, mantissa * 2.0**power, mantissa)
        exponent = torch.where(small, exponent - power, exponent)
    # The loop shifts by 31 bits at most; the smallest p, 2**-33, needs one more.
    small = mantissa < 0.5
    mantissa = torch.where(small, mantissa * 2.0, mantissa)
    exponent = torch.where(small, exponent - 1.0, exponent)
    ratio = (mantissa - 1.0) / (mantissa + 1.0)  # log(m) = 2 atanh((m - 1) / (m + 1))
    square = ratio * ratio
    series = _polynomial((1 / 13, 1 / 11, 1 / 9, 1 / 7, 1 / 5, 1 / 3, 1.0), square)
    return exponent * 0.6931471805599453 + 2.0 * ratio * series
