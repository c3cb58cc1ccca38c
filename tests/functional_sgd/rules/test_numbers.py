"""Every rule on numbers worked by hand."""

from typing import Any

import pytest
import torch

import functional_sgd as fs
from functional_sgd import Rule, chain
from functional_sgd.randomness import key_of
from functional_sgd.rules.scaling import rectification
from tests.catalogue import RULES
from tests.comparing import assert_close, assert_same
from tests.functional_sgd.rules import (
    matrices_by_hand,
    momenta_by_hand,
    moments,
    numbers_of_the_field,
    schedule_free_by_hand,
)
from tests.functional_sgd.rules.rates_by_hand import RATES

T = torch.tensor
STEP_1, STEP_2, STEP_5, STEP_6 = (T(float(step), dtype=torch.float64) for step in (1, 2, 5, 6))

KEY = key_of(torch.tensor(0), torch.tensor(1), leaf=0, position=0)

CASES: list[tuple[Rule, dict[str, Any], dict[str, Any]]] = [
    *RATES,
    *momenta_by_hand.CASES,
    # rule, columns as lists and scalars, what it writes
    (
        fs.average_grad,
        dict(grad=[4.0], grad_avg=[8.0], mom=0.75),
        dict(grad_avg=[7.0], update=[7.0]),
    ),
    (
        fs.average_grad,
        dict(grad=[4.0], grad_avg=[8.0], mom=0.0),
        dict(grad_avg=[4.0], update=[4.0]),
    ),
    (
        fs.heavy_ball,
        dict(grad=[4.0], velocity=[8.0], mom=0.75),
        dict(velocity=[10.0], update=[10.0]),
    ),
    (fs.dampen, dict(grad=[4.0], step=STEP_1, dampening=0.25), dict(grad=[4.0])),
    (fs.dampen, dict(grad=[4.0], step=STEP_2, dampening=0.25), dict(grad=[3.0])),
    (fs.nesterov, dict(grad=[4.0], velocity=[8.0], mom=0.25), dict(update=[6.0])),
    (fs.average_sqr_grad, dict(grad=[-4.0], sqr_avg=[8.0], sqr_mom=0.75), dict(sqr_avg=[10.0])),
    (
        fs.debias,
        dict(update=[3.0], grad_avg=[6.0], sqr_avg=[7.0], step=STEP_2, mom=0.5, sqr_mom=0.75),
        dict(grad_avg=[8.0], update=[4.0], sqr_avg=[16.0]),
    ),
    (fs.debias, dict(update=[3.0], sqr_avg=[7.0], step=STEP_2, sqr_mom=0.75), dict(sqr_avg=[16.0])),
    (fs.debias, dict(update=[3.0], step=STEP_2), {}),
    (
        fs.quasi_hyperbolic,
        dict(grad=[2.0], update=[6.0], sqr_avg=[8.0], nu_1=0.75, nu_2=0.25),
        dict(update=[5.0], sqr_avg=[5.0]),
    ),
    (
        fs.sign_of_average,
        dict(grad=[-4.0, 0.0, 4.0], grad_avg=[2.0, 0.0, 2.0], mom=0.5, slow_mom=0.75),
        dict(update=[-1.0, 0.0, 1.0], grad_avg=[0.5, 0.0, 2.5]),
    ),
    (
        fs.clip_value,
        dict(grad=[-3.0, -2.0, 0.0, 1.0, 3.0], max_value=2.0),
        dict(grad=[-2.0, -2.0, 0.0, 1.0, 2.0]),
    ),
    (fs.clip_norm, dict(grad=[3.0, 4.0], max_norm=2.5), dict(grad=[1.5, 2.0])),
    (fs.clip_norm, dict(grad=[3.0, 4.0], grad_norm=T(50.0), max_norm=2.5), dict(grad=[0.15, 0.2])),
    (fs.clip_norm, dict(grad=[3.0, 4.0], max_norm=6.0), dict(grad=[3.0, 4.0])),
    (fs.centralize, dict(grad=[[1.0, 3.0], [5.0, 5.0]]), dict(grad=[[-1.0, 1.0], [0.0, 0.0]])),
    (fs.centralize, dict(grad=[[[1.0], [3.0]]]), dict(grad=[[[-1.0], [1.0]]])),
    (fs.centralize, dict(grad=[1.0, 3.0]), dict(grad=[1.0, 3.0])),
    (fs.project_non_negative, dict(param=[-2.0, 0.0, 3.0]), dict(param=[0.0, 0.0, 3.0])),
    (
        fs.project_box,
        dict(param=[-2.0, 0.5, 3.0], low=-1.0, high=2.0),
        dict(param=[-1.0, 0.5, 2.0]),
    ),
    (fs.project_l2_ball, dict(param=[[3.0], [-4.0]], radius=2.5), dict(param=[[1.5], [-2.0]])),
    (fs.project_l2_ball, dict(param=[3.0, 4.0], radius=5.0), dict(param=[3.0, 4.0])),
    (fs.project_l2_ball, dict(param=[3.0, 4.0], radius=0.0), dict(param=[0.0, 0.0])),
    (fs.project_l2_sphere, dict(param=[3.0, -4.0], radius=10.0), dict(param=[6.0, -8.0])),
    (fs.project_l2_sphere, dict(param=[0.0, 0.0], radius=10.0), dict(param=[0.0, 0.0])),
    (
        fs.project_l1_ball,
        dict(param=[[3.0, -2.0, 0.5]], radius=2.0),
        dict(param=[[1.5, -0.5, 0.0]]),
    ),
    (fs.project_l1_ball, dict(param=[1.0, -0.75], radius=2.0), dict(param=[1.0, -0.75])),
    (fs.project_l1_ball, dict(param=[1.0, -0.75], radius=0.0), dict(param=[0.0, 0.0])),
    (fs.project_simplex, dict(param=[[1.5], [1.0], [-3.0]]), dict(param=[[0.75], [0.25], [0.0]])),
    (fs.project_simplex, dict(param=[0.0, 0.0], mass=3.0), dict(param=[1.5, 1.5])),
    (fs.snapshot_norm, dict(grad=[3.0, -4.0], norm_seen=T(1.0)), dict(norm_seen=5.0)),
    (fs.snapshot_mean, dict(grad=[3.0, -4.0], mean_seen=T(1.0)), dict(mean_seen=3.5)),
    (fs.snapshot_largest, dict(grad=[3.0, -4.0], largest_seen=T(1.0)), dict(largest_seen=4.0)),
    (fs.weight_decay, dict(param=[8.0], lr=0.5, wd=0.25), dict(param=[7.0])),
    (fs.l2_reg, dict(param=[8.0], grad=[1.0], wd=0.25), dict(grad=[3.0])),
    (fs.scale_by_rms, dict(update=[6.0], sqr_avg=[4.0], eps=1.0), dict(update=[2.0])),
    (fs.scale_by_rms_eps_inside, dict(update=[6.0], sqr_avg=[3.0], eps=1.0), dict(update=[3.0])),
    (
        fs.center,
        dict(grad=[4.0], sqr_avg=[20.0], grad_mean=[0.0], sqr_mom=0.5),
        dict(grad_mean=[2.0], sqr_avg=[16.0]),
    ),
    (
        fs.center,
        dict(grad=[2.0], sqr_avg=[3.0], grad_mean=[2.0]),
        dict(grad_mean=[2.0], sqr_avg=[0.0]),
    ),
    (fs.ascend, dict(grad=[3.0, -1.0]), dict(grad=[-3.0, 1.0])),
    (
        fs.amsgrad,
        dict(sqr_avg=[1.0, 4.0], max_sqr_avg=[2.0, 2.0]),
        dict(max_sqr_avg=[2.0, 4.0], sqr_avg=[2.0, 4.0]),
    ),
    (
        fs.keep_max_grad,
        dict(grad=[-1.0, 3.0, -5.0], max_grad=[8.0, 4.0, 4.0], sqr_mom=0.5, eps=1.0),
        dict(max_grad=[4.0, 4.0, 6.0]),
    ),
    (fs.scale_by_max, dict(update=[6.0], max_grad=[4.0]), dict(update=[1.5])),
    (
        fs.sum_sqr_grad,
        dict(grad=[3.0], sqr_sum=[0.0], step=STEP_1, first_sum=2.0),
        dict(sqr_sum=[11.0]),
    ),
    (
        fs.sum_sqr_grad,
        dict(grad=[3.0], sqr_sum=[1.0], step=STEP_2, first_sum=2.0),
        dict(sqr_sum=[10.0]),
    ),
    (
        fs.nesterov_average,  # mu is 0.5 * (1 - 0.5 * 0.96), then 0.5 * (1 - 0.5 * 0.96**2)
        dict(grad=[0.0], grad_avg=[1.0], mom_product=[1.0], step=STEP_1, mom=0.5, mom_decay=1.0),
        dict(update=[0.2696 / (1 - 0.26 * 0.2696)], mom_product=[0.26]),
    ),
    (
        fs.nesterov_average,
        dict(grad=[1.0], grad_avg=[0.0], mom_product=[0.5], step=STEP_2, mom=0.5, mom_decay=0.0),
        dict(update=[0.75 / 0.875], mom_product=[0.125]),
    ),
    (
        fs.scale_by_rms_eps_early,  # the root of 1 - 0.6**2 is 0.8
        dict(update=[6.0], sqr_avg=[4.0], step=STEP_2, sqr_mom=0.6, eps=0.8),
        dict(update=[2.0]),
    ),
    (
        fs.scale_by_past_updates,
        dict(update=[2.0], sqr_update_avg=[3.0], sqr_mom=0.75, eps=1.0),
        dict(update=[4.0], sqr_update_avg=[6.25]),
    ),
    (
        fs.scale_by_factored_rms,  # at step 1 the mean squares are those of this gradient
        dict(
            grad=[[1.0, -2.0], [2.0, 4.0]], rows=[[7.0], [7.0]], columns=[[7.0, 7.0]], step=STEP_1
        ),
        dict(rows=[[2.5], [10.0]], columns=[[2.5, 10.0]], update=[[1.0, -1.0], [1.0, 1.0]]),
    ),
    (
        fs.scale_by_factored_rms,
        dict(grad=[4.0], rows=[0.0], columns=[0.0], step=STEP_2, sqr_mom_decay=2.0),
        dict(rows=[4.0], columns=[0.0], update=[2.0]),
    ),
    (
        fs.scale_by_factored_rms,
        dict(grad=[4.0], rows=[0.0], columns=[0.0], step=STEP_1, eps=8.0),
        dict(rows=[16.0], columns=[0.0], update=[0.5]),
    ),
    (fs.clip_rms, dict(grad=[3.0, -3.0], max_rms=1.5), dict(grad=[1.5, -1.5])),
    (fs.clip_rms, dict(grad=[3.0, -3.0], max_rms=4.0), dict(grad=[3.0, -3.0])),
    (
        fs.scale_by_param_rms,
        dict(param=[3.0, -3.0], update=[1.0, 2.0]),
        dict(update=[3.0, 6.0]),
    ),
    (
        fs.scale_by_param_rms,
        dict(param=[0.0, 0.0], update=[1.0, 2.0], min_rms=0.5),
        dict(update=[0.5, 1.0]),
    ),
    (fs.decay_rate, dict(update=[6.0], step=STEP_5, lr_decay=0.25), dict(update=[3.0])),
    (
        fs.bottou_rate,
        dict(update=[6.0], step=STEP_5, lr=0.5, lambd=1.5, power=0.5),
        dict(update=[3.0]),
    ),
    (
        fs.relative_step,
        dict(param=[1.0], update=[2.0], step=T(4.0).double(), lr=1.0),
        dict(param=[0.0]),
    ),
    (
        fs.relative_step,
        dict(param=[1.0], update=[2.0], step=T(4.0).double(), lr=0.25),
        dict(param=[0.5]),
    ),
    (
        fs.average_late,
        dict(param=[4.0], average=[1.0], step=STEP_6, average_from=2.0),
        dict(average=[2.0]),
    ),
    (
        fs.average_late,
        dict(param=[4.0], average=[1.0], step=STEP_2, average_from=2.0),
        dict(average=[4.0]),
    ),
    (
        fs.resilient_step,
        dict(
            param=[5.0, 5.0, 5.0, 5.0],
            grad=[2.0, -2.0, -2.0, 0.0],
            last_grad=[1.0, -1.0, 1.0, 1.0],
            step_size=[1.0, 1.0, 1.0, 1.0],
            step=STEP_2,
            lr=9.0,
            grow=1.5,
            shrink=0.5,
        ),
        dict(
            param=[3.5, 6.5, 5.0, 5.0],
            last_grad=[2.0, -2.0, 0.0, 0.0],
            step_size=[1.5, 1.5, 0.5, 1.0],
        ),
    ),
    (
        fs.resilient_step,
        dict(
            param=[5.0, 5.0],
            grad=[2.0, -2.0],
            last_grad=[0.0, 0.0],
            step_size=[0.0, 0.0],
            step=STEP_1,
            lr=3.0,
            max_size=2.0,
        ),
        dict(param=[3.0, 7.0], last_grad=[2.0, -2.0], step_size=[2.0, 2.0]),
    ),
    (fs.rectify, dict(update=[3.0], sqr_avg=[4.0], step=STEP_5), dict(update=[3.0])),
    (fs.rectify, dict(update=[3.0], sqr_avg=[4.0], step=STEP_6, eps=1.0), dict(update=[0.0816792])),
    (fs.rectify_eps_early, dict(update=[3.0], sqr_avg=[4.0], step=STEP_5), dict(update=[3.0])),
    (
        fs.rectify_eps_early,
        dict(update=[3.0], sqr_avg=[4.0], step=STEP_6, eps=0.2419087650),  # sqrt(1 - 0.99**6)
        dict(update=[0.0816792]),
    ),
    (fs.rectify_softplus, dict(update=[3.0], sqr_avg=[4.0], step=STEP_5), dict(update=[3.0])),
    (
        fs.rectify_softplus,
        dict(update=[3.0], sqr_avg=[4.0], step=STEP_6, eps=1.0),
        dict(update=[0.0816792]),
    ),
    (
        fs.rectify_softplus,  # softplus(0) = log(2) / beta
        dict(update=[0.69314718], sqr_avg=[0.0], step=STEP_6, eps=0.0, beta=2.0),
        dict(update=[2 * 0.0816792]),
    ),
    (fs.sgd_step, dict(param=[8.0], update=[4.0], lr=0.25), dict(param=[7.0])),
    (
        fs.sync_slow_params,
        dict(param=[8.0], slow_param=[4.0], step=STEP_6, sync_every=3, slow_step=0.25),
        dict(param=[5.0], slow_param=[5.0]),
    ),
    (
        fs.sync_slow_params,
        dict(param=[8.0], slow_param=[4.0], step=STEP_2, sync_every=3),
        dict(param=[8.0], slow_param=[4.0]),
    ),
    (fs.trust_ratio, dict(param=[3.0, 3.0], update=[1.0, -1.0]), dict(update=[3.0, -3.0])),
    (
        fs.trust_ratio,
        dict(param=[3.0, 3.0], update=[1.0, -1.0], max_trust=2.0),
        dict(update=[2.0, -2.0]),
    ),
    (fs.trust_ratio, dict(param=[0.0, 0.0], update=[1.0, -1.0]), dict(update=[1.0, -1.0])),
    (fs.trust_ratio, dict(param=[3.0, 3.0], update=[0.0, 0.0]), dict(update=[0.0, 0.0])),
    (
        fs.larc_ratio,
        dict(
            param=[3.0, 4.0], grad=[0.0, 2.0], update=[8.0, 0.0], trust_coeff=0.5, wd=0.4, eps=1.0
        ),
        dict(update=[4.0, 0.0]),  # 0.5 * 5 / (2 + 0.4 * 5 + 1) = 0.5
    ),
    (
        fs.larc_ratio,
        dict(param=[3.0, 4.0], grad=[0.0, 1.0], update=[8.0, 0.0], trust_coeff=2.0, eps=0.0),
        dict(update=[8.0, 0.0]),
    ),
    (
        fs.larc_ratio,  # the divisor is 0
        dict(param=[0.0], grad=[0.0], update=[3.0], eps=0.0),
        dict(update=[3.0]),
    ),
    (fs.lars_ratio, dict(param=[5.0], grad=[0.0], update=[3.0], eps=0.0), dict(update=[3.0])),
    (
        fs.lars_ratio,
        dict(param=[3.0, 4.0], grad=[0.0, 1.0], update=[8.0, 0.0], trust_coeff=2.0, eps=0.0),
        dict(update=[80.0, 0.0]),
    ),
    (
        fs.compensate_rounding,  # 1 + 3 / 512, between 1 and 1 + 4 / 512
        dict(param=[1 + 2**-8], lost=[2**-9], dtype=torch.bfloat16),
        dict(param=[1 + 2**-7], lost=[-(2**-9)]),
    ),
    (
        fs.round_stochastically,  # what bfloat16 has, whatever is drawn
        dict(param=[1 + 2**-7, -3.0], key=KEY, dtype=torch.bfloat16),
        dict(param=[1 + 2**-7, -3.0]),
    ),
    *moments.CASES,
    *numbers_of_the_field.CASES,
    *matrices_by_hand.CASES,
    *schedule_free_by_hand.CASES,
]


