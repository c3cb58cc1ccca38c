"""optax's schedules at every step, in float64, which JAX has only when told at the start: so in a
process of its own.
"""

import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest

from functional_sgd.schedules import (
    Constant,
    Cosine,
    ExponentialDecay,
    Linear,
    Piecewise,
    Schedule,
    Sequence,
    Stretch,
    interpolate,
    linear_one_cycle,
    one_cycle,
    polynomial_decay,
    warm_up,
    warmup_cosine,
)

if importlib.util.find_spec("optax") is None:
    pytest.skip("optax is not installed", allow_module_level=True)

SCRIPT = """
import json, sys
import jax
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
import optax

borders = {7: 0.5, 20: 0.1, 21: 3.0}
cycles = [
    dict(init_value=0.0, peak_value=1.0, warmup_steps=5, decay_steps=15, end_value=0.1),
    dict(init_value=0.1, peak_value=0.7, warmup_steps=10, decay_steps=30, end_value=0.0),
]
made = {
    "polynomial": optax.polynomial_schedule(0.3, 0.02, 1.7, 30, transition_begin=4),
    "exponential": optax.exponential_decay(0.3, 10, 0.5, transition_begin=4, end_value=0.05),
    "staircase": optax.exponential_decay(0.3, 10, 0.5, 4, staircase=True),
    "growing": optax.exponential_decay(0.3, 10, 1.5, end_value=0.5),
    "cosine": optax.cosine_decay_schedule(0.3, 40, alpha=0.1),
    "piecewise constant": optax.piecewise_constant_schedule(0.3, borders),
    "piecewise linear": optax.piecewise_interpolate_schedule("linear", 0.3, borders),
    "piecewise cosine": optax.piecewise_interpolate_schedule("cosine", 0.3, borders),
    "warm-up": optax.warmup_constant_schedule(0.1, 0.3, 20),
    "warm-up, cosine": optax.warmup_cosine_decay_schedule(0.1, 0.3, 10, 50, 0.02),
    "warm-up, exponential": optax.warmup_exponential_decay_schedule(
        0.1, 0.3, 10, 7, 0.8, 3, False, 0.1),
    "linear one cycle": optax.linear_onecycle_schedule(60, 0.3),
    "cosine one cycle": optax.cosine_onecycle_schedule(60, 0.3),
    "sgdr": optax.sgdr_schedule(cycles),
    "join": optax.join_schedules([optax.linear_schedule(0.0, 1.0, 9), lambda step: 1 / (1 + step)],
        [12]),
}
values = {
    name: jax.jit(jax.vmap(schedule))(jnp.arange(70)).tolist() for name, schedule in made.items()
}
json.dump(values, sys.stdout)
"""

POINTS = (0, 7, 20, 21)
VALUES = (0.3, 0.15, 0.015, 0.045)


def after(step: Any) -> Any:
    return 1 / (1 + step)


OURS: dict[str, Schedule] = {
    "polynomial": Sequence((4,), (Constant(0.3), Stretch(polynomial_decay(0.3, 0.02, 1.7), 30))),
    "exponential": ExponentialDecay(0.3, 0.5, every=10, begin=4, limit=0.05),
    "staircase": ExponentialDecay(0.3, 0.5, every=10, begin=4, staircase=True),
    "growing": ExponentialDecay(0.3, 1.5, every=10, limit=0.5),
    "cosine": Stretch(Cosine(0.3, 0.03), 40),
    "piecewise constant": Piecewise(POINTS[1:], VALUES),
    "piecewise linear": interpolate(POINTS, VALUES),
    "piecewise cosine": interpolate(POINTS, VALUES, Cosine),
    "warm-up": warm_up(20, Constant(0.3), start=0.1),
    "warm-up, cosine": Stretch(warmup_cosine(0.3, 10 / 50, start=0.1, end=0.02), 50),
    "warm-up, exponential": warm_up(
        10, ExponentialDecay(0.3, 0.8, every=7, begin=3, limit=0.1), start=0.1
    ),
    "linear one cycle": Stretch(linear_one_cycle(0.3), 60),
    "cosine one cycle": Stretch(one_cycle(0.3, div_final=25e4, pct_start=0.3), 60),
    "sgdr": Sequence(
        (15,),
        (
            Stretch(warmup_cosine(1.0, 5 / 15, 0.0, 0.1), 15),
            Stretch(warmup_cosine(0.7, 10 / 30, 0.1, 0.0), 30),
        ),
    ),
    "join": Sequence((12,), (Stretch(Linear(0.0, 1.0), 9), after)),
}


@pytest.fixture(scope="module")
def theirs() -> Any:
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize("name", OURS)
def test_every_step(name: str, theirs: Any) -> None:
    found = [OURS[name](step) for step in range(70)]
    assert found == pytest.approx(theirs[name], rel=0, abs=1e-12)
