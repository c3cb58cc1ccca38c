"""Optimizers that find their rate, against those of their authors, in float64.

Each runs on its own params, with the gradients of a bowl and some noise, so that distances grow.
optax, which is in a process of its own to have float64, gets all leaves as one vector.
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import functional_sgd as fs
from functional_sgd import Optimizer

STEPS = 100
SHAPES = {"a": (4, 3), "b": (5,), "c": ()}
Tensors = dict[str, Tensor]


def drawn(seed: int) -> Tensors:
    """A number for each element."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }


START, TARGET = drawn(0), drawn(1)
NOISE = [{name: 0.1 * one for name, one in drawn(2 + step).items()} for step in range(STEPS)]
FIRST: Tensors = {  # of length 5, which pytorch_optimizer knows in float32 only
    "a": torch.ones(4, 3, dtype=torch.float64),
    "b": torch.tensor([3.0, -1.5, 1.0, 0.5, -0.5], dtype=torch.float64),
    "c": torch.tensor(0.5, dtype=torch.float64),
}
NOISE[0] = {name: FIRST[name] - (START[name] - TARGET[name]) for name in SHAPES}


def flat(tensors: Tensors) -> list[float]:
    """All leaves as one vector."""
    values: list[float] = torch.cat([leaf.reshape(-1) for leaf in tensors.values()]).tolist()
    return values


def slope(params: Tensors, step: int) -> Tensors:
    """The gradient of the bowl, and the noise of this step."""
    return {name: leaf - TARGET[name] + NOISE[step][name] for name, leaf in params.items()}


def ours(opt: Optimizer) -> Tensors:
    """The params at the end."""
    params, state = START, opt.init(START)
    needs_loss = "value" in opt.names
    for step in range(STEPS):
        loss = sum((leaf - TARGET[name]).square().sum() / 2 for name, leaf in params.items())
        given = dict(value=loss) if needs_loss else {}
        params, state = opt(params, slope(params, step), state, **given)
    return params


@pytest.fixture
def all_in_float64() -> Iterator[None]:
    """pytorch_optimizer keeps what it adds up in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


NO_EPS = dict(eps=1e-30)  # prodigyopt multiplies eps by the distance of the step that follows

TORCH: dict[str, tuple[str, str, dict[str, Any], Callable[[], Optimizer]]] = {
    "prodigy": ("prodigyopt", "Prodigy", NO_EPS, lambda: fs.prodigy(eps=1e-30)),
    "prodigy wd": (
        "prodigyopt",
        "Prodigy",
        dict(NO_EPS, weight_decay=0.1, d0=1e-4, betas=(0.8, 0.99), lr=0.5),
        lambda: fs.prodigy(0.5, mom=0.8, sqr_mom=0.99, eps=1e-30, wd=0.1, first_distance=1e-4),
    ),
    "prodigy slow": (
        "prodigyopt",
        "Prodigy",
        dict(NO_EPS, growth_rate=1.1, beta3=0.9, d_coef=0.5),
        lambda: fs.prodigy(eps=1e-30, growth_rate=1.1, slope_mom=0.9, distance_coeff=0.5),
    ),
    "prodigy safeguard": (
        "prodigyopt",
        "Prodigy",
        dict(NO_EPS, safeguard_warmup=True, lr=0.3, d0=1e-3),
        lambda: fs.prodigy(0.3, eps=1e-30, safeguard_warmup=True, first_distance=1e-3),
    ),
}

for _package in ("dadaptation", "pytorch_optimizer"):
    _adagrad = "DAdaptAdaGrad"
    _decoupled = "decouple" if _package == "dadaptation" else "weight_decouple"
    TORCH |= {
        f"d_adapt_adam {_package}": (_package, "DAdaptAdam", {}, fs.d_adapt_adam),
        f"d_adapt_adam wd {_package}": (
            _package,
            "DAdaptAdam",
            dict(lr=0.5, weight_decay=0.1, betas=(0.8, 0.99), d0=1e-4),
            lambda: fs.d_adapt_adam(0.5, mom=0.8, sqr_mom=0.99, wd=0.1, first_distance=1e-4),
        ),
        f"d_adapt_adam decoupled {_package}": (
            _package,
            "DAdaptAdam",
            {"weight_decay": 0.1, _decoupled: True},
            lambda: fs.d_adapt_adam(wd=0.1, decoupled=True),
        ),
        f"d_adapt_sgd {_package}": (
            _package,
            "DAdaptSGD",
            dict(momentum=0.0),
            fs.d_adapt_sgd,
        ),
        f"d_adapt_sgd mom {_package}": (
            _package,
            "DAdaptSGD",
            dict(momentum=0.9, lr=0.5, d0=1e-4),
            lambda: fs.d_adapt_sgd(0.5, mom=0.9, first_distance=1e-4),
        ),
        f"d_adapt_adagrad {_package}": (
            _package,
            _adagrad,
            dict(eps=1e-6),
            fs.d_adapt_adagrad,
        ),
        f"d_adapt_adagrad mom wd {_package}": (
            _package,
            _adagrad,
            dict(eps=1e-6, momentum=0.9, weight_decay=0.1, d0=1e-4),
            lambda: fs.d_adapt_adagrad(mom=0.9, wd=0.1, first_distance=1e-4),
        ),
    }


@pytest.mark.usefixtures("all_in_float64")
@pytest.mark.parametrize("name", TORCH)
def test_the_authors_in_torch(name: str) -> None:
    package, kind, options, make = TORCH[name]
    theirs = getattr(pytest.importorskip(package), kind)
    params = {key: leaf.clone().requires_grad_() for key, leaf in START.items()}
    optimizer = theirs(list(params.values()), **options)
    for step in range(STEPS):
        now = slope({key: leaf.detach() for key, leaf in params.items()}, step)
        for key, leaf in params.items():
            leaf.grad = now[key]
        optimizer.step()
    found = ours(make())
    assert max(float((leaf - START[key]).abs().max()) for key, leaf in found.items()) > 1e-3
    for key, leaf in found.items():
        torch.testing.assert_close(leaf, params[key].detach(), rtol=0, atol=1e-9)


SCRIPT = """
import json, sys
import jax
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
import optax
from optax import contrib

