"""What the book says about optimizers; Q and B are rows of its questionnaire and of the chapter."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import functional_sgd as fs
from functional_sgd import Chain, chain
from tests.comparing import assert_close, assert_same
from tests.functional_sgd.user_rules import plain_step

X = [
    14,
    86,
    28,
    51,
    28,
    29,
    72,
    62,
    84,
    15,
    42,
    62,
    47,
    35,
    9,
    38,
    44,
    99,
    13,
    21,
    28,
    20,
    8,
    64,
    99,
    70,
    27,
    17,
    8,
]
DATA = [(float(x), 2.0 * x + 30) for x in X]


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def descend(opt: Chain, grads: list[Tensor], params: Tensor) -> list[Tensor]:
    """The params after each of these gradients."""
    state, seen = opt.init(params), []
    for grad in grads:
        params, state = opt(params, grad, state)
        seen.append(params)
    return seen


def random_grads(steps: int = 20) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, generator=generator, dtype=torch.float64) for _ in range(steps)]


START = double(1.0, -2.0, 0.5)


def test_q1_b1_sgd_goes_against_the_gradient() -> None:
    assert_same(
        descend(fs.sgd(lr=0.1), [double(2.0)], double(1.0))[0], double(1.0) - 0.1 * double(2.0)
    )


def test_q6_both_spellings_of_the_step_give_the_same_bits() -> None:
    assert_same(
        descend(chain(plain_step, lr=0.1), random_grads(), START),
        descend(fs.sgd(0.1), random_grads(), START),
    )


def test_q7_b9_momentum_is_a_weighted_mean() -> None:
    """beta * average + (1 - beta) * gradient, for gradients 1 to 5 and beta 0.9."""
    averages = [-float(after) for after in steps_of(fs.average_grad, [1.0, 2.0, 3.0, 4.0, 5.0])]
    assert averages == pytest.approx([0.1, 0.29, 0.561, 0.9049, 1.31441], rel=1e-12)


def test_q7_b9_the_undampened_form_is_momentum_of_another_rate() -> None:
    """heavy_ball at lr is average_grad at lr / (1 - beta)."""
    ball, mean = fs.sgd(lr=0.01, mom=0.9), fs.momentum(lr=0.01 / (1 - 0.9), mom=0.9)
    assert_close(
        descend(ball, random_grads(), START), descend(mean, random_grads(), START), rtol=1e-12
    )


def test_q8_the_mean_has_less_noise_than_the_gradients() -> None:
    """The deviation of the mean of white noise is sqrt((1 - b) / (1 + b)) of the noise's: 0.2294
    for b = 0.9.
    """
    noise = torch.randn(4000, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    average = torch.zeros(50, dtype=torch.float64)
    kept = []
    for grad in noise:
        average = fs.average_grad(grad, average, mom=0.9)["grad_avg"]
        kept.append(average)
    assert float(torch.stack(kept[100:]).std()) == pytest.approx(0.2294, rel=0.02)


@pytest.mark.parametrize(("mom", "steps"), [(0.5, 1), (0.9, 7), (0.99, 69)])
def test_q9_a_bigger_momentum_turns_later(mom: float, steps: int) -> None:
    """After the gradient's sign flips, the mean crosses zero in ceil(ln 2 / -ln beta) steps."""
    average, count = double(1.0), 0
    while float(average) > 0:
        average, count = fs.average_grad(double(-1.0), average, mom=mom)["grad_avg"], count + 1
    assert count == steps == math.ceil(math.log(2) / -math.log(mom))


def test_q12_squared_gradients_tell_the_steep_direction() -> None:
    """Slopes 1 and 100 give squares 1 to 10,000 and rates 100 to 1."""
    grads = double(1.0, 100.0)
    squares = fs.average_sqr_grad(grads, torch.zeros_like(grads))["sqr_avg"]
    rates = fs.scale_by_rms(torch.ones_like(grads), squares, eps=0.0)["update"]
    assert float(squares[1] / squares[0]) == pytest.approx(1e4)
    assert float(rates[0] / rates[1]) == pytest.approx(100)


def test_q13_adam_has_the_rules_of_momentum_and_rmsprop_and_debias() -> None:
    assert {*fs.adam().rules} == {*fs.momentum().rules, *fs.rmsprop().rules, fs.debias}