@pytest.mark.parametrize(
    ("rule", "reads", "writes"), CASES, ids=[f"{case[0]!r}-{i}" for i, case in enumerate(CASES)]
)
def test_numbers(rule: Rule, reads: dict[str, Any], writes: dict[str, Any]) -> None:
    arguments = {
        name: T(value).double() if isinstance(value, list) else value
        for name, value in reads.items()
    }
    assert_close(
        rule(**arguments), {name: T(value).double() for name, value in writes.items()}, rtol=1e-6
    )


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_every_rule_has_numbers(rule: Rule) -> None:
    assert rule in [case[0] for case in CASES]


def clipped(grads: dict[str, torch.Tensor], max_norm: float) -> dict[str, torch.Tensor]:
    """What a chain makes of a tree of gradients: a step of -1 from 0."""
    opt, zeros = chain(fs.clip_norm, fs.sgd_step, lr=1.0), {n: 0 * g for n, g in grads.items()}
    after, _ = opt(zeros, grads, opt.init(zeros), {"max_norm": max_norm})
    return {name: -leaf for name, leaf in after.items()}


def test_clip_norm_shortens_to_the_length() -> None:
    """Length 5, of both leaves together, becomes 2.5, but for torch's 1e-6."""
    found = clipped({"a": T([3.0]).double(), "b": T([[4.0]]).double()}, max_norm=2.5)
    assert_close(found, {"a": T([1.5]).double(), "b": T([[2.0]]).double()}, rtol=2.1e-7)