given = json.load(sys.stdin)
start, target, noise = (jnp.array(given[name]) for name in ("start", "target", "noise"))
clip = dict(max_learning_rate=0.3, f_min=0.2, eps=0.1, variant="sps+")
made = {
    "dog": contrib.dog(),
    "dog wd": contrib.dog(0.5, ("heuristic", 1e-2), eps=1e-3, weight_decay=0.1),
    "dowg": contrib.dowg(),
    "dowg wd": contrib.dowg(0.5, init_estim_sq_dist=1e-2, eps=1e-3, weight_decay=0.1),
    "cocob": contrib.cocob(),
    "cocob wd": contrib.cocob(alpha=10.0, weight_decay=0.1),
    "polyak_sgd": optax.polyak_sgd(),
    "polyak_sgd all": optax.polyak_sgd(**clip),
    "momo": contrib.momo(),
    "momo all": contrib.momo(0.3, beta=0.8, lower_bound=0.2, weight_decay=0.1),
    "momo_adam": contrib.momo_adam(),
    "momo_adam all": contrib.momo_adam(0.3, 0.8, 0.99, lower_bound=0.2, weight_decay=0.1),
    "mechanize": contrib.mechanize(optax.adam(1.0)),
    "mechanize all": contrib.mechanize(optax.sgd(0.5, momentum=0.9), 0.1, 1e-6, 1e-3, 3),
}

opts = {name: optax.with_extra_args_support(opt) for name, opt in made.items()}

def step(carry, noise):
    moved = {}
    for name, opt in opts.items():
        params, state = carry[name]
        loss = jnp.sum((params - target) ** 2) / 2
        updates, state = opt.update(params - target + noise, state, params, value=loss)
        moved[name] = optax.apply_updates(params, updates), state
    return moved, 0

first = {name: (start, opt.init(start)) for name, opt in opts.items()}
last, _ = jax.lax.scan(step, first, noise)
ends = {name: params.tolist() for name, (params, _) in last.items()}
json.dump(ends, sys.stdout)
"""

OPTAX: dict[str, Callable[[], Optimizer]] = {
    "dog": fs.dog,
    "dog wd": lambda: fs.dog(0.5, first_move=1e-2, eps=1e-3, wd=0.1),
    "dowg": fs.dowg,
    "dowg wd": lambda: fs.dowg(0.5, first_sqr_distance=1e-2, eps=1e-3, wd=0.1),
    "cocob": fs.cocob,
    "cocob wd": lambda: fs.cocob(alpha=10.0, wd=0.1),
    "polyak_sgd": fs.polyak_sgd,
    "polyak_sgd all": lambda: fs.polyak_sgd(max_rate=0.3, lower_bound=0.2, eps=0.1),
    "momo": fs.momo,
    "momo all": lambda: fs.momo(0.3, mom=0.8, wd=0.1, lower_bound=0.2),
    "momo_adam": fs.momo_adam,
    "momo_adam all": lambda: fs.momo_adam(0.3, 0.8, 0.99, wd=0.1, lower_bound=0.2),
    "mechanize": lambda: fs.mechanize(fs.adam(1.0)),
    "mechanize all": lambda: fs.mechanize(fs.sgd(0.5, mom=0.9), 0.1, 1e-6, 1e-3, 3),
}


@pytest.fixture(scope="module")
def optax_ends() -> Any:
    if importlib.util.find_spec("optax") is None:
        pytest.skip("optax is not installed")
    given = dict(start=flat(START), target=flat(TARGET), noise=list(map(flat, NOISE)))
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize("name", OPTAX)
def test_optax(name: str, optax_ends: Any) -> None:
    found = torch.tensor(flat(ours(OPTAX[name]())), dtype=torch.float64)
    expected = torch.tensor(optax_ends[name], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
