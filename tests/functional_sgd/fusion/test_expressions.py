"""Kernels compute what torch computes, whatever expression numbers and truth values are in."""

import re
from random import Random

import pytest
import torch

from functional_sgd import Rule, chain, elementwise, fuse
from functional_sgd.fusion.backends.foreach import ForeachBackend
from functional_sgd.fusion.fused import BACKENDS
from tests.functional_sgd.fusion.helpers import kinds
from tests.functional_sgd.fusion.test_operators import stay, table
from tests.turns import LONG

COUNT = 6  # expressions in one kernel, since it takes longest to compile


# N stands for a number, T for a truth value, C for a constant.
NUMBERS = [
    "(N + N)", "(N - N)", "(N * N)", "(N / N)", "(N * C)", "(C - N)", "torch.abs(N)",
    "torch.maximum(N, N)", "torch.maximum(N, T)", "torch.where(T, N, N)", "torch.where(T, N, C)",
    "torch.where(T, N, T)", "(T * N)", "(N + T)", "((T / T) + N)", "(torch.square(T) + N)",
]  # fmt: skip
TRUTHS = [
    "(N < N)", "(N <= C)", "(N == N)", "(N != C)", "torch.isnan(N)", "(~T)", "(T & T)", "(T | T)",
    "(T + T)", "(T * T)", "(T == T)", "(T < T)", "(T + True)", "torch.where(T, T, T)",
    "torch.where(T, T, False)", "torch.maximum(T, T)", "torch.minimum(T, T)",
]  # fmt: skip
ENDS = {"N": ["x", "y", "(x * h)"], "T": ["(x < y)", "(y > 0)"], "C": ["0.5", "-2.0", "3"]}


def expression(random: Random, kind: str, depth: int) -> str:
    """One of this kind, of so many operations one in the other at most."""
    if depth == 0 or kind == "C":
        return random.choice(ENDS[kind])
    text = random.choice({"N": NUMBERS, "T": TRUTHS}[kind])
    return re.sub("[NTC](?![a-z])", lambda part: expression(random, part[0], depth - 1), text)


def rule_of(expressions: list[str]) -> Rule:
    """A rule that keeps the value of each expression of x (grad), y (param) and h (0.3)."""
    functions = [eval(f"lambda x, y, h: {text}") for text in expressions]

    @elementwise(**{f"r{place}": torch.zeros_like for place in range(COUNT)})
    def under_test(grad, param, r0, r1, r2, r3, r4, r5, *, h=0.3):  # type: ignore[no-untyped-def]
        values = [function(grad, param, h) for function in functions]
        return dict(r0=values[0], r1=values[1], r2=values[2], r3=values[3], r4=values[4],
                    r5=values[5])  # fmt: skip

    return under_test


@pytest.mark.parametrize("seed", range(100 if LONG else 10))
def test_an_expression_has_torchs_value(seed: int) -> None:
    random = Random(seed)
    texts = []
    for _ in range(COUNT):
        made = expression(random, random.choice("NNT"), 4)
        texts.append(f"{made} * torch.ones_like(x)")
    opt = chain(rule_of(texts), stay)
    x, y = table(torch.float32)
    expected = opt([y], [x], opt.init([y]))[1]
    for backends in (BACKENDS, (ForeachBackend(),)):
        found = fuse(opt, backends=backends)([y], [x], opt.init([y]))[1]
        for place, text in enumerate(texts):
            one, other = found[f"r{place}"][0], expected[f"r{place}"][0]
            assert torch.equal(one.nan_to_num(7e7), other.nan_to_num(7e7)), text


def test_they_are_run_by_kernels() -> None:
    random = Random(0)
    texts = [expression(random, "N", 4) for _ in range(COUNT)]
    assert kinds(fuse(chain(rule_of(texts), stay))) == ["kernel"]
