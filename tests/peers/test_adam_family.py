"""Adam's kin, compared with the originals in float64: optax (in a process of its own, which is told
that at the start), pytorch_optimizer, and plain loops where a package departs from the authors'
code.
"""

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import functional_sgd as fs
from functional_sgd import Chain, chain

STEPS, SHAPES, LR = 100, ((4, 3), (5,), ()), 0.01
WITHIN = 1e-9


def drawn(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


START, GRADS = drawn(0), [drawn(1 + step) for step in range(STEPS)]


def ours(opt: Chain, state: Any = None) -> list[Tensor]:
    """Where it ends."""
    params: Any = START
    state = opt.init(params) | (state or {})
    for grads in GRADS:
        params, state = opt(params, grads, state)
    result: list[Tensor] = params
    return result


def largest_gap(left: Any, right: Any) -> float:
    assert len(left) == len(right) == len(SHAPES)
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))


# optax

SCRIPT = """
import json, sys
import jax
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
import optax

given = json.load(sys.stdin)
lr = given["lr"]
belief = dict(b1=0.8, b2=0.95)
made = {
    "adabelief": optax.adabelief(lr, **belief),
    "adabelief eps": optax.adabelief(lr, eps=1e-3, eps_root=1e-4),
    "yogi": optax.yogi(lr, **belief),
    "ademamix": optax.contrib.ademamix(lr, 0.8, 0.95, 0.99, alpha=3.0, weight_decay=0.3),
    "simplified_ademamix": optax.contrib.simplified_ademamix(lr, alpha=3.0, weight_decay=0.3),
    "adopt": optax.contrib.adopt(lr, b2=0.95),
    "adamaxw": optax.adamaxw(lr, **belief, eps=1e-4, weight_decay=0.3),
    "rmsprop_tf": optax.rmsprop(lr, 0.95, eps=1e-4, initial_scale=1.0, momentum=0.8),
    "nadamw": optax.nadamw(lr, **belief, eps=1e-4, weight_decay=0.3),
}
ends = {}
for name, opt in made.items():
    params = [jnp.array(leaf, dtype=jnp.float64) for leaf in given["params"]]
    state = opt.init(params)
    update = jax.jit(opt.update)
    for grads in given["grads"]:
        grads = [jnp.array(grad, dtype=jnp.float64) for grad in grads]
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    ends[name] = [leaf.tolist() for leaf in params]
json.dump(ends, sys.stdout)
"""

AS_OPTAX: dict[str, Chain] = {
    "adabelief": fs.adabelief(LR, mom=0.8, sqr_mom=0.95),
    "adabelief eps": fs.adabelief(LR, eps=1e-3, eps_root=1e-4),
    "yogi": fs.yogi(LR, mom=0.8, sqr_mom=0.95),
    "ademamix": fs.ademamix(LR, 0.8, 0.95, slow_mom=0.99, alpha=3.0, wd=0.3),
    "simplified_ademamix": fs.simplified_ademamix(LR, alpha=3.0, wd=0.3),
    "adopt": fs.adopt(LR, sqr_mom=0.95),
    "adamaxw": fs.adamaxw(LR, mom=0.8, sqr_mom=0.95, eps=1e-4, wd=0.3),
    "rmsprop_tf": fs.rmsprop_tf(LR, sqr_mom=0.95, eps=1e-4, mom=0.8),
    "nadamw": fs.nadamw(LR, mom=0.8, sqr_mom=0.95, eps=1e-4, wd=0.3),
}


@pytest.fixture(scope="module")
def optax_ends() -> dict[str, Any]:
    if importlib.util.find_spec("optax") is None:
        pytest.skip("optax is not installed")
    listed = [[leaf.tolist() for leaf in leaves] for leaves in (START, *GRADS)]
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(dict(lr=LR, params=listed[0], grads=listed[1:])),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    ends: dict[str, Any] = json.loads(process.stdout)
    return ends


@pytest.mark.parametrize("name", AS_OPTAX)
def test_optax(name: str, optax_ends: dict[str, Any]) -> None:
    # Theirs has yogi's grad_avg start where sqr_avg does.
    start = dict(grad_avg=[torch.full_like(leaf, 1e-6) for leaf in START])
    found = ours(AS_OPTAX[name], start if name == "yogi" else None)
    wanted = [torch.tensor(leaf, dtype=torch.float64) for leaf in optax_ends[name]]
    assert largest_gap(found, wanted) <= WITHIN


# pytorch_optimizer, where it does what the authors' code does

Make = Callable[[Any, list[Tensor]], Any]

