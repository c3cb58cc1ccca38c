"""Rules that move the parameters."""

import torch
from torch import Tensor

from functional_sgd.ranges import Count, NonNegative, Positive, Share
from functional_sgd.rule import elementwise

__all__ = ["average_late", "resilient_step", "sgd_step", "sync_slow_params"]


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


@elementwise(evaluate="average", average=torch.clone)
def average_late(
    param: Tensor, average: Tensor, *, step: Tensor, average_from: NonNegative = 1e6
) -> dict[str, Tensor]:
    """Keep the mean of the params from a late step on; before that, the params.

    average = average + (param - average) / max(1, step - 1 - average_from)

    Reads param, step and average_from >= 0; keeps average, which is what is to be evaluated. Put it
    last. Source: Polyak and Juditsky 1992, with the weights of torch.optim.ASGD.

    >>> one, step = torch.tensor([1.0]), torch.tensor(5)
    >>> average_late(3 * one, one, step=step, average_from=2.0)
    {'average': tensor([2.])}
    """
    number = step - 1 - average_from
    mixed = average + (param - average) / number.clamp(min=1)
    return dict(average=torch.where(number <= 1, param, mixed))


@elementwise(last_grad=torch.zeros_like, step_size=torch.zeros_like)
def resilient_step(
    param: Tensor,
    grad: Tensor,
    last_grad: Tensor,
    step_size: Tensor,
    *,
    step: Tensor,
    lr: NonNegative,
    shrink: Positive = 0.5,
    grow: Positive = 1.2,
    min_size: NonNegative = 1e-6,
    max_size: Positive = 50.0,
) -> dict[str, Tensor]:
    """Step by the sign of the gradient alone: farther while it stays, less far when it changes, and
    then not at all for once.

    step_size = step_size, times grow (shrink) where grad * last_grad is above (below) 0, cut to
    [min_size, max_size]
    last_grad = grad, but 0 where its sign has changed;  param = param - sign(last_grad) * step_size

    Reads param, grad, step, shrink in (0, 1), grow > 1, the bounds, and lr: how far the first step
    goes. Later steps do not read lr. Keeps last_grad, which starts at 0, and step_size. For whole
    data sets: the signs of small batches say little. Source: Rprop (Riedmiller and Braun 1993), in
    the form of torch.optim.Rprop.

    >>> one, step = torch.tensor([1.0]), torch.tensor(2)
    >>> resilient_step(one, one, one, one, step=step, lr=0.1, grow=1.5)
    {'param': tensor([-0.5000]), 'last_grad': tensor([1.]), 'step_size': tensor([1.5000])}
    """
    agreement = grad * last_grad
    step_size = torch.where(step <= 1, lr, step_size)
    other = torch.where(agreement < 0, shrink * step_size, step_size)
    step_size = torch.where(agreement > 0, grow * step_size, other)
    step_size = step_size.clamp(min=min_size).clamp(max=max_size)
    last_grad = torch.where(agreement < 0, 0.0, grad)
    moved = param - last_grad.sign() * step_size
    return dict(param=moved, last_grad=last_grad, step_size=step_size)
