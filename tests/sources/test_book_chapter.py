"""The rest of the book's chapter on optimizers (Q, B and FR are its rows): the framework's
contract, and its claims.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import functional_sgd as fs
from functional_sgd import Chain, Rule, chain, elementwise
from tests.comparing import assert_close, assert_same


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def path(opt: Chain, slope: Any, start: Tensor, steps: int) -> list[Tensor]:
    """The params on the way downhill."""
    params, state, seen = start, opt.init(start), [start]
    for _ in range(steps):
        params, state = opt(params, slope(params), state)
        seen.append(params)
    return seen


@elementwise
def only_looks(grad: Tensor) -> dict[str, Tensor]:
    """Write nothing."""
    return {}


@elementwise
def returns_nothing(grad: Tensor) -> Any:
    """Forget to return."""
    return None


def test_q5_b7_a_rule_that_writes_nothing_is_an_error_and_so_is_none() -> None:
    """In the book None is no change; here a rule that changes nothing has no place in a chain, and
    None is a forgotten return; both are found when built.
    """
    with pytest.raises(ValueError, match="rule only_looks has no effect: it writes nothing"):
        chain(only_looks, fs.sgd_step, lr=0.1)
    with pytest.raises(TypeError, match="rule returns_nothing: expected a dict"):
        chain(returns_nothing, fs.sgd_step, lr=0.1)


def test_q5_params_without_a_gradient_are_passed_over() -> None:
    opt, params = fs.adamw(lr=0.1), {"a": double(1.0), "b": double(2.0)}
    after, state = opt(params, {"a": None, "b": double(1.0)}, opt.init(params))
    assert_same((after["a"], state["grad_avg"]["a"]), (params["a"], double(0.0)))


@elementwise(lr=torch.zeros_like)
def keeps_lr(grad: Tensor, lr: Tensor) -> dict[str, Tensor]:
    """Keep a state of the name of a hyper."""
    return dict(update=grad, lr=lr + 1)


def test_b5_state_and_hypers_live_apart() -> None:
    """In the book a hyper silently wins over state of its name; here one is a column, the other a
    keyword.
    """
    opt = chain(keeps_lr, fs.sgd_step, lr=0.1)
    after, state = opt(double(1.0), double(1.0), opt.init(double(1.0)))
    assert_same((after, state["lr"]), (double(0.9), double(1.0)))


NARROW = double(1.0, 50.0)


def test_b14_momentum_goes_straighter_through_a_narrow_canyon() -> None:
    """The slope is 50 times as steep across as along: SGD crosses at every step, momentum less
    often and is ahead.
    """
    start = double(10.0, 1.0)
    sgd = path(fs.sgd(lr=0.035), lambda p: NARROW * p, start, 100)
    mean = path(fs.momentum(lr=0.15, mom=0.9), lambda p: NARROW * p, start, 100)
    crossings = [
        sum(float(a[1] * b[1]) < 0 for a, b in zip(run, run[1:], strict=False))
        for run in (sgd, mean)
    ]
    assert crossings[0] > 2 * crossings[1]
    assert float(mean[-1].norm()) < float(sgd[-1].norm())


def bump(x: Tensor) -> Tensor:
    """The slope of x^2 / 2 with a dip at 2, 0.4 deep, whose far side rises on the way to 0."""
    return x + 0.4 * 80 * (x - 2) * torch.exp(-40 * (x - 2) ** 2)


def test_q8_b15_a_ball_rolls_over_a_small_bump() -> None:
    """SGD stays in the dip; with a momentum of 0.9 the ball gets to the valley."""
    stuck, rolled = (
        path(opt, bump, double(4.0), 400)[-1] for opt in (fs.sgd(lr=0.01), fs.sgd(lr=0.01, mom=0.9))
    )
    assert float(stuck) == pytest.approx(2.0, abs=0.1)
    assert float(rolled) == pytest.approx(0.0, abs=0.01)


def test_b17_gradients_of_changing_sign_have_a_small_rate() -> None:
    """Their mean is near 0, their squares are not: RMSProp steps as little there as where they are
    large.
    """
    signs = double(1.0, -1.0).repeat(50)
    mean, square = double(0.0), double(0.0)
    for sign in signs:
        mean = fs.average_grad(sign[None], mean, mom=0.9)["grad_avg"]
        square = fs.average_sqr_grad(sign[None], square, sqr_mom=0.9)["sqr_avg"]
    assert abs(float(mean)) < 0.06
    assert float(square) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("scale", "grad_after"), [(fs.scale_by_rms, 10.0), (fs.scale_by_rms_eps_inside, 10.0)]
)
def test_q11_b18_b19_rmsprop_in_two_rules(scale: Rule, grad_after: float) -> None:
    """alpha 0.99: the first step is gradient / sqrt(0.01 gradient^2) = 10, whatever the
    gradient.
    """
    opt = chain(fs.average_sqr_grad, scale, fs.sgd_step, lr=1.0, sqr_mom=0.99, eps=1e-8)
    for grad in (0.1, 3.0):
        after, _ = opt(double(0.0), double(grad), opt.init(double(0.0)))
        assert float(after) == pytest.approx(-grad_after, rel=1e-4)


def test_q14_b21_the_two_sets_of_defaults_of_adam() -> None:
    """The literature's (0.9, 0.999, 1e-8) are the recipe's, fastai's (0.9, 0.99, 1e-5) are
    arguments.
    """
    assert {name: fs.adam().hyper[name] for name in ("mom", "sqr_mom", "eps")} == dict(
        mom=0.9, sqr_mom=0.999, eps=1e-8
    )
    for opt in (fs.adam(lr=0.1), fs.adam(lr=0.1, sqr_mom=0.99, eps=1e-5)):
        after, _ = opt(double(1.0), double(2.0), opt.init(double(1.0)))
        assert_close(after, double(0.9), rtol=1e-5)  # the first step is lr, whatever the gradient


def test_q18_b24_decay_is_decoupled_by_default_and_both_kinds_have_names() -> None:
    assert fs.weight_decay in fs.adamw().rules
    assert fs.l2_reg not in fs.adamw().rules
    assert fs.l2_reg in fs.adam(wd=0.1).rules
