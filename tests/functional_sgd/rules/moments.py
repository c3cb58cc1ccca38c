"""The rules of Adam's kin on numbers worked by hand: cases of test_numbers.py."""

from typing import Any

import torch

import functional_sgd as fs
from functional_sgd import Rule

STEP_1, STEP_2, STEP_3, STEP_17 = (
    torch.tensor(float(step), dtype=torch.float64) for step in (1, 2, 3, 17)
)

CASES: list[tuple[Rule, dict[str, Any], dict[str, Any]]] = [
    # rule, columns as lists and scalars, what it writes
    (
        fs.average_sqr_error,
        dict(grad=[5.0], grad_avg=[3.0], sqr_avg=[8.0], sqr_mom=0.75, eps_root=0.5),
        dict(sqr_avg=[7.5]),
    ),
    (
        fs.average_sqr_grad_additive,  # below, at and above the square
        dict(grad=[2.0, 2.0, 2.0], sqr_avg=[1.0, 4.0, 100.0], sqr_mom=0.75),
        dict(sqr_avg=[2.0, 4.0, 99.0]),
    ),
    (
        fs.average_sqr_grad_from_first,
        dict(grad=[4.0], sqr_avg=[8.0], step=STEP_1, sqr_mom=0.75),
        dict(sqr_avg=[16.0]),
    ),
    (
        fs.average_sqr_grad_from_first,
        dict(grad=[4.0], sqr_avg=[8.0], step=STEP_2, sqr_mom=0.75),
        dict(sqr_avg=[10.0]),
    ),
    (
        fs.normalize_by_past_rms,
        dict(grad=[4.0, 4.0, 4.0], sqr_avg=[4.0, 0.25, 0.0], step=STEP_2, eps=1.0),
        dict(update=[2.0, 4.0, 4.0]),
    ),
    (
        fs.normalize_by_past_rms,
        dict(grad=[4.0], sqr_avg=[0.0], step=STEP_1),
        dict(update=[0.0]),
    ),
    (fs.clip_growing, dict(update=[4.0, -4.0], step=STEP_1), dict(update=[0.0, 0.0])),
    (fs.clip_growing, dict(update=[4.0, -4.0], step=STEP_2), dict(update=[1.0, -1.0])),
    (
        fs.clip_growing,
        dict(update=[5.0, -3.0], step=STEP_17, clip_power=0.5),
        dict(update=[4.0, -3.0]),
    ),
    (
        fs.scale_by_past_rms,
        dict(grad=[4.0], sqr_avg=[0.0], step=STEP_1, eps=0.0),
        dict(update=[4.0]),
    ),
    (
        fs.scale_by_past_rms,  # 7 / (1 - 0.75**2) = 16
        dict(grad=[10.0], sqr_avg=[7.0], step=STEP_3, sqr_mom=0.75, eps=1.0),
        dict(update=[2.0]),
    ),
    (
        fs.average_difference,
        dict(grad=[4.0], last_grad=[2.0], diff_avg=[8.0], step=STEP_1, diff_mom=0.75),
        dict(last_grad=[4.0], diff_avg=[6.0], ahead=[4.0]),
    ),
    (
        fs.average_difference,
        dict(grad=[4.0], last_grad=[2.0], diff_avg=[8.0], step=STEP_2, diff_mom=0.75),
        dict(last_grad=[4.0], diff_avg=[6.5], ahead=[5.5]),
    ),
    (
        fs.add_average_difference,
        dict(update=[1.0], diff_avg=[7.0], step=STEP_2, diff_mom=0.75),
        dict(update=[13.0]),
    ),
    (fs.add_weighted, dict(update=[1.0], other=[3.0], alpha=2.0), dict(update=[7.0])),
    (
        fs.debias_ahead,  # 0.5 * 7 / (1 - 0.5**3) + 0.5 * 3 / (1 - 0.5**2)
        dict(grad=[3.0], grad_avg=[7.0], step=STEP_2, mom=0.5),
        dict(update=[6.0]),
    ),
    (
        fs.bound_rate,  # 0.5 / 0.5 / (sqrt_avg + 0) between 4 * (1 - 1/3) and 4 * (1 + 1/2)
        dict(
            update=[3.0, 3.0, 3.0], sqr_avg=[1.0, 0.0625, 0.0], step=STEP_2, mom=0.5,
            sqr_mom=0.75**0.5, eps=0.0, final_scale=4.0, gamma=1.0,
        ),
        dict(update=[8.0, 8.0, 18.0]),
    ),
    (
        fs.reduce_variance,
        dict(grad=[4.0], last_grad=[2.0], mom=0.75, gamma=0.5),
        dict(grad=[7.0], last_grad=[4.0]),
    ),
    (
        fs.grokfast,
        dict(grad=[4.0], slow_grad=[8.0], step=STEP_1, slow_mom=0.75, amplify=2.0),
        dict(grad=[12.0], slow_grad=[4.0]),
    ),
    (
        fs.grokfast,
        dict(grad=[4.0], slow_grad=[8.0], step=STEP_2, slow_mom=0.75, amplify=2.0),
        dict(grad=[18.0], slow_grad=[7.0]),
    ),
    (
        fs.cautious,
        dict(grad=[1.0, -1.0, 0.0, 1e-30], update=[3.0, 3.0, 3.0, 1e-30]),
        dict(update=[6.0, 0.0, 0.0, 2e-30]),
    ),
    (fs.cautious, dict(grad=[-1.0], update=[3.0]), dict(update=[0.0])),
    (
        fs.sqr_ratio,
        dict(grad=[4.0, 4.0], sqr_avg=[8.0, 0.0], eps=2.0),
        dict(ratio=[2.0, 4.0]),
    ),
    (
        fs.limit_by_rms,
        dict(update=[6.0, 3.0], ratio=[2.0, 16.0]),
        dict(update=[2.0, 1.0]),
    ),
    (fs.limit_by_rms, dict(update=[6.0, 3.0], ratio=[0.0, 1.0]), dict(update=[6.0, 3.0])),
    (
        fs.project_radial,  # the first row is orthogonal to its gradient, the second is not
        dict(
            param=[[2.0, 0.0], [0.0, 4.0]], grad=[[0.0, 1.0], [1.0, 1.0]],
            update=[[3.0, 1.0], [2.0, 2.0]], lr=0.5, wd=1.0, delta=0.5,
        ),
        dict(update=[[3.0, 1.0], [2.0, 2.0]], param=[[1.0, 0.0], [0.0, 2.0]]),
    ),
    (
        fs.project_radial,  # both rows are
        dict(
            param=[[2.0, 0.0], [0.0, 4.0]], grad=[[0.0, 1.0], [1.0, 0.0]],
            update=[[3.0, 1.0], [2.0, 2.0]], lr=0.5, wd=1.0, wd_ratio=0.5, eps=0.0,
        ),
        dict(update=[[0.0, 1.0], [2.0, 0.0]], param=[[1.5, 0.0], [0.0, 3.0]]),
    ),
    (
        fs.project_radial,  # no row is, but the leaf as a whole
        dict(
            param=[[1.0], [1.0]], grad=[[1.0], [-1.0]], update=[[3.0], [1.0]], lr=0.5, eps=0.0,
        ),
        dict(update=[[1.0], [-1.0]], param=[[1.0], [1.0]]),
    ),
    (
        fs.project_radial,
        dict(param=[2.0, 0.0], grad=[0.0, 1.0], update=[3.0, 1.0], lr=0.5, wd=1.0),
        dict(update=[3.0, 1.0], param=[1.0, 0.0]),
    ),
    (fs.clip_leaf_norm, dict(grad=[3.0, 4.0], max_norm=2.5), dict(grad=[1.5, 2.0])),
    (fs.clip_leaf_norm, dict(grad=[3.0, 4.0], max_norm=6.0), dict(grad=[3.0, 4.0])),
    (fs.clip_leaf_norm, dict(grad=[0.0, 0.0], max_norm=6.0), dict(grad=[0.0, 0.0])),
    (fs.proximal_decay, dict(param=[9.0], lr=0.5, wd=4.0), dict(param=[3.0])),
]  # fmt: skip