def test_clip_norm_leaves_a_short_gradient_alone() -> None:
    grads = {"a": T([3.0]), "b": T([4.0])}
    assert_same(clipped(grads, max_norm=6.0), grads)


@pytest.mark.parametrize(
    ("sqr_mom", "step", "nu"),
    [
        (0.99, 6, 0.0816792),
        (0.99, 7, 0.1036961),
        (0.99, 10, 0.1551653),
        (0.99, 50, 0.4552388),
        (0.99, 100, 0.6341169),
        (0.99, 500, 0.9827233),
        (0.999, 6, 0.0258211),
        (0.999, 7, 0.0327388),
        (0.999, 100, 0.2153354),
    ],
)
def test_rectification_factors(sqr_mom: float, step: int, nu: float) -> None:
    """FR1: the factors of RAdam."""
    trusted, factor = rectification(T(step, dtype=torch.float64), sqr_mom)
    assert trusted
    assert float(factor) == pytest.approx(nu, abs=6e-8)


@pytest.mark.parametrize("sqr_mom", [0.99, 0.999])
@pytest.mark.parametrize("step", range(1, 6))
def test_the_first_five_steps_are_not_rectified(sqr_mom: float, step: int) -> None:
    assert not rectification(T(step, dtype=torch.float64), sqr_mom)[0]


def test_centralize_leaves_a_complex_vector_alone() -> None:
    """Vectors stay as they are, whatever the numbers are."""
    opt, params = (
        fs.chain(fs.centralize, fs.sgd_step, lr=1.0),
        torch.zeros(2, dtype=torch.complex64),
    )
    grads = T([1 + 3j, 5 - 1j])
    assert_same(opt(params, grads, opt.init(params))[0], -grads)


def test_centralize_subtracts_a_complex_mean() -> None:
    opt, params = (
        fs.chain(fs.centralize, fs.sgd_step, lr=1.0),
        torch.zeros(1, 2, dtype=torch.complex64),
    )
    after, _ = opt(params, T([[1 + 3j, 5 - 1j]]), opt.init(params))
    assert_same(after, T([[2 - 2j, -2 + 2j]]))