AS_PYTORCH_OPTIMIZER: dict[str, tuple[Make, Chain]] = {
    "adabelief wd": (
        lambda po, p: po.AdaBelief(p, LR, (0.8, 0.95), weight_decay=0.3),
        fs.adabelief(LR, mom=0.8, sqr_mom=0.95, wd=0.3),
    ),
    "adan": (
        lambda po, p: po.Adan(p, LR, (0.9, 0.8, 0.95), weight_decay=0.3, eps=1e-4),
        fs.adan(LR, mom=0.9, diff_mom=0.8, sqr_mom=0.95, wd=0.3, eps=1e-4),
    ),
    "adopt wd": (
        lambda po, p: po.ADOPT(
            p, LR, (0.8, 0.95), clip_lambda=lambda step: (step - 1) ** 0.25, weight_decay=0.3
        ),
        fs.adopt(LR, mom=0.8, sqr_mom=0.95, wd=0.3),
    ),
    "stable_adamw": (
        lambda po, p: po.StableAdamW(p, LR, (0.8, 0.95), weight_decay=0.3, eps=1e-4),
        fs.stable_adamw(LR, mom=0.8, sqr_mom=0.95, wd=0.3, eps=1e-4),
    ),
    "adamp": (
        lambda po, p: po.AdamP(p, LR, (0.8, 0.95), 0.3, delta=1.0, wd_ratio=0.2, eps=0.0),
        fs.adamp(LR, mom=0.8, sqr_mom=0.95, wd=0.3, delta=1.0, wd_ratio=0.2, eps=0.0),
    ),
    "mars": (
        lambda po, p: po.MARS(
            p, LR, (0.8, 0.95), gamma=0.2, weight_decay=0.3, optimize_1d=True, eps=0.0
        ),
        fs.mars(LR, mom=0.8, sqr_mom=0.95, gamma=0.2, wd=0.3, eps=0.0),
    ),
}


@pytest.mark.parametrize("name", AS_PYTORCH_OPTIMIZER)
def test_pytorch_optimizer(name: str) -> None:
    package = pytest.importorskip("pytorch_optimizer")
    make, opt = AS_PYTORCH_OPTIMIZER[name]
    params = [leaf.clone().requires_grad_() for leaf in START]
    theirs = make(package, params)
    for grads in GRADS:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        theirs.step()
    assert largest_gap(ours(opt), [param.detach() for param in params]) <= WITHIN


def test_grokfast_is_its_filter() -> None:
    package = pytest.importorskip("pytorch_optimizer.optimizer.grokfast")
    model = torch.nn.ParameterList([leaf.clone() for leaf in START])
    theirs, kept = torch.optim.Adam(model.parameters(), LR), None
    for grads in GRADS:
        for param, grad in zip(model, grads, strict=True):
            param.grad = grad.clone()
        kept = package.gradfilter_ema(model, kept, alpha=0.9, lamb=3.0)
        theirs.step()
    opt = chain(fs.grokfast, fs.adam(LR), slow_mom=0.9, amplify=3.0)
    assert largest_gap(ours(opt), [param.detach() for param in model]) <= 1e-12


@pytest.mark.parametrize("wd", [0.0, 0.3])
def test_schedule_free_radam(wd: float) -> None:
    package = pytest.importorskip("schedulefree")
    params = [leaf.clone().requires_grad_() for leaf in START]
    theirs = package.RAdamScheduleFree(params, LR, (0.8, 0.95), weight_decay=wd)
    theirs.train()
    opt = fs.schedule_free_radam(LR, mom=0.8, sqr_mom=0.95, wd=wd)
    own: Any = START
    state = opt.init(own)
    for grads in GRADS:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        theirs.step()
        own, state = opt(own, grads, state)
    assert largest_gap(own, [param.detach() for param in params]) <= 1e-12
    theirs.eval()
    assert largest_gap(fs.average_of(state), [param.detach() for param in params]) <= 1e-12


# Plain loops over one leaf, after the authors' code: packages put eps elsewhere, or add other ones.


