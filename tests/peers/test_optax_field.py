"""optax's numbers for layer-wise, sign, lean and optimistic optimizers, and for what conditions
gradients: float64, which JAX has only when told at the start, so in a process of its own.

Not MADGRAD's: contrib.madgrad takes the root of an int32 step, which JAX does in float32.
"""

import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import functional_sgd as fs
from functional_sgd import Chain, chain
from functional_sgd.randomness import TrialKey

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
    "lars": optax.lars(0.1, trust_coefficient=0.02),
    "lars nesterov": optax.lars(0.1, trust_coefficient=0.02, nesterov=True),
    "novograd": optax.novograd(0.01, weight_decay=0.1),
    "fromage": optax.fromage(0.1),
    "sign_sgd": optax.sign_sgd(0.01),
    "signum": optax.signum(0.01),
    "optimistic_sgd": optax.optimistic_gradient_descent(0.01, beta=0.7),
    "optimistic_adam": optax.optimistic_adam_v2(0.01, beta=0.7, nesterov=False),
    "normalized_sgd": optax.chain(optax.normalize_by_update_norm(), optax.sgd(0.1)),
    "normalized_sgd mom": optax.chain(
        optax.ema(0.9, debias=False), optax.normalize_by_update_norm(), optax.sgd(0.1)
    ),
    "clip_rms": optax.chain(optax.clip_by_block_rms(0.9), optax.sgd(0.1)),
    "sm3": optax.sm3(0.1),
    "adaptive_clip": optax.chain(optax.adaptive_grad_clip(0.2), optax.sgd(0.1)),
}
ends = {}
for name, opt in made.items():
    def leaves(of):
        arrays = [jnp.array(leaf, dtype=jnp.float64) for leaf in of]
        if name == "sm3":  # theirs fails on numbers
            return arrays[:2]
        if name == "adaptive_clip":  # their outputs are the last axis
            return [arrays[0].T, *arrays[1:]]
        return arrays
    @jax.jit
    def step(params, state, grads):
        updates, state = opt.update(grads, state, params)
        return optax.apply_updates(params, updates), state
    params = leaves(given["params"])
    state = opt.init(params)
    for grads in given["grads"]:
        params, state = step(params, state, leaves(grads))
    if name == "adaptive_clip":
        params[0] = params[0].T
    ends[name] = [leaf.tolist() for leaf in params]

noise = optax.add_noise(0.3, 0.7, key=5)
state, scales = noise.init(jnp.zeros(3)), []
for _ in range(4):
    key = jax.random.split(state.rng_key)[1]
    drawn = optax.tree.random_like(key, target_tree=jnp.zeros(3), sampler=jax.random.normal)
    noisy, state = noise.update(jnp.zeros(3), state)
    scales.append(float((noisy / drawn)[0]))
ends["noise"] = scales
json.dump(ends, sys.stdout)
"""

OURS: dict[str, Chain] = {
    "lars": fs.lars(lr=0.1, trust_coeff=0.02),
    "lars nesterov": fs.lars(lr=0.1, trust_coeff=0.02, nesterov=True),
    "novograd": fs.novograd(lr=0.01, mom=0.9, sqr_mom=0.25, eps=1e-6, wd=0.1),
    "fromage": fs.fromage(lr=0.1),
    "sign_sgd": fs.sign_sgd(lr=0.01),
    "signum": fs.signum(lr=0.01),
    "optimistic_sgd": fs.optimistic_sgd(lr=0.01, optimism=0.7),
    "optimistic_adam": fs.optimistic_adam(lr=0.01, optimism=0.7),
    "normalized_sgd": fs.normalized_sgd(lr=0.1),
    "normalized_sgd mom": fs.normalized_sgd(lr=0.1, mom=0.9),
    "clip_rms": chain(fs.clip_rms, fs.sgd(lr=0.1), max_rms=0.9),
    "sm3": fs.sm3(lr=0.1, eps=1e-8),
    "adaptive_clip": chain(fs.adaptive_clip, fs.sgd(lr=0.1), max_ratio=0.2),
}
SHAPES = ((4, 3), (5,), ())
STEPS = 50


def drawn(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


PARAMS, GRADS = drawn(0), [drawn(1 + step) for step in range(STEPS)]


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    given = json.dumps(
        {
            "params": [leaf.tolist() for leaf in PARAMS],
            "grads": [[leaf.tolist() for leaf in grads] for grads in GRADS],
        }
    )
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=given, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    ends: dict[str, Any] = json.loads(process.stdout)
    return ends


@pytest.mark.parametrize("name", OURS)
def test_same_params_after_fifty_steps(name: str, theirs: dict[str, Any]) -> None:
    opt, expected = OURS[name], theirs[name]
    params: Any = PARAMS[: len(expected)]
    state = opt.init(params)
    for grads in GRADS:
        params, state = opt(params, grads[: len(expected)], state)
    for leaf, numbers in zip(params, expected, strict=True):
        there = torch.tensor(numbers, dtype=torch.float64)
        torch.testing.assert_close(leaf, there, rtol=0, atol=1e-12)


def test_the_noise_has_the_same_variance_at_every_step(theirs: dict[str, Any]) -> None:
    zero, drawn_by_trial = torch.zeros(1, dtype=torch.float64), TrialKey()
    unit = fs.normal(drawn_by_trial, zero)
    for number, scale in enumerate(theirs["noise"], 1):
        step = torch.tensor(float(number), dtype=torch.float64)
        made = fs.add_noise(zero, key=drawn_by_trial, step=step, noise=0.3, noise_decay=0.7)["grad"]
        assert float(made / unit) == pytest.approx(scale, rel=1e-9)
