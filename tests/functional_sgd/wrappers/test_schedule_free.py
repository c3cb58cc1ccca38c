"""schedule_free: numbers by hand, and those of the formulas of the reference implementation."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from functional_sgd import (
    adamw,
    average_of,
    by_path,
    chain,
    clip_value,
    rmsprop,
    schedule_free,
    schedule_free_adamw,
    schedule_free_sgd,
    scheduled,
    sgd,
)
from functional_sgd.schedules import Linear
from tests.catalogue import random_like, sample_tree
from tests.comparing import assert_close, assert_same

START = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def reference(
    kind: str,
    rates: list[float],
    beta1: float,
    decay: float,
    beta2: float = 0.95,
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor]:
    """(y, x) after steps with these rates, as AdamWScheduleFree and SGDScheduleFree write them."""
    z, x, y = START.clone(), START.clone(), START.clone()
    square, lr_max, weight_sum = torch.zeros_like(START), -1.0, 0.0
    for k, lr in enumerate(rates):
        grad = random_like(START, k)
        lr_max = max(lr, lr_max)
        weight = lr_max**2
        weight_sum += weight
        share = weight / weight_sum if weight_sum else 0.0
        if kind == "adamw":
            square = beta2 * square + (1 - beta2) * grad**2
            grad = grad / (square.div(1 - beta2 ** (k + 1)).sqrt() + eps)
        z = z - lr * (grad + decay * y)
        x = (1 - share) * x + share * z
        y = beta1 * x + (1 - beta1) * z
    return y, x


def ours(opt: Any, rates: list[float]) -> tuple[Tensor, Tensor]:
    params, state = START, opt.init(START)
    for k, lr in enumerate(rates):
        params, state = opt(params, random_like(START, k), state, {"lr": lr})
    return params, average_of(state)


RATES = {
    "constant": [0.1] * 40,
    "warm-up": [0.1 * min(1.0, (k + 1) / 10) for k in range(40)],
    "from zero": [0.1 * min(1.0, k / 10) for k in range(40)],
    "falling": [0.1 / (k + 1) for k in range(40)],
}


@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_numbers_of_the_reference(kind: str, decay: float, rates: str) -> None:
    """Params and average, within 1e-12 after forty steps."""
    made = {
        "adamw": schedule_free_adamw(sqr_mom=0.95, mom=0.8, wd=decay),
        "sgd": schedule_free_sgd(mom=0.8, wd=decay),
    }
    found = ours(made[kind], RATES[rates])
    assert_close(found, reference(kind, RATES[rates], 0.8, decay), rtol=0, atol=1e-12)


def test_by_hand() -> None:
    """From 4 along 1 at lr 1 with mom 1/2: fast 3, 2; average 3, 2.5; params 3, 2.25."""
    opt, params = schedule_free(sgd(lr=1.0), mom=0.5), torch.tensor([4.0])
    first, state = opt(params, torch.ones(1), opt.init(params))
    assert_same((first, average_of(state), state["fast"]), (torch.tensor([3.0]),) * 3)
    second, state = opt(first, torch.ones(1), state)
    assert_same(
        (second, average_of(state), state["fast"]),
        tuple(torch.tensor([v]) for v in (2.25, 2.5, 2.0)),
    )


def test_without_momentum_params_are_the_fast_weights() -> None:
    """mom 0: plain SGD, and its average on the side."""
    params, average = ours(schedule_free_sgd(mom=0.0), [0.1] * 5)
    alone, path, state = START, [], sgd().init(START)
    for k in range(5):
        alone, state = sgd(lr=0.1)(alone, random_like(START, k), state)
        path.append(alone)
    assert_same(params, alone)
    assert_close(average, torch.stack(path).mean(0), rtol=1e-14, atol=1e-15)


def test_lr_power_0_is_the_plain_mean_whatever_the_rates() -> None:
    params, state, path = START, None, []
    opt = schedule_free(sgd(), mom=0.5, lr_power=0.0)
    state = opt.init(START)
    for k in range(6):
        params, state = opt(params, random_like(START, k), state, {"lr": 0.1 / (k + 1)})
        path.append(state["fast"])
    assert_close(average_of(state), torch.stack(path).mean(0), rtol=1e-14, atol=1e-15)


def test_it_goes_around_any_optimizer() -> None:
    """The fast weights are where the optimizer goes, along the gradients at the params."""
    inner = chain(clip_value, rmsprop(lr=0.1))
    opt, params, fast = schedule_free(inner), sample_tree(), sample_tree()
    state, inner_state = opt.init(params), inner.init(fast)
    for seed in range(4):
        grads = random_like(params, seed)
        params, state = opt(params, grads, state)
        fast, inner_state = inner(fast, grads, inner_state)
    assert_same((state["fast"], {name: state[name] for name in inner_state}), (fast, inner_state))


def test_a_schedule_outside_is_seen_and_weighs() -> None:
    opt, params = scheduled(schedule_free_sgd(mom=0.8), steps=10, lr=Linear(0.0, 0.1)), START
    state = opt.init(params)
    for k in range(40):
        params, state = opt(params, random_like(START, k), state)
    assert_close(
        (params, average_of(state)),
        reference("sgd", RATES["from zero"], 0.8, 0.0),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_half_precision_params_are_float32(dtype: torch.dtype) -> None:
    """Steps too small for the params' own precision still add up."""
    opt, params = schedule_free_sgd(lr=1e-4), torch.ones(1, dtype=dtype)
    state = opt.init(params)
    for _ in range(200):
        params, state = opt(params, torch.ones(1, dtype=dtype), state)
    assert state["fast"].dtype == state["average"].dtype == torch.float32
    assert math.isclose(state["fast"].item(), 0.98, rel_tol=1e-4)
    assert params.item() < 1


