"""The rules of schedule-free learning, on numbers worked by hand."""

from typing import Any

import torch

import functional_sgd as fs
from functional_sgd import Rule


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


CASES: list[tuple[Rule, dict[str, Any], dict[str, Any]]] = [
    # rule, columns as lists and scalars, what it writes
    (  # the largest lr so far was 2, so the weight is 4, of 16 in all
        fs.weigh_steps,
        dict(lr=number(0.5), lr_max=number(2.0), weight_sum=number(12.0), share=number(0.0)),
        dict(lr_max=2.0, weight_sum=16.0, share=0.25),
    ),
    (  # a new largest lr, by its third power
        fs.weigh_steps,
        dict(
            lr=number(2.0),
            lr_max=number(1.0),
            weight_sum=number(8.0),
            share=number(0.0),
            lr_power=3.0,
        ),
        dict(lr_max=2.0, weight_sum=16.0, share=0.5),
    ),
    (  # no step has had a weight yet
        fs.weigh_steps,
        dict(lr=number(0.0), lr_max=number(0.0), weight_sum=number(0.0), share=number(0.0)),
        dict(lr_max=0.0, weight_sum=0.0, share=0.0),
    ),
    (fs.step_from_fast, dict(param=[8.0], fast=[3.0], lr=0.5, wd=0.25), dict(param=[2.0])),
    (
        fs.train_between,
        dict(param=[6.0], fast=[1.0], average=[2.0], share=number(0.25), mom=0.75),
        dict(fast=[6.0], average=[3.0], param=[3.75]),
    ),
    (  # early: not trusted
        fs.rectify_lr,
        dict(lr=number(0.5), rate=number(1.0), step=number(4.0), sqr_mom=0.999),
        dict(rate=0.0),
    ),
    (  # late: the factor is 1
        fs.rectify_lr,
        dict(lr=number(0.5), rate=number(1.0), step=number(1e5), sqr_mom=0.75),
        dict(rate=0.5),
    ),
    (  # 3 / (1 - 0.5**2) is 4
        fs.scale_by_debiased_rms,
        dict(update=[9.0], sqr_avg=[3.0], step=number(2.0), sqr_mom=0.5, eps=1.0),
        dict(update=[3.0]),
    ),
]
