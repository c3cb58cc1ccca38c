"""Rules that move the parameters."""

import torch
from torch import Tensor

from functional_sgd.ranges import Count, NonNegative, Share
from functional_sgd.rule import elementwise

__all__ = ["scale_by", "sgd_step", "sync_slow_params", "take_step"]


@elementwise
def sgd_step(param: Tensor, update: Tensor, *, lr: NonNegative) -> dict[str, Tensor]:
    """Go a little way against the update.

    param = param - lr * update

    Reads param, update (the gradient, if no rule has written another) and lr.
    Source: Robbins and Monro 1951.

    >>> sgd_step(torch.tensor([1.0]), torch.tensor([2.0]), lr=0.25)
    {'param': tensor([0.5000])}
    """
    return dict(param=param - lr * update)


@elementwise
def take_step(param: Tensor, update: Tensor) -> dict[str, Tensor]:
    """sgd_step for an update that has its rate in it.

    param = param - update

    >>> take_step(torch.tensor([1.0]), torch.tensor([0.25]))
    {'param': tensor([0.7500])}
    """
    return dict(param=param - update)


@elementwise
def scale_by(update: Tensor, *, factor: float) -> dict[str, Tensor]:
    """Multiply the update by a number: a hyper, or a number of the tree that `rename` names.

    update = factor * update

    >>> scale_by(torch.tensor([1.0]), factor=3.0)
    {'update': tensor([3.])}
    """
    return dict(update=factor * update)


@elementwise(slow_param=torch.clone)
def sync_slow_params(
    param: Tensor,
    slow_param: Tensor,
    *,
    step: Tensor,
    sync_every: Count = 6,
    slow_step: Share = 0.5,
) -> dict[str, Tensor]:
    """Every few steps, pull slow weights towards the fast ones and go on from there.

    every sync_every-th step:  slow_param = slow_param + slow_step * (param - slow_param);  param =
    slow_param

    Reads param, step, sync_every >= 1 and slow_step in [0, 1]; keeps slow_param, which starts as
    the parameter. Source: Lookahead (Zhang et al. 2019).

    >>> sync_slow_params(torch.tensor([3.0]), torch.tensor([1.0]), step=torch.tensor(6))
    {'param': tensor([2.]), 'slow_param': tensor([2.])}
    """
    now = step % sync_every == 0
    slow_param = torch.where(now, slow_param + slow_step * (param - slow_param), slow_param)
    return dict(param=torch.where(now, slow_param, param), slow_param=slow_param)
