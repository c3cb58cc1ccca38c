"""REX and WSD of pytorch_optimizer at every step; the inverse square root in its paper's words."""

from typing import Any

import pytest
import torch

from functional_sgd.schedules import (
    Cosine,
    Linear,
    Polynomial,
    Rex,
    Stretch,
    inverse_sqrt,
    one_minus_sqrt,
    warmup_stable_decay,
)


def plain_sgd() -> Any:
    return torch.optim.SGD([torch.zeros(1)], lr=0.3)


def test_rex() -> None:
    peer = pytest.importorskip("pytorch_optimizer")
    scheduler = peer.REXScheduler(plain_sgd(), total_steps=40, max_lr=0.3, min_lr=0.01)
    theirs = [scheduler.step() for _ in range(50)]  # torch's base class has taken step 0
    ours = Stretch(Rex(0.3, 0.01), 40)
    assert [ours(step) for step in range(1, 51)] == pytest.approx(theirs, rel=0, abs=1e-12)


SHAPES = {"linear": Linear, "cosine": Cosine, "1-sqrt": one_minus_sqrt}


@pytest.mark.parametrize("kind", [*SHAPES, "1-square"])
def test_warmup_stable_decay(kind: str) -> None:
    peer = pytest.importorskip("pytorch_optimizer")
    opt = plain_sgd()
    scheduler = peer.get_wsd_schedule(opt, 7, 23, 20, cooldown_type=kind)
    theirs = []
    for _ in range(60):
        theirs.append(opt.param_groups[0]["lr"])
        opt.step()
        scheduler.step()
    shape = SHAPES.get(kind, lambda start, end: Polynomial(start, end, 2))
    ours = Stretch(warmup_stable_decay(0.3, 7 / 50, 20 / 50, shape=shape), 50)
    assert [ours(step) for step in range(60)] == pytest.approx(theirs, rel=0, abs=1e-12)


def test_inverse_sqrt_is_the_rate_of_the_transformer() -> None:
    width, warmup = 512, 40
    peak = (width * warmup) ** -0.5
    paper = [width**-0.5 * min(step**-0.5, step * warmup**-1.5) for step in range(1, 200)]
    ours = inverse_sqrt(peak, warmup)
    assert [ours(step) for step in range(1, 200)] == pytest.approx(paper, rel=0, abs=1e-12)