def test_a_leaf_without_gradient_is_left_alone() -> None:
    opt, params = schedule_free_adamw(wd=0.5, lr=0.1), {"a": torch.ones(1), "b": torch.ones(1)}
    params, state = opt(params, params, opt.init(params))
    after, new = opt(params, {"a": None, "b": params["b"]}, state)
    assert after["a"] is params["a"]
    assert_same(
        (new["fast"]["a"], new["average"]["a"]), (state["fast"]["a"], state["average"]["a"])
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_leaves_of_no_axes_keep_their_dtype_under_a_rate_that_is_a_tensor(
    dtype: torch.dtype,
) -> None:
    """Fast 1 - 0.5 * 0.25 * 1 - 0.5 * 1 = 0.375."""
    opt, params = schedule_free_sgd(wd=0.25), torch.ones((), dtype=dtype)
    state = opt.init(params)
    _, after = opt(params, params, state, {"lr": torch.tensor(0.5)})
    assert after["fast"].dtype == state["fast"].dtype
    assert average_of(after, like=params).item() == 0.375


def test_a_decay_for_each_leaf() -> None:
    """Fast: 1 - 0.5 * wd * 1 - 0.5 * 1."""
    opt, params = schedule_free_sgd(lr=0.5), {"a": torch.ones(1), "b": torch.ones(1)}
    _, state = opt(params, params, opt.init(params), {"wd": {"a": 0.5, "b": 0.25}})
    assert_same(state["fast"], {"a": torch.tensor([0.25]), "b": torch.tensor([0.375])})


def test_a_rate_of_zero_is_no_division_by_zero() -> None:
    params, average = ours(schedule_free_sgd(), [0.0, 0.0])
    assert_same((params, average), (START, START))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedule_free(chain()), "has no lr, by which steps are weighed"),
        (lambda: schedule_free(sgd(), mom=1.0), "hyper 'mom' must be in \\[0, 1\\), got 1.0"),
        (lambda: schedule_free(sgd(mom=0.9)), "schedule_free: has a hyper 'mom', and so has"),
        (lambda: schedule_free(adamw()), "schedule_free: has a hyper"),
    ],
    ids=["no lr", "mom", "momentum", "adamw"],
)
def test_what_does_not_fit_is_an_error_when_built(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_rate_for_each_leaf_is_an_error() -> None:
    opt, params = schedule_free(sgd()), {"a": torch.ones(1)}
    message = "rule weigh_steps keeps a number of the whole tree, so 'lr' must be one number"
    with pytest.raises(ValueError, match=message):
        opt(params, params, opt.init(params), {"lr": by_path(params, {"*": 0.1})})
