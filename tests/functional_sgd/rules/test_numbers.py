"""Every rule on numbers worked by hand."""

from typing import Any

import pytest
import torch

import functional_sgd as fs
from functional_sgd import Rule, chain
from functional_sgd.rules.scaling import rectification
from tests.catalogue import RULES
from tests.comparing import assert_close, assert_same

T = torch.tensor
STEP_1, STEP_2, STEP_5, STEP_6 = (T(float(step), dtype=torch.float64) for step in (1, 2, 5, 6))


def quintic(x: float) -> float:
    """What Muon's iteration makes of a singular value."""
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return x


FOUR = [[2.0], [4.0], [6.0], [8.0]]
RMS = [0.375, -0.75, 0.75, 0.0]
ROWS = T([[1.0, 1.0], [1.0, 0.0]]).double()
NONE = [[0.0, 0.0], [0.0, 0.0]]

CASES: list[tuple[Rule, dict[str, Any], dict[str, list[float]]]] = [
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
        fs.lars_ratio,
        dict(param=[3.0, 4.0], grad=[0.0, 1.0], update=[8.0, 0.0], trust_coeff=2.0, eps=0.0),
        dict(update=[80.0, 0.0]),
    ),
    (fs.orthogonalize, dict(update=[3.0, -4.0]), dict(update=[3.0, -4.0])),
    (fs.orthogonalize, dict(update=[[0.0, 0.0]]), dict(update=[[0.0, 0.0]])),
    (fs.orthogonalize, dict(update=[[0.0], [-5.0]]), dict(update=[[0.0], [-quintic(1.0)]])),
    (
        fs.orthogonalize_in_bfloat16,  # 3 and 4, divided by their length
        dict(update=[[3.0, 0.0], [0.0, 4.0]]),
        dict(update=[[quintic(0.6), 0.0], [0.0, quintic(0.8)]]),
    ),
    (fs.scale_by_aspect, dict(update=[[1.0], [2.0], [3.0], [4.0]]), dict(update=FOUR)),
    (fs.scale_by_aspect, dict(update=[[1.0, 2.0]]), dict(update=[[1.0, 2.0]])),
    (fs.scale_by_aspect, dict(update=[1.0, 2.0]), dict(update=[1.0, 2.0])),
    (
        fs.match_rms_of_adamw,
        dict(update=[[1.0], [2.0], [3.0], [4.0]], rms=1.0),
        dict(update=FOUR),
    ),
    (fs.match_rms_of_adamw, dict(update=[1.0, 2.0]), dict(update=[1.0, 2.0])),
    (fs.set_rms, dict(update=[2.0, -4.0, 4.0, 0.0], rms=0.75, eps=1.0), dict(update=RMS)),
    (fs.set_rms, dict(update=[0.0, 0.0]), dict(update=[0.0, 0.0])),
    (
        fs.normalize_rows,  # all come to 1, and then the length is what it was
        dict(update=[[2.0, 2.0], [0.5, 0.0]], row_avg=[4.0, 0.375], sqr_mom=0.5, eps=0.0),
        dict(row_avg=[4.0, 0.25], update=(ROWS * (8.25 / 3.0) ** 0.5).tolist()),
    ),
    (
        fs.normalize_rows,
        dict(update=[2.0, 3.0], row_avg=[0.0]),
        dict(update=[2.0, 3.0], row_avg=[0.0]),
    ),
    (
        fs.precondition_sides,  # fourth roots of 16, 81 and 256, 16
        dict(
            grad=[[3.0, 0.0], [0.0, 1.0]],
            left=[[7.0, 0.0], [0.0, 80.0]],
            right=[[247.0, 0.0], [0.0, 15.0]],
            left_root=NONE,
            right_root=NONE,
            step=STEP_1,
            eps=1e-12,
        ),
        dict(
            update=[[3.0 / 8, 0.0], [0.0, 1.0 / 6]],
            left=[[16.0, 0.0], [0.0, 81.0]],
            right=[[256.0, 0.0], [0.0, 16.0]],
            left_root=[[1 / 2, 0.0], [0.0, 1 / 3]],
            right_root=[[1 / 4, 0.0], [0.0, 1 / 2]],
        ),
    ),
    (
        fs.precondition_sides,  # not due
        dict(
            grad=[[3.0]],
            left=[[7.0]],
            right=[[1.0]],
            left_root=[[2.0]],
            right_root=[[5.0]],
            step=STEP_2,
            every=2,
        ),
        dict(update=[[30.0]], left=[[16.0]], right=[[10.0]], left_root=[[2.0]], right_root=[[5.0]]),
    ),
    (
        fs.average_in_eigenbasis,  # turned by a quarter: rows are swapped
        dict(
            grad=[[4.0], [0.0]],
            grad_avg=[[0.0], [0.0]],
            sqr_avg=[[8.0], [0.0]],
            left=[[0.0, 0.0], [0.0, 0.0]],
            right=[[16.0]],
            left_basis=[[0.0, 1.0], [1.0, 0.0]],
            right_basis=[[1.0]],
            step=STEP_2,
            mom=0.5,
            sqr_mom=0.5,
            eps=0.0,
        ),
        dict(
            update=[[1.0], [0.0]],  # 4 / sqrt(16): debiased, and no further by the other square
            grad_avg=[[0.0], [2.0]],
            sqr_avg=[[4.0], [8.0]],
            left=[[8.0, 0.0], [0.0, 0.0]],
            right=[[16.0]],
            left_basis=[[0.0, 1.0], [1.0, 0.0]],
            right_basis=[[1.0]],
        ),
    ),
]


@pytest.mark.parametrize(
    ("rule", "reads", "writes"), CASES, ids=[f"{case[0]!r}-{i}" for i, case in enumerate(CASES)]
)
def test_numbers(rule: Rule, reads: dict[str, Any], writes: dict[str, list[float]]) -> None:
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
