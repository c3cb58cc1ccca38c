"""Runs in which leaves join late and have no gradient now and then."""

from collections.abc import Iterator

import torch
from torch import Tensor

SHAPES = ((4, 3), (5,), (), (2, 2))
STEPS, JOINS = 60, 20


def start() -> list[Tensor]:
    """Four leaves in float64."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def gradients(steps: int = STEPS) -> Iterator[list[Tensor | None]]:
    """For each step: the first leaf always has one, the next two at random, the last from step
    JOINS on.
    """
    generator = torch.Generator().manual_seed(2)
    for step in range(steps):
        draws = torch.rand(len(SHAPES), generator=generator, dtype=torch.float32).tolist()
        there = (True, draws[1] < 0.6, draws[2] < 0.3, step >= JOINS and draws[3] < 0.8)
        every = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
        yield [grad if is_there else None for grad, is_there in zip(every, there, strict=True)]


def largest_gap(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Over all elements of all leaves."""
    return max(float((a - b.detach()).abs().max()) for a, b in zip(ours, theirs, strict=True))