def test_q13_adam_without_momentum_is_debiased_rmsprop() -> None:
    debiased = chain(
        fs.average_sqr_grad, fs.debias, fs.scale_by_rms, fs.sgd_step, lr=0.1, sqr_mom=0.999
    )
    adam = fs.adam(lr=0.1, mom=0.0)
    assert_close(
        descend(adam, random_grads(), START), descend(debiased, random_grads(), START), rtol=1e-12
    )


def steps_of(*rules: Any, mom: float = 0.9) -> list[Tensor]:
    """What a step of 1 makes of the updates for some gradients (the last argument), without summing
    them up.
    """
    *parts, grads = rules
    opt, zero = chain(*parts, fs.sgd_step, lr=1.0, mom=mom), double(0.0)
    state, seen = opt.init(zero), []
    for grad in grads:
        after, state = opt(zero, double(grad), state)
        seen.append(after)
    return seen


@pytest.mark.parametrize(
    ("grads", "average", "unbiased"),
    [
        ([1.0] * 5, [0.1, 0.19, 0.271, 0.3439, 0.40951], [1.0] * 5),
        (
            [1.0, 2.0, 3.0, 4.0, 5.0],
            [0.1, 0.29, 0.561, 0.9049, 1.31441],
            [1.0, 1.5263157895, 2.0701107011, 2.6312881652, 3.2097140484],
        ),
    ],
    ids=["constant", "rising"],
)
def test_q15_unbiased_averages(
    grads: list[float], average: list[float], unbiased: list[float]
) -> None:
    """The table of averages and unbiased averages for beta 0.9."""
    assert [-float(step) for step in steps_of(fs.average_grad, grads)] == pytest.approx(
        average, rel=1e-10
    )
    assert [-float(step) for step in steps_of(fs.average_grad, fs.debias, grads)] == pytest.approx(
        unbiased, rel=1e-10
    )


@pytest.mark.parametrize("size", [1e-6, 1e-2, 1.0, 1e3])
def test_q16_a_high_eps_caps_the_step(size: float) -> None:
    """eps = 1: the step is at most lr times the gradient; a small eps would make it lr."""
    step = 1.0 - float(descend(fs.adam(lr=0.1, eps=1.0), [double(size)], double(1.0))[0])
    assert 0 < step <= 0.1 * size
    assert step == pytest.approx(0.1 * size / (size + 1))


def test_q16_a_huge_eps_turns_adam_towards_sgd() -> None:
    grads = double(1e-3, 1.0, 30.0)
    moved = descend(fs.adam(lr=1e6, eps=1e6), [grads], torch.zeros_like(grads))[0]
    assert float(torch.cosine_similarity(-moved, grads, dim=0)) == pytest.approx(1.0, abs=1e-9)


def test_q18_b23_both_decays_are_one_for_plain_sgd() -> None:
    first, second = chain(fs.weight_decay, fs.sgd(0.1), wd=0.5), fs.sgd(0.1, wd=0.5)
    assert_close(
        descend(first, random_grads(), START),
        descend(second, random_grads(), START),
        rtol=1e-13,
        atol=1e-15,
    )


@pytest.mark.parametrize("make", [fs.momentum, fs.adam], ids=["momentum", "adam"])
def test_q18_b23_both_decays_differ_for_adaptive_methods(make: Any) -> None:
    first, second = (
        chain(fs.weight_decay, make(lr=0.1), wd=0.5),
        chain(fs.l2_reg, make(lr=0.1), wd=0.5),
    )
    after = [descend(opt, random_grads(), START)[-1] for opt in (first, second)]
    assert float((after[0] - after[1]).abs().max()) > 0.01


def test_q18_adam_forgets_an_l2_penalty_when_the_loss_is_scaled() -> None:
    """A loss 1e6 times as large: L2 has next to no effect, decoupled decay all of it."""
    grads = [1e6 * grad for grad in random_grads()]
    plain, l2, decoupled = (
        descend(opt, grads, START)[-1]
        for opt in (fs.adam(0.01), fs.adam(0.01, wd=0.5), fs.adamw(0.01, wd=0.5))
    )
    assert float((l2 - plain).abs().max()) < 1e-5
    assert float((decoupled - plain).abs().max()) > 0.05


