"""Numbers, worked by hand, of the rules that find the rate themselves."""

from typing import Any

import torch

import functional_sgd as fs
from functional_sgd import Rule


def number(value: float) -> torch.Tensor:
    """A number of the whole tree."""
    return torch.tensor(value, dtype=torch.float64)


ZERO, ONE, TWO, FOUR, NINE = map(number, (0.0, 1.0, 2.0, 4.0, 9.0))

RATES: list[tuple[Rule, dict[str, Any], dict[str, Any]]] = [
    # rule, columns as lists and scalars, what it writes: numbers of the tree are no lists
    (
        fs.average_grad_from_first,
        dict(grad=[4.0], grad_avg=[8.0], step=ONE, mom=0.75),
        dict(grad_avg=[4.0], update=[4.0]),
    ),
    (
        fs.average_grad_from_first,
        dict(grad=[4.0], grad_avg=[8.0], step=TWO, mom=0.75),
        dict(grad_avg=[7.0], update=[7.0]),
    ),
    (fs.proximal_decay, dict(param=[6.0], lr=2.0, wd=0.25), dict(param=[4.0])),
    (fs.scale_by, dict(update=[6.0], factor=0.5), dict(update=[3.0])),
    (fs.take_step, dict(param=[6.0], update=[0.5]), dict(param=[5.5])),
    # by an estimate of the distance
    (fs.estimate_distance, dict(distance=TWO, estimate=ONE), dict(distance=2.0)),
    (fs.estimate_distance, dict(distance=ZERO, estimate=ZERO), dict(distance=1e-6)),
    (fs.estimate_distance, dict(distance=ONE, estimate=FOUR), dict(distance=4.0)),
    (
        fs.limit_growth,
        dict(distance=NINE, slow_distance=TWO, growth_rate=1.5),
        dict(slow_distance=3.0),
    ),
    (
        fs.limit_growth,
        dict(distance=FOUR, slow_distance=TWO, growth_rate=4.0),
        dict(slow_distance=4.0),
    ),
    (
        fs.limit_growth,  # the first change
        dict(distance=NINE, slow_distance=ONE, first_distance=1.0, growth_rate=1.5),
        dict(slow_distance=9.0),
    ),
    (fs.rate_by_distance, dict(rate=ZERO, distance=FOUR, lr=0.5), dict(rate=2.0)),
    (
        fs.track_slope,
        dict(
            grad=[3.0], start=[7.0], slope=[8.0], distance=TWO, lr=0.5, slope_mom=0.25,
            first_distance=1.0,
        ),
        dict(start=[7.0], slope=[8.0]),  # a quarter of 8, and 0.5 * 4 * 3
    ),
    (
        fs.average_progress,
        dict(
            param=[1.0, 2.0], grad=[3.0, -1.0], start=[2.0, 4.0], dot_sum=FOUR, distance=TWO,
            lr=0.5, slope_mom=0.25, first_distance=1.0,
        ),
        dict(dot_sum=3.0),  # a quarter of 4, and 0.5 * 4 * (3 - 2)
    ),
    (
        fs.compare_with_slope,
        dict(slope=[1.0, -3.0], estimate=ZERO, dot_sum=FOUR, distance_coeff=0.5),
        dict(estimate=0.5),
    ),
    (fs.compare_with_slope, dict(slope=[0.0], estimate=ONE, dot_sum=ONE), dict(estimate=0.0)),
    (
        fs.compare_with_slope_length,
        dict(slope=[3.0, -4.0], estimate=ZERO, dot_sum=number(10.0)),
        dict(estimate=4.0),
    ),
    (
        fs.compare_with_slope_length,
        dict(slope=[0.0], estimate=ONE, dot_sum=ONE),
        dict(estimate=0.0),
    ),
    (
        fs.scale_by_distance_rms,
        dict(update=[12.0], sqr_avg=[16.0], distance=TWO, eps=1.0),
        dict(update=[2.0]),
    ),
    (fs.weigh_slope, dict(slope=[9.0], sqr_avg=[4.0], eps=1.0), dict(weighed_slope=[3.0])),
    (
        fs.average_dot,
        dict(grad=[1.0, 2.0], weighed_slope=[3.0, 4.0], dot_sum=FOUR, slope_mom=0.5),
        dict(dot_sum=13.0),
    ),
    (fs.add_up_dot, dict(grad=[1.0, 2.0], slope=[3.0, 4.0], dot_sum=FOUR), dict(dot_sum=15.0)),
    (fs.add_up_grad, dict(grad=[1.0], slope=[3.0]), dict(slope=[4.0], update=[4.0])),
    (
        fs.divide_by_first_norm,
        dict(grad=[3.0, 4.0], first_norm=ZERO),
        dict(grad=[0.6, 0.8], first_norm=5.0),
    ),
    (fs.divide_by_first_norm, dict(grad=[3.0], first_norm=TWO), dict(grad=[1.5], first_norm=2.0)),
    (fs.divide_by_first_norm, dict(grad=[0.0], first_norm=ZERO), dict(grad=[0.0], first_norm=0.0)),
    (
        fs.step_from_start,
        dict(param=[8.0], update=[1.0], start=[5.0], mom=0.25),
        dict(param=[5.0], start=[5.0]),
    ),
    (
        fs.weigh_by_sqr_sum,
        dict(grad=[2.0], sqr_sum=[4.0], first_sum=1.0, eps=1.0),
        dict(sqr_sum=[8.0], weight=[0.25]),
    ),
    (
        fs.compare_squares,
        dict(grad=[1.0], slope=[3.0], weight=[0.5], dot_sum=ZERO, grad_squares=ONE),
        dict(update=[1.5], dot_sum=3.0, grad_squares=1.5),  # 4.5 - 1.5
    ),
    # by how far the parameters have come
    (
        fs.dog_ratio,
        dict(
            param=[4.0, 4.0], grad=[2.0, 2.0], start=[1.0, 0.0], distance=TWO, grad_squares=FOUR,
            eps=4.0,
        ),
        dict(update=[2.5, 2.5], start=[1.0, 0.0], distance=5.0, grad_squares=12.0),
    ),
    (
        fs.dog_ratio,  # the first step
        dict(
            param=[3.0], grad=[2.0], start=[3.0], distance=ZERO, grad_squares=ZERO, first_move=0.5,
            eps=1e-12,
        ),
        dict(update=[2.0], start=[3.0], distance=2.0, grad_squares=4.0),
    ),
    (
        fs.dowg_ratio,
        dict(param=[4.0], grad=[3.0], start=[2.0], sqr_distance=ONE, grad_squares=number(28.0),
             eps=2.0),
        dict(update=[1.2], start=[2.0], sqr_distance=4.0, grad_squares=64.0),
    ),
    (
        fs.bet_coins,
        dict(
            param=[3.0], grad=[2.0], start=[4.0], slope=[1.0], largest_grad=[1.0], abs_sum=[2.0],
            reward=[2.0], alpha=2.0,
        ),
        dict(  # 4 - 3 * (2 + 4) / (2 * max(6, 4))
            param=[2.5], start=[4.0], slope=[3.0], largest_grad=[2.0], abs_sum=[4.0], reward=[4.0]
        ),
    ),
    # by the loss
    (fs.polyak_ratio, dict(grad=[1.0, 3.0], value=number(5.0)), dict(update=[0.5, 1.5])),
    (
        fs.polyak_ratio,
        dict(grad=[1.0], value=FOUR, lower_bound=1.0, eps=1.0, max_rate=9.0),
        dict(update=[1.5]),
    ),
    (fs.polyak_ratio, dict(grad=[0.0], value=FOUR), dict(update=[0.0])),
    (fs.polyak_ratio, dict(grad=[1.0], value=ONE, lower_bound=2.0), dict(update=[0.0])),
    (
        fs.average_loss,
        dict(
            param=[1.0, 2.0], grad=[3.0, 4.0], value=NINE, loss_avg=ONE, dot_avg=FOUR,
            share_sum=number(0.5), mom=0.5,
        ),
        dict(loss_avg=5.0, dot_avg=7.5, share_sum=0.75),
    ),
    (
        fs.average_loss_from_first,
        dict(
            param=[1.0], grad=[3.0], value=NINE, loss_avg=ZERO, dot_avg=ZERO, share_sum=ZERO,
            mom=0.5,
        ),
        dict(loss_avg=9.0, dot_avg=3.0, share_sum=1.0),
    ),
    (
        fs.average_loss_from_first,
        dict(
            param=[1.0], grad=[3.0], value=NINE, loss_avg=ONE, dot_avg=ONE, share_sum=ONE, mom=0.5
        ),
        dict(loss_avg=5.0, dot_avg=2.0, share_sum=1.0),
    ),
    (
        fs.momo_ratio,  # the gap is 1.5 * (4 - 1 - 0.5 * 2) + 1 * 2 = 5, over 2 * 2
        dict(
            param=[1.0], update=[2.0], grad_avg=[2.0], loss_avg=FOUR, dot_avg=ONE,
            share_sum=number(0.5), lr=1.0, wd=0.5, lower_bound=2.0,
        ),
        dict(update=[2.5]),
    ),
    (
        fs.momo_ratio,  # at most lr / share_sum
        dict(
            param=[1.0], update=[2.0], grad_avg=[2.0], loss_avg=NINE, dot_avg=ONE,
            share_sum=number(0.5), lr=0.25,
        ),
        dict(update=[1.0]),
    ),
    (
        fs.momo_ratio,
        dict(
            param=[1.0], update=[0.0], grad_avg=[0.0], loss_avg=NINE, dot_avg=ONE, share_sum=ONE
        ),
        dict(update=[0.0]),
    ),
]  # fmt: skip
