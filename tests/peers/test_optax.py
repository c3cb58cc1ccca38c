"""The same numbers as optax, in float64, which JAX has only when told at the start: so in a process
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
from functional_sgd import Chain, chain

if importlib.util.find_spec("optax") is None:
    pytest.skip("optax is not installed", allow_module_level=True)

SCRIPT = """
import json, sys
import jax
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
import optax

given = json.load(sys.stdin)
made = {
    "lion": optax.lion(0.01, weight_decay=0.1),
    "adam": optax.adam(0.01),
    "adamw": optax.adamw(0.01, weight_decay=0.1),
    "sgd": optax.sgd(0.01, momentum=0.9, nesterov=True),
    "rmsprop": optax.rmsprop(0.01, decay=0.99, eps=1e-6),
    "clip": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.01)),
}
ends = {}
for name, opt in made.items():
    params = jnp.array(given["params"], dtype=jnp.float64)
    state = opt.init(params)
    for grad in given["grads"]:
        updates, state = jax.jit(opt.update)(jnp.array(grad, dtype=jnp.float64), state, params)
        params = optax.apply_updates(params, updates)
    ends[name] = params.tolist()
json.dump(ends, sys.stdout)
"""

OURS: dict[str, tuple[Chain, float]] = {  # and the tolerance
    "lion": (fs.lion(lr=0.01, wd=0.1), 1e-12),
    "adam": (fs.adam(lr=0.01), 1e-12),
    "adamw": (fs.adamw(lr=0.01, wd=0.1), 1e-12),
    "sgd": (fs.sgd(lr=0.01, mom=0.9, nesterov=True), 1e-12),
    "rmsprop": (
        chain(fs.average_sqr_grad, fs.scale_by_rms_eps_inside, fs.sgd_step, lr=0.01, eps=1e-6),
        1e-12,
    ),
    "clip": (
        chain(fs.clip_norm, fs.sgd(lr=0.01)),
        1e-6,
    ),  # theirs is without the 1e-6 in the divisor
}
GENERATOR = torch.Generator().manual_seed(0)
START = torch.randn(6, generator=GENERATOR, dtype=torch.float64)
GRADS = torch.randn(50, 6, generator=GENERATOR, dtype=torch.float64)


@pytest.fixture(scope="module")
def theirs() -> dict[str, list[float]]:
    given = json.dumps({"params": START.tolist(), "grads": GRADS.tolist()})
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=given, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    ends: dict[str, list[float]] = json.loads(process.stdout)
    return ends


@pytest.mark.parametrize("name", OURS)
def test_same_params_after_fifty_steps(name: str, theirs: Any) -> None:
    opt, tolerance = OURS[name]
    params, state = START, opt.init(START)
    for grad in GRADS:
        params, state = opt(params, grad, state)
    assert (
        float((params - torch.tensor(theirs[name], dtype=torch.float64)).abs().max()) <= tolerance
    )
