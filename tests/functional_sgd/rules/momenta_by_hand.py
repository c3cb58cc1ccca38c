"""Rules of other momenta, and of restraint, on numbers worked by hand: cases of test_numbers.py."""

from typing import Any

import torch

import functional_sgd as fs
from functional_sgd import Rule

STEP_1, STEP_2 = (torch.tensor(float(step), dtype=torch.float64) for step in (1, 2))

CASES: list[tuple[Rule, dict[str, Any], dict[str, Any]]] = [
    # rule, columns as lists and scalars, what it writes
    (fs.mix_grad, dict(grad=[2.0], update=[6.0], nu=0.75), dict(update=[5.0])),
    (fs.mix_grad, dict(grad=[2.0], update=[6.0], nu=0.0), dict(update=[2.0])),
    (
        fs.average_sqr_grad_from_one,
        dict(grad=[-4.0], sqr_avg=[1.0], sqr_mom=0.75),
        dict(sqr_avg=[4.75]),
    ),
    (
        fs.average_by_turns,  # new = 0.25 * 8 + 0.75 * 4;  (4 * 5 - 3 * 1) / 5
        dict(grad=[4.0], average=[1.0], last_average=[8.0], mom=0.5, contrast=3.0),
        dict(update=[3.4], average=[5.0], last_average=[1.0]),
    ),
    (
        fs.average_with_inertia,  # the mean square is 4: momenta of 0.5, 0.875, 0 and 0.75
        dict(
            grad=[4.0, 4.0, 4.0, 4.0], sqr_avg=[4.0, 1.0, 9.0, 2.0], grad_avg=[2.0, 2.0, 2.0, 2.0],
            mom_product=[0.5, 0.5, 0.5, 0.5], looseness=0.5, eps=0.0,
        ),
        dict(
            update=[4.0, 4.0, 4.0, 4.0], grad_avg=[3.0, 2.25, 4.0, 2.5],
            mom_product=[0.25, 0.4375, 0.0, 0.375],
        ),
    ),
    (
        fs.average_with_inertia,  # all squares are 0: the most inertia there is
        dict(grad=[0.0], sqr_avg=[0.0], grad_avg=[2.0], mom_product=[0.5], eps=0.25),
        dict(update=[2.4], grad_avg=[1.5], mom_product=[0.375]),
    ),
    (
        fs.accelerated_step,  # a long step leads to -1; share = 2 / 4 / 2
        dict(
            param=[3.0], grad=[2.0], far_param=[7.0], lr=0.5, stretch=2.0, advantage=2.0,
            caution=0.5,
        ),
        dict(param=[(0.5 * 2.0 + 0.25 * 5.0) / 0.75], far_param=[5.0]),
    ),
    (
        fs.limit_by_past_rates,  # rate = 0.5 * 0.5 / 0.5 / (1 + 1)
        dict(
            update=[8.0, 8.0], sqr_avg=[1.0, 1.0], rate_avg=[0.0, 1.0], step=STEP_1, lr=0.5,
            mom=0.5, sqr_mom=0.75, rate_mom=0.5, eps=1.0,
        ),
        dict(update=[1.0, 2.0], rate_avg=[0.125, 0.625]),
    ),
    (
        fs.scale_by_signal,  # without bias 1, 1, 0 and 2; noise is 5 / 4 * (0, 2, 4, 0)
        dict(update=[0.75, 0.75, 0.0, 1.5], sqr_avg=[0.75, 2.25, 3.0, 3.0], step=STEP_2, mom=0.5),
        dict(update=[1.0, 2 / 7, 0.0, 2.0]),
    ),
    (
        fs.scale_by_signal,
        dict(update=[0.0], sqr_avg=[0.0], step=STEP_2, mom=0.5),
        dict(update=[0.0]),
    ),
    (
        fs.follow_sign,
        dict(grad=[2.0, -2.0, 0.0, -2.0], update=[3.0, 3.0, 3.0, -3.0]),
        dict(update=[3.0, -3.0, 0.0, -3.0]),
    ),
    (
        fs.weight_decay_by_square,  # 1 - 0.25 / 0.5 * 0.5
        dict(param=[4.0], lr=0.5, max_lr=0.5, wd=0.5),
        dict(param=[3.0]),
    ),
    (
        fs.weight_decay_by_square,
        dict(param=[4.0], lr=0.5, max_lr=1.0, wd=0.5),
        dict(param=[3.5]),
    ),
    (
        fs.follow_leader_step,  # roots go from 3 to 5: slope + 4 - 2 / 0.5 * param
        dict(
            param=[2.0, 2.0, 2.0], grad=[4.0, 4.0, 4.0], slope=[10.0, 4.5, -8.0],
            sqr_sum=[9.0, 9.0, 9.0], lr=0.5, beta=1.0, l1=1.0, l2=4.0,
        ),
        dict(
            param=[(1.0 - 6.0) / 16, 0.0, (12.0 - 1.0) / 16], slope=[6.0, 0.5, -12.0],
            sqr_sum=[25.0, 25.0, 25.0],
        ),
    ),
    (
        fs.follow_leader_step,  # nothing seen yet
        dict(param=[2.0], grad=[0.0], slope=[0.0], sqr_sum=[0.0], lr=0.5, l1=1.0),
        dict(param=[2.0], slope=[0.0], sqr_sum=[0.0]),
    ),
]  # fmt: skip
