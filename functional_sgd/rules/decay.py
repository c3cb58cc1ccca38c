"""Rules that pull the parameters towards zero."""

from torch import Tensor

from functional_sgd.ranges import NonNegative, Positive
from functional_sgd.rule import elementwise

__all__ = ["l2_reg", "proximal_decay", "shrink", "weight_decay", "weight_decay_by_square"]


@elementwise
def weight_decay(param: Tensor, *, lr: NonNegative, wd: NonNegative = 0.01) -> dict[str, Tensor]:
    """Shrink every parameter a little, whatever its gradient: decoupled weight decay.

    param = (1 - lr * wd) * param

    Reads param, lr and wd >= 0. Put it first: it acts before the step, as in torch.optim.AdamW.
    Source: Loshchilov and Hutter 2019.

    >>> import torch
    >>> weight_decay(torch.tensor([1.0]), lr=0.5, wd=0.5)
    {'param': tensor([0.7500])}
    """
    return dict(param=(1 - lr * wd) * param)


@elementwise
def weight_decay_by_square(
    param: Tensor, *, lr: NonNegative, max_lr: Positive, wd: NonNegative = 0.01
) -> dict[str, Tensor]:
    """weight_decay that falls with the square of a scheduled rate, so that the weights before a
    normalization keep the length of their gradients.

    param = (1 - lr**2 / max_lr * wd) * param

    Reads param, lr, wd >= 0 and max_lr > 0, the largest lr of the schedule, at which this is
    weight_decay. Source: AdamC (Defazio 2025).

    >>> import torch
    >>> weight_decay_by_square(torch.tensor([1.0]), lr=0.5, max_lr=1.0, wd=1.0)
    {'param': tensor([0.7500])}
    """
    return dict(param=(1 - lr * lr / max_lr * wd) * param)


@elementwise
def proximal_decay(param: Tensor, *, lr: NonNegative, wd: NonNegative = 0.01) -> dict[str, Tensor]:
    """Shrink every parameter after the step, as the exact step on a squared penalty does.

    param = param / (1 + lr * wd)

    Reads param, lr and wd >= 0. Put it last. It never overshoots, however large lr * wd.
    Source: Zhuang et al. 2022, "Understanding AdamW through Proximal Methods"; Adan (Xie et al.
    2022).

    >>> import torch
    >>> proximal_decay(torch.tensor([3.0]), lr=0.5, wd=1.0)
    {'param': tensor([2.])}
    """
    return dict(param=param / (1 + lr * wd))


@elementwise
def l2_reg(param: Tensor, grad: Tensor, *, wd: NonNegative = 0.01) -> dict[str, Tensor]:
    """Add the gradient of a squared penalty, for the rules after it; the caller's gradients stay as
    they are.

    grad = grad + wd * param

    Reads param, grad and wd >= 0. The same as weight_decay for plain SGD only. Source: fastbook
    chapter 16.

    >>> import torch
    >>> l2_reg(torch.tensor([2.0]), torch.tensor([1.0]), wd=0.5)
    {'grad': tensor([2.])}
    """
    return dict(grad=grad + wd * param)


@elementwise
def shrink(param: Tensor, *, lr: NonNegative) -> dict[str, Tensor]:
    """Undo the growth of a step at a right angle to the parameter that is lr times as long.

    param = param / sqrt(1 + lr**2)

    Reads param and lr. Put it last, after a step whose update is as long as the parameter
    (`norm_ratio`). Source: Fromage (Bernstein et al. 2020).

    >>> import torch
    >>> shrink(torch.tensor([5.0]), lr=0.75)
    {'param': tensor([4.])}
    """
    return dict(param=param / (1 + lr * lr) ** 0.5)
