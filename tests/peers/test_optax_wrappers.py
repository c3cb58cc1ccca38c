"""Wrappers against optax's, in float64, which JAX has only when told at the start: so in a process
of its own.
"""

import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest
import torch

import functional_sgd as fs

if importlib.util.find_spec("optax") is None:
    pytest.skip("optax is not installed", allow_module_level=True)

SCRIPT = """
import json, sys
import jax
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
import optax

given = json.load(sys.stdin)
arrays = lambda tree: {name: jnp.array(value, dtype=jnp.float64) for name, value in tree.items()}
labels = {"body": "a", "head": "b", "tail": "none"}
parts = {"a": optax.adam(0.01), "b": optax.sgd(0.1, momentum=0.9), "none": optax.set_to_zero()}
slow = dict(b1=0.8, b2=0.95)
made = {
    "partition": optax.multi_transform(parts, labels),
    "accumulate": optax.MultiSteps(optax.adam(0.01), 3, accumulator_dtype=jnp.float64),
    "skip_nonfinite": optax.apply_if_finite(optax.adam(0.01), max_consecutive_errors=1000),
    "scheduled": optax.sgd(lambda count: 0.1 / (count + 1)),
    "schedule_free_sgd": optax.contrib.schedule_free_sgd(0.1, b1=0.8),
    "schedule_free_sgd wd": optax.contrib.schedule_free_sgd(0.1, b1=0.8, weight_decay=0.3),
    "schedule_free_adamw": optax.contrib.schedule_free_adamw(0.1, b1=0.8, b2=0.95),
    "schedule_free_adamw wd": optax.contrib.schedule_free_adamw(0.1, **slow, weight_decay=0.3),
    "cosine": optax.sgd(optax.cosine_decay_schedule(0.1, decay_steps=40)),
}
ends = {}
for name, opt in made.items():
    params = arrays(given["params"])
    state, update = opt.init(params), jax.jit(opt.update)
    for number, grads in enumerate(given["grads"]):
        grads = arrays(grads)
        if name == "skip_nonfinite" and number % 5 == 2:
            grads["head"] = grads["head"].at[0].set(jnp.nan)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    ends[name] = {key: value.tolist() for key, value in params.items()}
json.dump(ends, sys.stdout)
"""

OURS = {
    "partition": fs.partition(
        {"a": fs.adam(lr=0.01), "b": fs.sgd(lr=0.1, mom=0.9)},
        {"body": "a", "head": "b", "tail": None},
    ),
    "accumulate": fs.accumulate(fs.adam(lr=0.01), every=3),
    "skip_nonfinite": fs.skip_nonfinite(fs.adam(lr=0.01)),
    "scheduled": fs.scheduled(fs.sgd(), lr=lambda step: 0.1 / (step + 1)),
    "schedule_free_sgd": fs.schedule_free_sgd(0.1, mom=0.8),
    "schedule_free_sgd wd": fs.schedule_free_sgd(0.1, mom=0.8, wd=0.3),
    "schedule_free_adamw": fs.schedule_free_adamw(0.1, mom=0.8, sqr_mom=0.95),
    "schedule_free_adamw wd": fs.schedule_free_adamw(0.1, mom=0.8, sqr_mom=0.95, wd=0.3),
    "cosine": fs.scheduled(fs.sgd(), steps=40, lr=fs.schedules.Cosine(0.1, 0.0)),
}
GENERATOR = torch.Generator().manual_seed(0)


def draw() -> dict[str, torch.Tensor]:
    return {
        name: torch.randn(4, generator=GENERATOR, dtype=torch.float64)
        for name in ("body", "head", "tail")
    }


START, GRADS = draw(), [draw() for _ in range(50)]


def as_lists(tree: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    return {name: leaf.tolist() for name, leaf in tree.items()}


@pytest.fixture(scope="module")
def theirs() -> Any:
    given = json.dumps({"params": as_lists(START), "grads": [as_lists(tree) for tree in GRADS]})
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=given, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize("name", OURS)
def test_same_params_after_fifty_steps(name: str, theirs: Any) -> None:
    opt, params = OURS[name], START
    state = opt.init(params)
    for number, grads in enumerate(GRADS):
        if name == "skip_nonfinite" and number % 5 == 2:
            bad = grads["head"].clone()
            bad[0] = float("nan")
            grads = {**grads, "head": bad}
        params, state = opt(params, grads, state)
    for key, leaf in params.items():
        expected = torch.tensor(theirs[name][key], dtype=torch.float64)
        torch.testing.assert_close(leaf, expected, rtol=0, atol=1e-12)
    assert name != "skip_nonfinite" or int(state["skipped"]) == 10