def adamp_by_hand(param: Tensor, grads: list[Tensor]) -> Tensor:
    m = v = torch.zeros_like(param)
    for step, grad in enumerate(grads, 1):
        m, v = 0.8 * m + 0.2 * grad, 0.95 * v + 0.05 * grad**2
        moved = (m / (1 - 0.8**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-4)
        ratio = 1.0
        if param.dim() > 1:
            for view in (lambda x: x.flatten(1), lambda x: x.reshape(1, -1)):
                cosine = torch.cosine_similarity(view(grad), view(param), dim=1, eps=1e-4).abs()
                if cosine.max() < 1.0 / math.sqrt(view(param).shape[1]):
                    unit = param / (view(param).norm(dim=1)[:, None] + 1e-4)
                    moved = moved - unit * view(unit * moved).sum(1)[:, None]
                    ratio = 0.2
                    break
        param = param * (1 - LR * 0.3 * ratio) - LR * moved
    return param


def laprop_by_hand(param: Tensor, grads: list[Tensor]) -> Tensor:
    m = v = torch.zeros_like(param)
    for step, grad in enumerate(grads, 1):
        v = 0.95 * v + 0.05 * grad**2
        m = 0.8 * m + 0.2 * LR * grad / ((v / (1 - 0.95**step)).sqrt() + 1e-15)
        param = param - m / (1 - 0.8**step)
        param = param - LR * 0.3 * param
    return param


def adabound_by_hand(param: Tensor, grads: list[Tensor]) -> Tensor:
    m = v = torch.zeros_like(param)
    for step, grad in enumerate(grads, 1):
        grad = grad + 0.3 * param
        m, v = 0.8 * m + 0.2 * grad, 0.95 * v + 0.05 * grad**2
        rate = LR * math.sqrt(1 - 0.95**step) / (1 - 0.8**step) / (v.sqrt() + 1e-4)
        low, high = 0.02 * (1 - 1 / (0.1 * step + 1)), 0.02 * (1 + 1 / (0.1 * step))
        param = param - rate.clamp(low, high) * m
    return param


def acprop_by_hand(param: Tensor, grads: list[Tensor]) -> Tensor:
    m = v = torch.zeros_like(param)
    for step, grad in enumerate(grads, 1):
        param = param * (1 - LR * 0.3)
        m = 0.8 * m + 0.2 * grad
        if step == 1:
            param = param - LR * grad
        else:
            v = v + 1e-4
            param = param - LR * grad / ((v / (1 - 0.95 ** (step - 1))).sqrt() + 1e-4)
        v = 0.95 * v + 0.05 * (grad - m) ** 2
    return param


def cautious_adamw_by_hand(param: Tensor, grads: list[Tensor]) -> Tensor:
    m = v = torch.zeros_like(param)
    for step, grad in enumerate(grads, 1):
        param = param * (1 - LR * 0.3)
        m, v = 0.8 * m + 0.2 * grad, 0.95 * v + 0.05 * grad**2
        mask = (m * grad > 0).to(grad.dtype)
        mask = mask / mask.mean().clamp(min=1e-3)
        moved = m * mask / (1 - 0.8**step) / ((v / (1 - 0.95**step)).sqrt() + 1e-4)
        param = param - LR * moved
    return param


def mars_by_hand(param: Tensor, grads: list[Tensor]) -> Tensor:
    m = v = last = torch.zeros_like(param)
    for step, grad in enumerate(grads, 1):
        c = grad + 0.2 * (0.8 / 0.2) * (grad - last)
        c = c / max(1.0, float(c.norm()))
        m, v = 0.8 * m + 0.2 * c, 0.95 * v + 0.05 * c**2
        divisor = (v.sqrt() / math.sqrt(1 - 0.95**step) + 1e-4) * (1 - 0.8**step)
        param = param - LR * (0.3 * param + m / divisor)
        last = grad
    return param


MOMENTS: Any = dict(mom=0.8, sqr_mom=0.95, wd=0.3)

BY_HAND: dict[str, tuple[Callable[[Tensor, list[Tensor]], Tensor], Chain]] = {
    "adamp": (adamp_by_hand, fs.adamp(LR, delta=1.0, wd_ratio=0.2, eps=1e-4, **MOMENTS)),
    "laprop": (laprop_by_hand, fs.laprop(LR, **MOMENTS)),
    "adabound": (
        adabound_by_hand,
        fs.adabound(LR, final_scale=2.0, gamma=0.1, eps=1e-4, **MOMENTS),
    ),
    "acprop": (acprop_by_hand, fs.acprop(LR, eps=1e-4, eps_root=1e-4, **MOMENTS)),
    "cautious_adamw": (cautious_adamw_by_hand, fs.cautious_adamw(LR, eps=1e-4, **MOMENTS)),
    "mars": (mars_by_hand, fs.mars(LR, gamma=0.2, eps=1e-4, **MOMENTS)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_authors_code(name: str) -> None:
    loop, opt = BY_HAND[name]
    wanted = [loop(leaf, [grads[place] for grads in GRADS]) for place, leaf in enumerate(START)]
    assert largest_gap(ours(opt), wanted) <= 1e-12


def test_the_comparison_can_fail() -> None:
    wanted = [
        laprop_by_hand(leaf, [grads[place] for grads in GRADS]) for place, leaf in enumerate(START)
    ]
    assert largest_gap(ours(fs.laprop(LR, eps=1e-6, **MOMENTS)), wanted) > WITHIN
