"""Numbers worked by hand, for rules of layer-wise, lean, noisy and other optimizers."""

from typing import Any

import torch

import functional_sgd as fs
from functional_sgd import Rule
from functional_sgd.randomness import TrialKey

KEY = TrialKey()  # which draws the same number for all
DRAWN = 0.6744897502  # the quantile of 3/4


def at(step: int) -> torch.Tensor:
    """A step as rules get it."""
    return torch.tensor(float(step), dtype=torch.float64)


CASES: list[tuple[Rule, dict[str, Any], dict[str, Any]]] = [
    # rule, columns as lists and scalars, what it writes
    (
        fs.norm_ratio,
        dict(param=[30.0, 40.0], update=[0.0, 2.0]),
        dict(update=[0.0, 50.0]),
    ),
    (fs.norm_ratio, dict(param=[0.0, 0.0], update=[0.0, 2.0]), dict(update=[0.0, 2.0])),
    (fs.norm_ratio, dict(param=[3.0, 4.0], update=[0.0, 0.0]), dict(update=[0.0, 0.0])),
    (
        fs.scale_by_param_rms,
        dict(param=[1.0, 7.0], update=[2.0, -1.0]),
        dict(update=[10.0, -5.0]),
    ),
    (
        fs.scale_by_param_rms,
        dict(param=[0.0, 0.0], update=[2.0, -1.0], min_rms=0.5),
        dict(update=[1.0, -0.5]),
    ),
    (
        fs.lars_grad,  # 0.5 * 5 / (2 + 0.4 * 5 + 1) = 0.5, of (0, 2) + 0.4 * (3, 4)
        dict(param=[3.0, 4.0], grad=[0.0, 2.0], trust_coeff=0.5, wd=0.4, eps=1.0),
        dict(grad=[0.6, 1.8]),
    ),
    (fs.lars_grad, dict(param=[0.0, 0.0], grad=[3.0, 4.0], wd=0.1), dict(grad=[3.0, 4.0])),
    (fs.lars_grad, dict(param=[3.0, 4.0], grad=[0.0, 0.0]), dict(grad=[0.0, 0.0])),
    (
        fs.lars_grad,
        dict(param=[3.0, 4.0], grad=[0.0, 0.0], trust_coeff=0.5, wd=0.1),
        dict(grad=[1.5, 2.0]),  # 0.5 * 5 / (0.1 * 5) = 5
    ),
    (fs.shrink, dict(param=[5.0], lr=0.75), dict(param=[4.0])),
    (fs.clip_rms, dict(grad=[1.0, 7.0], max_rms=2.5), dict(grad=[0.5, 3.5])),
    (fs.clip_rms, dict(grad=[1.0, 7.0], max_rms=6.0), dict(grad=[1.0, 7.0])),
    (
        fs.adaptive_clip,
        dict(param=[[3.0, 4.0], [0.0, 0.0]], grad=[[6.0, 8.0], [0.0, 2.0]], max_ratio=0.1, eps=10),
        dict(grad=[[0.6, 0.8], [0.0, 1.0]]),
    ),
    (
        fs.adaptive_clip,
        dict(param=[3.0, 4.0], grad=[0.0, 2.0], max_ratio=0.2),
        dict(grad=[0.0, 1.0]),
    ),
    (fs.adaptive_clip, dict(param=[3.0], grad=[0.01]), dict(grad=[0.01])),
    (fs.normalize, dict(grad=[3.0, 4.0], eps=5.0), dict(grad=[0.3, 0.4])),
    (
        fs.optimistic,
        dict(grad=[3.0], last_grad=[9.0], step=at(1)),
        dict(update=[3.0], last_grad=[3.0]),
    ),
    (
        fs.optimistic,
        dict(grad=[3.0], last_grad=[1.0], step=at(2)),
        dict(update=[5.0], last_grad=[3.0]),
    ),
    (
        fs.scale_by_rms_eps_early,
        dict(update=[6.0], sqr_avg=[4.0], step=at(1), sqr_mom=0.75, eps=0.5),
        dict(update=[2.0]),
    ),
    (fs.take_sign, dict(update=[-3.0, 0.0, 0.1]), dict(update=[-1.0, 0.0, 1.0])),
    (
        fs.dual_average_step,  # weight = 1 * sqrt(4); sqr_sum = 8; goal = 10 - (2 + 4) / (2 + 1)
        dict(
            param=[4.0], grad=[2.0], start=[10.0], grad_sum=[2.0], sqr_sum=[0.0], step=at(4),
            lr=0.0, mom=0.5, eps=1.0,
        ),  # but lr is 0, so nothing is added
        dict(param=[7.0], start=[10.0], grad_sum=[2.0], sqr_sum=[0.0]),
    ),
    (
        fs.dual_average_step,
        dict(
            param=[4.0], grad=[2.0], start=[10.0], grad_sum=[2.0], sqr_sum=[0.0], step=at(4),
            lr=0.5, mom=0.5, eps=0.5,
        ),  # weight = (0.5 + 0.5) * sqrt(4); goal = 10 - 6 / (cbrt(8) + 0.5)
        dict(param=[0.5 * 4 + 0.5 * 7.6], start=[10.0], grad_sum=[6.0], sqr_sum=[8.0]),
    ),
    (
        fs.add_noise,
        dict(grad=[1.0], key=KEY, step=at(4), noise=8.0, noise_decay=0.5),
        dict(grad=[1 + 2 * DRAWN]),
    ),
    (
        fs.langevin_noise,
        dict(param=[1.0], key=KEY, lr=0.5, temperature=4.0),
        dict(param=[1 + 2 * DRAWN]),
    ),
    (
        fs.average_curvature,
        dict(hessian=[4.0], curvature=[8.0], step=at(4), sqr_mom=0.75, hessian_every=3),
        dict(curvature=[7.0]),
    ),
    (
        fs.average_curvature,
        dict(hessian=[4.0], curvature=[8.0], step=at(3), sqr_mom=0.75, hessian_every=3),
        dict(curvature=[8.0]),
    ),
    (
        fs.scale_by_curvature,
        dict(update=[1.0, 9.0, -1.0, 0.0], curvature=[4.0, 4.0, -4.0, 0.0], rho=0.5),
        dict(update=[0.5, 1.0, -1.0, 0.0]),
    ),
    (
        fs.average_without_spikes,  # 10**2 > 4 * 1, so 2 is left of it
        dict(grad=[-10.0, 1.5], grad_avg=[4.0, 4.0], sqr_avg=[1.0, 1.0], step=at(7), mom=0.5,
             sqr_mom=0.5, spike=4.0, restart_every=5, patience=2),
        dict(grad_avg=[1.0, 2.75], sqr_avg=[2.5, 1.625], update=[1.0, 2.75]),
    ),
    (
        fs.average_without_spikes,  # too early after a restart
        dict(grad=[-10.0], grad_avg=[4.0], sqr_avg=[1.0], step=at(6), mom=0.5, sqr_mom=0.5,
             spike=4.0, restart_every=5, patience=2),
        dict(grad_avg=[-3.0], sqr_avg=[50.5], update=[-3.0]),
    ),
    (
        fs.average_without_spikes,  # there is no mean square yet, so nothing is a spike
        dict(grad=[-10.0], grad_avg=[0.0], sqr_avg=[0.0], step=at(7), mom=0.5, sqr_mom=0.5,
             spike=4.0, restart_every=5, patience=2),
        dict(grad_avg=[-5.0], sqr_avg=[50.0], update=[-5.0]),
    ),
    (
        fs.average_without_spikes,  # a restart
        dict(grad=[-10.0], grad_avg=[4.0], sqr_avg=[1.0], step=at(5), mom=0.5, sqr_mom=0.5,
             spike=4.0, restart_every=5, patience=2),
        dict(grad_avg=[-5.0], sqr_avg=[50.0], update=[-5.0]),
    ),
    (
        fs.warm_up_again,  # cos(pi / 2) = 0
        dict(update=[2.0], step=at(12), restart_every=10, warmup=3),
        dict(update=[2 * (1 - 0.99 / 2)]),
    ),
    (fs.warm_up_again, dict(update=[2.0], step=at(2), restart_every=10), dict(update=[2.0])),
    (
        fs.warm_up_again,
        dict(update=[2.0], step=at(13), restart_every=10, warmup=3),
        dict(update=[2.0]),
    ),
    (
        fs.scale_by_norm_avg,
        dict(grad=[3.0, 4.0], sqr_norm_avg=[9.0], step=at(1), eps=5.0),
        dict(sqr_norm_avg=25.0, update=[0.3, 0.4]),
    ),
    (
        fs.scale_by_norm_avg,
        dict(grad=[3.0, 4.0], sqr_norm_avg=[7.0], step=at(2), sqr_mom=0.5, eps=0.0),
        dict(sqr_norm_avg=16.0, update=[0.75, 1.0]),
    ),
    (
        fs.average_sqr_rows,
        dict(grad=[[1.0, 3.0], [0.0, 2.0]], row_sqr_avg=[1.0, 4.0], sqr_mom=0.5),
        dict(row_sqr_avg=[3.0, 3.0], sqr_avg=[[3.0, 3.0], [3.0, 3.0]]),
    ),
    (
        fs.average_sqr_rows,
        dict(grad=[1.0, 3.0], row_sqr_avg=[1.0], sqr_mom=0.5),
        dict(row_sqr_avg=[3.0], sqr_avg=[3.0, 3.0]),
    ),
    (
        fs.scale_by_axes,  # bounds: 1 + 9, 1 + 0; 1 + 0, 4 + 5
        dict(grad=[[3.0, 0.0], [0.0, 5.0**0.5]], covers=[1.0, 5.0, 1.0, 4.0], eps=6.0),
        dict(update=[[0.75, 0.0], [0.0, (1 / 3) ** 0.5]], covers=[10.0, 9.0, 10.0, 9.0]),
    ),
    (
        fs.scale_by_axes,
        dict(grad=[3.0, 0.0], covers=[16.0, 0.0]),
        dict(update=[0.6, 0.0], covers=[25.0, 0.0]),
    ),
    (
        fs.scale_by_factors,  # means of squares: rows 8, 2; columns 5, 5
        dict(grad=[[4.0, 0.0], [2.0**0.5, 2.0**0.5]], sqr_rows=[0.0, 2.0], sqr_columns=[1.0, 1.0],
             sqr_mom=0.5),
        dict(
            sqr_rows=[4.0, 2.0],
            sqr_columns=[5.0, 1.0],
            update=[[4 / (4 * 5 / 3) ** 0.5, 0.0], [2.0**0.5 / (2 * 5 / 3) ** 0.5, 3.0**0.5]],
        ),
    ),
    (
        fs.scale_by_factors,
        dict(grad=[4.0], sqr_rows=[0.0], sqr_columns=[0.0], sqr_mom=0.75),
        dict(sqr_rows=[4.0], sqr_columns=[0.0], update=[2.0]),
    ),
    (
        fs.scale_by_confidence,  # doubts: 4, 4
        dict(update=[[3.0, 3.0]], grad_avg=[[1.0, 5.0]], doubt_rows=[4.0], doubt_columns=[0.0, 4.0],
             doubt_mom=0.5),
        dict(doubt_rows=[4.0], doubt_columns=[2.0, 4.0], update=[[0.5**0.5, 2.5]]),
    ),
    (
        fs.scale_by_confidence,
        dict(update=[3.0], grad_avg=[1.0], doubt_rows=[0.0], doubt_columns=[0.0]),
        dict(doubt_rows=[0.0], doubt_columns=[0.0], update=[1.0]),
    ),
]  # fmt: skip