@pytest.mark.parametrize(
    "make", [lambda: fs.momentum(lr=0.1, mom=0.0), lambda: fs.sgd(lr=0.1, mom=0.0)]
)
def test_b10_momentum_of_zero_is_plain_sgd_bit_for_bit(make: Any) -> None:
    assert_same(
        descend(make(), random_grads(), START), descend(fs.sgd(lr=0.1), random_grads(), START)
    )


@pytest.mark.parametrize(
    ("rule", "expected"),
    [(fs.scale_by_rms, 1 / 1.5), (fs.scale_by_rms_eps_inside, 1 / math.sqrt(1.5))],
)
def test_b18_eps_inside_and_outside_the_root(rule: Any, expected: float) -> None:
    assert float(rule(double(1.0), double(1.0), eps=0.5)["update"]) == pytest.approx(
        expected, rel=1e-12
    )


def test_b18_a_zero_average_needs_the_eps() -> None:
    """At eps 1e-8 and no slope so far, inside allows a speed of 1e4, outside 1e8."""
    outside, inside = (
        rule(double(1.0), double(0.0))["update"]
        for rule in (fs.scale_by_rms, fs.scale_by_rms_eps_inside)
    )
    assert_close(torch.cat([outside, inside]), double(1e8, 1e4), rtol=1e-12)


def test_b20_the_books_adam_makes_a_first_step_of_ten_rates() -> None:
    """Only the mean is unbiased there: the first step is lr / sqrt(1 - 0.99)."""
    rules = (
        fs.average_grad,
        fs.debias,
        fs.average_sqr_grad,
        fs.scale_by_rms_eps_inside,
        fs.sgd_step,
    )
    after = descend(chain(*rules, lr=0.1, eps=0.0), [double(3.0)], double(0.0))[0]
    assert_close(after, double(-1.0), rtol=1e-12)


def test_b23_decay_before_the_step_is_the_books_formula() -> None:
    """weight - lr * grad - lr * wd * weight."""
    weight, grad, lr, wd = START, random_grads(1)[0], 0.1, 0.25
    found = descend(chain(fs.weight_decay, fs.sgd(lr), wd=wd), [grad], weight)[0]
    assert_close(found, weight - lr * grad - lr * wd * weight, rtol=1e-14)


def test_b23_decay_after_the_step_is_something_else() -> None:
    """From 1 with slope 1, lr 0.5, wd 1: 0.5 * 1 - 0.5 = 0 and (1 - 0.5) * 0.5 = 0.25."""
    before, after = (
        chain(*rules, lr=0.5, wd=1.0)
        for rules in ((fs.weight_decay, fs.sgd_step), (fs.sgd_step, fs.weight_decay))
    )
    found = [descend(opt, [double(1.0)], double(1.0))[0] for opt in (before, after)]
    assert_same(torch.cat(found), double(0.0, 0.25))


@pytest.mark.parametrize(
    ("opt", "epochs", "expected"),
    [
        (fs.sgd(lr=1e-4), 1, (1.0715160204418617, 2.613084491952597)),
        (fs.sgd(lr=1e-4), 10, (1.5791070860707137, 2.6023270264107823)),
        (fs.momentum(lr=1e-4, mom=0.9), 1, (1.0481054586719203, 2.1290248933570664)),
        (fs.momentum(lr=1e-4, mom=0.9), 10, (1.5072590000339812, 2.3356452176943545)),
        (
            fs.adam(lr=1.0, mom=0.9, sqr_mom=0.9, eps=0.0),
            1,
            (6.979850113601322, 1.8105893878500252),
        ),
        (fs.adam(lr=1.0, mom=0.9, sqr_mom=0.9, eps=0.0), 5, (24.111123, 2.604275)),
    ],
    ids=["sgd 1", "sgd 10", "momentum 1", "momentum 10", "adam 1", "adam 5"],
)
def test_workbook_of_lesson_18(opt: Chain, epochs: int, expected: tuple[float, float]) -> None:
    """The line y = 2 x + 30, one point a step, from intercept and slope 1, without the sheet's
    quirks.
    """
    params = {"intercept": double(1.0), "slope": double(1.0)}
    state = opt.init(params)
    for x, y in DATA * epochs:
        error = params["slope"] * x + params["intercept"] - y
        params, state = opt(params, {"intercept": 2 * error, "slope": 2 * error * x}, state)
    rel = 1e-11 if len(repr(expected[0])) > 12 else 1e-6
    assert (float(params["intercept"]), float(params["slope"])) == pytest.approx(expected, rel=rel)
