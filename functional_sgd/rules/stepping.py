"""Rules that move the parameters."""

import torch
from torch import Tensor

from functional_sgd.ranges import AboveOne, Count, Decay, Fraction, NonNegative, Positive, Share
from functional_sgd.reduction import root
from functional_sgd.rule import elementwise

__all__ = [
    "average_late",
    "dual_average_step",
    "follow_leader_step",
    "resilient_step",
    "scale_by",
    "sgd_step",
    "sync_slow_params",
    "take_step",
]


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


@elementwise(last_grad=torch.zeros_like, step_size=torch.zeros_like, positive=("step_size",))
def resilient_step(
    param: Tensor,
    grad: Tensor,
    last_grad: Tensor,
    step_size: Tensor,
    *,
    step: Tensor,
    lr: NonNegative,
    shrink: Fraction = 0.5,
    grow: AboveOne = 1.2,
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
    # lr is a hyper, so the slot cannot begin as it.
    step_size = torch.where(step <= 1, lr, step_size)
    other = torch.where(agreement < 0, shrink * step_size, step_size)
    step_size = torch.where(agreement > 0, grow * step_size, other)
    step_size = step_size.clamp(min=min_size).clamp(max=max_size)
    last_grad = torch.where(agreement < 0, 0.0, grad)
    moved = param - last_grad.sign() * step_size
    return dict(param=moved, last_grad=last_grad, step_size=step_size)


@elementwise(
    start=torch.clone,
    grad_sum=torch.zeros_like,
    sqr_sum=torch.zeros_like,
    positive=("sqr_sum",),
)
def dual_average_step(
    param: Tensor,
    grad: Tensor,
    start: Tensor,
    grad_sum: Tensor,
    sqr_sum: Tensor,
    *,
    step: Tensor,
    lr: NonNegative,
    mom: Decay = 0.9,
    eps: NonNegative = 1e-6,
) -> dict[str, Tensor]:
    """Go towards the point to which all gradients together lead from where training began.

    weight = (lr + eps) * sqrt(step), 0 if lr is 0
    grad_sum = grad_sum + weight * grad;  sqr_sum = sqr_sum + weight * grad**2
    goal = start - grad_sum / (cbrt(sqr_sum) + eps);  param = mom * param + (1 - mom) * goal

    Reads param, grad, step, lr, mom in [0, 1) and eps >= 0; keeps grad_sum and sqr_sum, which start
    at 0, and start, which is the parameter as it was at step 1.
    Source: MADGRAD (Defazio and Jelassi 2022).

    >>> one, zero, eight = torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([7.0])
    >>> now = dual_average_step(one, one, one, zero, eight, step=torch.tensor(1), lr=1.0, eps=0.0)
    >>> now["sqr_sum"], now["param"]  # goal = 1 - 1 / 2
    (tensor([8.]), tensor([0.9500]))
    """
    start = torch.where(step <= 1, param, start)  # as the authors, who begin at the first gradient
    # lr = 0 must leave the params alone, although eps is added to it. Times step, since where needs
    # a tensor to ask, and lr may be a plain number.
    weight = torch.where(lr * step == 0, 0.0, (lr + eps) * step.sqrt())
    grad_sum, sqr_sum = grad_sum + weight * grad, sqr_sum + weight * grad.square()
    # Where no gradient has been, Halley's method would divide 0 by 0, and eps may be 0.
    flat = sqr_sum == 0
    divisor = _cube_root(torch.where(flat, 1.0, sqr_sum)) + eps
    way = torch.where(flat, 0.0, grad_sum / divisor)
    moved = mom * param + (1 - mom) * (start - way)
    return dict(param=moved, start=start, grad_sum=grad_sum, sqr_sum=sqr_sum)


@elementwise(slope=torch.zeros_like, sqr_sum=torch.zeros_like, positive=("sqr_sum",))
def follow_leader_step(
    param: Tensor,
    grad: Tensor,
    slope: Tensor,
    sqr_sum: Tensor,
    *,
    lr: Positive,
    beta: NonNegative = 0.0,
    l1: NonNegative = 0.0,
    l2: NonNegative = 0.0,
) -> dict[str, Tensor]:
    """Go to where all gradients so far, and two penalties, would have had it best; elements of
    little use are exactly 0.

    squares = sqr_sum + grad**2
    slope = slope + grad - (sqrt(squares) - sqrt(sqr_sum)) / lr * param;  sqr_sum = squares
    param = 0 where |slope| <= l1
    param = (sign(slope) * l1 - slope) / ((beta + sqrt(sqr_sum)) / lr + l2) elsewhere

    Reads param, grad, lr > 0 (alpha), beta, l1 and l2, all >= 0. Keeps slope and sqr_sum, which
    start at 0. An element that has had no gradient yet stays where it is.
    Source: FTRL-Proximal (McMahan et al. 2013), algorithm 1.

    >>> one, zero = torch.tensor([1.0]), torch.tensor([0.0])  # slope = 2 - 2 / 0.5 * 1
    >>> follow_leader_step(one, 2 * one, zero, zero, lr=0.5, l1=1.0)
    {'param': tensor([0.2500]), 'slope': tensor([-2.]), 'sqr_sum': tensor([4.])}
    """
    squares = sqr_sum + grad.square()
    length = root(squares)
    slope = slope + grad - (length - root(sqr_sum)) / lr * param
    # With beta = l2 = 0, bend is 0 where no gradient has been.
    unseen = squares == 0
    bend = (beta + length) / lr + l2
    goal = (slope.sign() * l1 - slope) / torch.where(unseen, 1.0, bend)
    moved = torch.where(slope.abs() <= l1, 0.0, goal)
    return dict(param=torch.where(unseen, param, moved), slope=slope, sqr_sum=squares)


def _cube_root(x: Tensor) -> Tensor:
    """x**(1/3) for x > 0, by Halley's method.

    In kernels and in torch, powers are not rounded alike; roots, products and quotients are.
    """
    fourth = x.sqrt().sqrt()
    guess = power = fourth
    for _ in range(3):  # 1/3 = 1/4 + 1/16 + 1/64 + ...
        power = power.sqrt().sqrt()
        guess = guess * power
    for _ in range(5):
        cube = guess * guess * guess
        guess = guess - guess * ((cube - x) / (2 * cube + x))
    return guess


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
