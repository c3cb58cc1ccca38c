"""torch.optim.lr_scheduler's numbers, at every step, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from functional_sgd.schedules import (
    Constant,
    Cosine,
    ExponentialDecay,
    Join,
    Linear,
    Piecewise,
    Product,
    Restarts,
    Schedule,
    Sequence,
    Stretch,
    cyclic,
    interpolate,
    multi_step,
    one_cycle_in_steps,
    polynomial_decay,
    step_decay,
    three_cosines,
    warm_up,
)

S = torch.optim.lr_scheduler
LR = 0.3

CASES: dict[str, tuple[Callable[[Any], Any], Schedule]] = {
    "StepLR": (lambda o: S.StepLR(o, 7, 0.5), step_decay(LR, 0.5, every=7)),
    "MultiStepLR": (
        lambda o: S.MultiStepLR(o, [5, 20, 21], 0.3),
        multi_step(LR, (5, 20, 21), 0.3),
    ),
    "ConstantLR": (lambda o: S.ConstantLR(o, 0.25, 9), Piecewise((9,), (0.25 * LR, LR))),
    "LinearLR": (
        lambda o: S.LinearLR(o, 0.25, 0.75, 9),
        interpolate((0, 9), (0.25 * LR, 0.75 * LR)),
    ),
    "ExponentialLR": (lambda o: S.ExponentialLR(o, 0.9), ExponentialDecay(LR, 0.9)),
    "PolynomialLR": (
        lambda o: S.PolynomialLR(o, 30, 1.7),
        Stretch(polynomial_decay(LR, 0.0, 1.7), 30),
    ),
    "CosineAnnealingLR": (
        lambda o: S.CosineAnnealingLR(o, 59, 0.01),
        Stretch(Cosine(LR, 0.01), 59),
    ),
    "CosineAnnealingLR, up again": (
        lambda o: S.CosineAnnealingLR(o, 13, 0.01),
        Restarts(Join((0.5, 0.5), (Cosine(LR, 0.01), Cosine(0.01, LR))), 26),
    ),
    "CosineAnnealingWarmRestarts": (
        lambda o: S.CosineAnnealingWarmRestarts(o, 7, eta_min=0.01),
        Restarts(Cosine(LR, 0.01), 7),
    ),
    "CosineAnnealingWarmRestarts, longer": (
        lambda o: S.CosineAnnealingWarmRestarts(o, 3, 2, 0.01),
        Restarts(Cosine(LR, 0.01), 3, mult=2),
    ),
    "CyclicLR": (
        lambda o: S.CyclicLR(o, 0.1, 0.7, 4, 9, cycle_momentum=False),
        cyclic(0.1, 0.7, up=4, down=9),
    ),
    "CyclicLR, triangular2": (
        lambda o: S.CyclicLR(o, 0.1, 0.7, 4, mode="triangular2", cycle_momentum=False),
        cyclic(0.1, 0.7, up=4, factor=0.5),
    ),
    "CyclicLR, exp_range": (
        lambda o: S.CyclicLR(o, 0.1, 0.7, 4, 5, "exp_range", 0.97, cycle_momentum=False),
        cyclic(0.1, 0.7, up=4, down=5, gamma=0.97),
    ),
    "OneCycleLR": (lambda o: S.OneCycleLR(o, LR, 60), one_cycle_in_steps(LR, 60)),
    "OneCycleLR, other numbers": (
        lambda o: S.OneCycleLR(o, LR, 63, pct_start=0.17, div_factor=7.0, final_div_factor=30.0),
        one_cycle_in_steps(LR, 63, div=7.0, div_final=210.0, pct_start=0.17),
    ),
    "OneCycleLR, linear in three phases": (
        lambda o: S.OneCycleLR(o, LR, 63, anneal_strategy="linear", three_phase=True),
        one_cycle_in_steps(LR, 63, shape=Linear, three_phase=True),
    ),
    "SequentialLR": (
        lambda o: S.SequentialLR(
            o,
            [S.LinearLR(o, 0.1, 1.0, 10), S.CosineAnnealingLR(o, 30), S.ConstantLR(o, 0.2, 99)],
            [10, 35],
        ),
        Sequence(
            (10, 35),
            (Stretch(Linear(0.1 * LR, LR), 10), Stretch(Cosine(LR, 0.0), 30), Constant(0.2 * LR)),
        ),
    ),
    "SequentialLR, warm-up": (
        lambda o: S.SequentialLR(o, [S.LinearLR(o, 0.1, 1.0, 10), S.ExponentialLR(o, 0.9)], [10]),
        warm_up(10, ExponentialDecay(LR, 0.9), start=0.1 * LR),
    ),
    "ChainedScheduler": (
        lambda o: S.ChainedScheduler([S.ExponentialLR(o, 0.9), S.StepLR(o, 7, 0.5)]),
        Product((ExponentialDecay(LR, 0.9), step_decay(1.0, 0.5, every=7))),
    ),
}


def theirs(make: Callable[[Any], Any], key: str = "lr") -> list[float]:
    opt = torch.optim.SGD([torch.zeros(1)], lr=LR, momentum=0.9)
    scheduler = make(opt)
    found = []
    for _ in range(60):
        found.append(float(opt.param_groups[0][key]))
        opt.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("form", ["number", "tensor"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:The epoch parameter")  # SequentialLR passes it
def test_every_step(name: str, form: str) -> None:
    make, ours = CASES[name]
    steps: Any = range(60) if form == "number" else torch.arange(60, dtype=torch.float64)
    assert [float(ours(step)) for step in steps] == pytest.approx(theirs(make), rel=0, abs=1e-12)


def test_momentum_of_one_cycle() -> None:
    found = theirs(lambda o: S.OneCycleLR(o, LR, 60), "momentum")
    ours = Stretch(three_cosines(17 / 59, 0.95, 0.85, 0.95), 59)
    assert [ours(step) for step in range(60)] == pytest.approx(found, rel=0, abs=1e-12)
