"""Optimizers whose authors' code no package has as it is: loops over the leaves that do what it
does, within 1e-12 over a hundred steps.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import functional_sgd as fs
from functional_sgd import Optimizer, partition

SHAPES = ((4, 3), (5,), ())
STEPS = 100
Grads = list[list[Tensor]]


def drawn(seed: int) -> list[Tensor]:
    """A leaf of each shape; every 17th time, ten times as large."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 if seed % 17 == 16 else 1.0
    return [
        scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES
    ]


def tiger_by_hand(params: list[Tensor], steps: Grads) -> list[Tensor]:
    """With the half rate of biases for vectors."""
    after = []
    for x, grads in zip(params, zip(*steps, strict=True), strict=True):
        m = torch.zeros_like(x)
        for g in grads:
            m = 0.965 * m + (1 - 0.965) * g
            if x.dim() == 1:
                x = x - 0.5 * 0.01 * m.sign()
            else:
                x = x - 0.01 * x.square().mean().sqrt() * (m.sign() + 0.1 * x)
        after.append(x)
    return after


def adam_mini_by_hand(params: list[Tensor], steps: Grads) -> list[Tensor]:
    after = []
    for x, grads in zip(params, zip(*steps, strict=True), strict=True):
        m = torch.zeros_like(x)
        v: Any = 0.0
        for t, g in enumerate(grads, 1):
            block = (1,) if x.dim() > 1 else tuple(range(x.dim()))
            v = 0.999 * v + 0.001 * (g * g).mean(block, keepdim=True)
            x = x * (1 - 0.01 * 0.1)
            m = 0.9 * m + 0.1 * g
            h = v.sqrt() / math.sqrt(1 - 0.999**t) + 1e-8
            x = x - 0.01 * m * (1 / (1 - 0.9**t) / h)
        after.append(x)
    return after


def spam_by_hand(params: list[Tensor], steps: Grads) -> list[Tensor]:
    """Spikes of 3, restarts every 20 steps, patience 5, warm-ups of 7."""
    after = []
    for x, grads in zip(params, zip(*steps, strict=True), strict=True):
        m = v = torch.zeros_like(x)
        since = 8
        for t, g in enumerate(grads, 1):
            scale = 1.0 if since >= 7 else 1 - 0.99 * (1 + math.cos(math.pi * since / 8)) / 2
            if t % 20 == 0:
                m = v = torch.zeros_like(x)
            if t >= 5 and t % 20 >= 5:
                g = torch.where(g**2 > 3 * v, g.sign() * (3 * v).sqrt(), g)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            rate = 0.01 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * scale
            x = x - rate * m / (v.sqrt() + 1e-6)
            x = x - 0.01 * 0.1 * x
            since = 0 if (t + 1) % 20 == 0 else since + 1
        after.append(x)
    return after


def sophia_by_hand(params: list[Tensor], steps: Grads) -> list[Tensor]:
    """With the squared gradient as the Hessian, every third step."""
    after = []
    for x, grads in zip(params, zip(*steps, strict=True), strict=True):
        m = h = torch.zeros_like(x)
        for t, g in enumerate(grads, 1):
            m = 0.965 * m + 0.035 * g
            h = 0.99 * h + 0.01 * g * g if t % 3 == 1 else h
            x = x - 0.01 * 0.1 * x
            x = x - 0.01 * (m / (0.5 * h).clamp(min=1e-12)).clamp(-1, 1)
        after.append(x)
    return after


def is_vector(path: str, leaf: Tensor) -> str:
    return "vector" if leaf.dim() == 1 else "other"


CASES: dict[str, tuple[Optimizer, Callable[[list[Tensor], Grads], list[Tensor]]]] = {
    "tiger": (
        partition(
            {"vector": fs.signum(lr=0.005, mom=0.965), "other": fs.tiger(lr=0.01, wd=0.1)},
            is_vector,
        ),
        tiger_by_hand,
    ),
    "adam_mini": (fs.adam_mini(lr=0.01, wd=0.1), adam_mini_by_hand),
    "spam": (
        fs.spam(lr=0.01, spike=3.0, restart_every=20, patience=5, warmup=7, wd=0.1),
        spam_by_hand,
    ),
    "sophia": (fs.sophia(lr=0.01, rho=0.5, hessian_every=3), sophia_by_hand),
}


@pytest.mark.parametrize("name", CASES)
def test_same_params_after_a_hundred_steps(name: str) -> None:
    opt, by_hand = CASES[name]
    first, steps = drawn(0), [drawn(1 + step) for step in range(STEPS)]
    params: Any = first
    state = opt.init(params)
    for grads in steps:
        extras = {"hessian": [g * g for g in grads]} if "hessian" in opt.required else {}
        params, state = opt(params, grads, state, **extras)
    for leaf, expected in zip(params, by_hand(first, steps), strict=True):
        torch.testing.assert_close(leaf, expected, rtol=0, atol=1e-12)


def test_langevin_samples_have_the_temperature() -> None:
    """In a bowl x**2 / 2, the variance is temperature / (1 - lr / 2), of 10,000 chains."""
    opt, params = fs.sgld(lr=0.5, temperature=0.3), torch.zeros(10_000, dtype=torch.float64)
    fast, state = fs.fuse(opt), opt.init(params)
    for _ in range(30):
        params, state = fast(params, params, state)
    assert float(params.mean()) == pytest.approx(0.0, abs=0.02)
    assert float(params.var()) == pytest.approx(0.4, rel=0.05)


def test_optimism_ends_a_game_that_plain_descent_leaves() -> None:
    """min over x, max over y of x * y, from (1, 1): the published reason for optimism."""
    start = torch.ones(2, dtype=torch.float64)
    ends = {}
    for name, opt in (("plain", fs.sgd(lr=0.3)), ("optimistic", fs.optimistic_sgd(lr=0.3))):
        point, state = start, opt.init(start)
        for _ in range(100):
            point, state = opt(point, torch.stack([point[1], -point[0]]), state)
        ends[name] = float(point.norm())
    assert ends["optimistic"] < 0.1
    assert ends["plain"] > 10
