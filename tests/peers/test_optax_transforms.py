"""Skipped steps, averages of updates, snapshots, projections and clipping by example against
optax's, in float64, which JAX has only when told at the start: so in a process of its own.
"""

import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest
import torch

import functional_sgd as fs
from functional_sgd import chain

if importlib.util.find_spec("optax") is None:
    pytest.skip("optax is not installed", allow_module_level=True)

SCRIPT = """
import functools, json, sys
import jax
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
import optax

given = json.load(sys.stdin)
array = lambda values: jnp.array(values, dtype=jnp.float64)
P = optax.projections
large = functools.partial(optax.skip_large_updates, max_squared_norm=4.0)
project = {
    "non negative": P.projection_non_negative,
    "box": lambda x: P.projection_box(x, -0.3, 0.2),
    "l1 ball": lambda x: P.projection_l1_ball(x, 1.1),
    "l2 ball": lambda x: P.projection_l2_ball(x, 0.7),
    "l2 sphere": lambda x: P.projection_l2_sphere(x, 0.7),
    "simplex": lambda x: P.projection_simplex(x, 1.3),
}
made = {
    "limit": optax.apply_if_finite(optax.adam(0.01), max_consecutive_errors=2),
    "large": optax.MultiSteps(optax.adam(0.01), 1, should_skip_update_fn=large),
    "ema": optax.chain(optax.scale_by_adam(), optax.ema(0.8), optax.scale(-0.01)),
    "ema, biased": optax.chain(optax.ema(0.8, debias=False), optax.scale(-0.01)),
    "snapshot": optax.chain(
        optax.scale_by_adam(), optax.snapshot("seen", optax.tree.norm), optax.scale(-0.01)),
    **{name: optax.sgd(0.1) for name in project},
}
ends = {}
for name, opt in made.items():
    params, path = array(given["params"]), []
    state, update = opt.init(params), jax.jit(opt.update)
    for number, grads in enumerate(given["grads"]):
        grads = array(grads)
        if name == "limit" and number in (3, 4, 9, 11):
            grads = grads.at[0].set(jnp.inf)
        updates, state = update(grads, state, params)
        params = project.get(name, lambda x: x)(optax.apply_updates(params, updates))
        seen = [float(optax.tree.get(state, "seen"))] if name == "snapshot" else []
        path.append(params.tolist() + seen)
    ends[name] = path
private = optax.contrib.differentially_private_aggregate(4.0, 0.0, key=0)
examples = [array(leaf) for leaf in given["examples"]]
clipped, _ = private.update(examples, private.init(examples))
ends["private"] = [leaf.tolist() for leaf in clipped]
json.dump(ends, sys.stdout)
"""

UPDATES = dict(grad="update", grad_avg="update_avg", mom="update_mom")
AVERAGE = fs.rename(fs.average_grad, **UPDATES)
DEBIAS = fs.rename(fs.debias, grad_avg="update_avg", sqr_avg="none", mom="update_mom")
MOMENTS = (fs.average_grad, fs.average_sqr_grad, fs.debias, fs.scale_by_rms)
ADAM = dict(lr=0.01, sqr_mom=0.999)
SNAPSHOT = fs.rename(fs.snapshot_norm, grad="update", norm_seen="seen")

OURS: dict[str, Any] = {
    "limit": fs.skip_nonfinite(fs.adam(lr=0.01), limit=2),
    "large": fs.skip_large(fs.adam(lr=0.01), max_norm=2.0),
    "ema": chain(*MOMENTS, AVERAGE, DEBIAS, fs.sgd_step, update_mom=0.8, **ADAM),
    "ema, biased": chain(AVERAGE, fs.sgd_step, lr=0.01, update_mom=0.8),
    "snapshot": chain(*MOMENTS, SNAPSHOT, fs.sgd_step, **ADAM),
    "non negative": chain(fs.sgd(lr=0.1), fs.project_non_negative),
    "box": chain(fs.sgd(lr=0.1), fs.project_box, low=-0.3, high=0.2),
    "l1 ball": chain(fs.sgd(lr=0.1), fs.project_l1_ball, radius=1.1),
    "l2 ball": chain(fs.sgd(lr=0.1), fs.project_l2_ball, radius=0.7),
    "l2 sphere": chain(fs.sgd(lr=0.1), fs.project_l2_sphere, radius=0.7),
    "simplex": chain(fs.sgd(lr=0.1), fs.project_simplex, mass=1.3),
}
GENERATOR = torch.Generator().manual_seed(0)
START = torch.randn(6, generator=GENERATOR, dtype=torch.float64)
GRADS = torch.randn(50, 6, generator=GENERATOR, dtype=torch.float64)
SHAPES = ((8, 4, 3), (8, 5), (8,))
EXAMPLES = [torch.randn(shape, generator=GENERATOR, dtype=torch.float64) for shape in SHAPES]


@pytest.fixture(scope="module")
def theirs() -> Any:
    given = json.dumps(
        {
            "params": START.tolist(),
            "grads": GRADS.tolist(),
            "examples": [leaf.tolist() for leaf in EXAMPLES],
        }
    )
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=given, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize("name", OURS)
def test_same_params_at_every_step(name: str, theirs: Any) -> None:
    opt, params = OURS[name], START
    state = opt.init(params)
    for number, grads in enumerate(GRADS):
        if name == "limit" and number in (3, 4, 9, 11):
            grads = torch.cat([torch.full((1,), torch.inf, dtype=grads.dtype), grads[1:]])
        params, state = opt(params, grads, state)
        found = [*params, state["seen"]] if name == "snapshot" else [*params]
        expected = torch.tensor(theirs[name][number], dtype=torch.float64)
        torch.testing.assert_close(torch.stack(found), expected, rtol=0, atol=1e-12)
    if name in ("limit", "large"):
        skipped = 4 if name == "limit" else int((GRADS.norm(dim=1) >= 2.0).sum())
        assert 0 < int(state["skipped"]) == skipped < 50


def test_the_mean_of_clipped_examples(theirs: Any) -> None:
    found = fs.mean_of_clipped(EXAMPLES, max_norm=4.0)
    expected = [torch.tensor(leaf, dtype=torch.float64) for leaf in theirs["private"]]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
