"""Rules whose rate is made of the loss, which the caller passes as `value`."""

import torch
from torch import Tensor

from functional_sgd.ranges import Decay, NonNegative, Positive
from functional_sgd.reduction import total
from functional_sgd.rule import elementwise

__all__ = [
    "average_loss",
    "average_loss_from_first",
    "momo_ratio",
    "polyak_ratio",
]


def square_of_grad(grad: Tensor) -> Tensor:
    return grad.square()


def _at_param(param: Tensor, grad: Tensor) -> Tensor:
    return param * grad


def _average_at_param(param: Tensor, grad_avg: Tensor) -> Tensor:
    return param * grad_avg


def _along_update(update: Tensor, grad_avg: Tensor) -> Tensor:
    return update * grad_avg


@elementwise
def polyak_ratio(
    grad: Tensor,
    *,
    value: Tensor,
    square: Tensor = total(square_of_grad, over="tree"),
    lower_bound: float = 0.0,
    max_rate: Positive = 1.0,
    eps: NonNegative = 0.0,
) -> dict[str, Tensor]:
    """Go as far as a straight line with this slope needs from the loss to its lowest value.

    update = grad * min(max(value - lower_bound, 0) / (|grad|**2 + eps), max_rate)

    Reads grad, the loss (`value`, from the caller), lower_bound (of the loss), max_rate > 0 and
    eps >= 0; the length is that of all leaves as one vector. An update along zeros is zero.
    Source: Polyak 1987; SPS_max (Loizou et al. 2021).

    >>> polyak_ratio(torch.tensor([1.0, 1.0]), value=torch.tensor(1.0))
    {'update': tensor([0.5000, 0.5000])}
    """
    square = square + eps
    # At a minimum 0 would be divided by 0.
    rate = (value - lower_bound) / torch.where(square == 0, 1.0, square)
    return dict(update=rate.clamp(min=0.0).clamp(max=max_rate) * grad)


@elementwise(loss_avg=0.0, dot_avg=0.0, share_sum=0.0)
def average_loss(
    param: Tensor,
    grad: Tensor,
    *,
    value: Tensor,
    loss_avg: Tensor,
    dot_avg: Tensor,
    share_sum: Tensor,
    dot: Tensor = total(_at_param, over="tree"),
    mom: Decay = 0.9,
) -> dict[str, Tensor]:
    """Average the loss, and what its tangents give at 0, as average_grad does the gradients.

    loss_avg = mom * loss_avg + (1 - mom) * value
    dot_avg = mom * dot_avg + (1 - mom) * (sum of all param * grad)
    share_sum = mom * share_sum + (1 - mom)

    Reads param, grad, the loss (`value`, from the caller) and mom in [0, 1). Keeps the three, which
    are numbers of the tree and start at 0; share_sum is 1 - mom**steps.
    Source: MoMo-Adam (Schaipp et al. 2024).

    >>> two, zero = torch.tensor([2.0]), torch.tensor(0.0)
    >>> found = average_loss(two, two, value=torch.tensor(3.0), loss_avg=zero, dot_avg=zero,
    ...     share_sum=zero, mom=0.5)
    >>> [float(number) for number in found.values()]
    [1.5, 2.0, 0.5]
    """
    return dict(
        loss_avg=mom * loss_avg + (1 - mom) * value,
        dot_avg=mom * dot_avg + (1 - mom) * dot,
        share_sum=mom * share_sum + (1 - mom),
    )


@elementwise(loss_avg=0.0, dot_avg=0.0, share_sum=0.0)
def average_loss_from_first(
    param: Tensor,
    grad: Tensor,
    *,
    value: Tensor,
    loss_avg: Tensor,
    dot_avg: Tensor,
    share_sum: Tensor,
    dot: Tensor = total(_at_param, over="tree"),
    mom: Decay = 0.9,
) -> dict[str, Tensor]:
    """average_loss with averages that start as what is seen first, so that they have no bias.

    As average_loss, with mom = 0 at the first step. Source: MoMo (Schaipp et al. 2024).

    >>> two, zero = torch.tensor([2.0]), torch.tensor(0.0)
    >>> found = average_loss_from_first(two, two, value=torch.tensor(3.0), loss_avg=zero,
    ...     dot_avg=zero, share_sum=zero, mom=0.5)
    >>> [float(number) for number in found.values()]
    [3.0, 4.0, 1.0]
    """
    first = share_sum == 0
    return dict(
        loss_avg=torch.where(first, value, mom * loss_avg + (1 - mom) * value),
        dot_avg=torch.where(first, dot, mom * dot_avg + (1 - mom) * dot),
        share_sum=torch.where(first, 1.0, mom * share_sum + (1 - mom)),
    )


@elementwise
def momo_ratio(
    param: Tensor,
    update: Tensor,
    grad_avg: Tensor,
    *,
    loss_avg: Tensor,
    dot_avg: Tensor,
    share_sum: Tensor,
    here: Tensor = total(_average_at_param, over="tree"),
    square: Tensor = total(_along_update, over="tree"),
    lr: NonNegative = 1.0,
    wd: NonNegative = 0.0,
    lower_bound: float = 0.0,
) -> dict[str, Tensor]:
    """Go as far as the mean of all tangents of the loss needs to its lowest value, at most lr.

    gap = max((1 + lr * wd) * (loss_avg - dot_avg - share_sum * lower_bound) + <param, grad_avg>, 0)
    update = update * min(lr / share_sum, gap / <update, grad_avg>)

    Reads param, grad_avg, update (grad_avg, scaled or not), the numbers of average_loss, lr >= 0,
    wd >= 0 (that of a proximal_decay afterwards) and lower_bound, which the loss should not
    go below; <a, b> is the sum of a * b over all leaves. The update holds the rate, so take_step
    follows. An update along zeros is zero.
    Source: MoMo (Schaipp et al. 2024).

    >>> two, number = torch.tensor([2.0]), torch.tensor(1.0)
    >>> momo_ratio(two, two, two, loss_avg=2 * number, dot_avg=4 * number, share_sum=number)
    {'update': tensor([1.])}
    """
    gap = (1 + lr * wd) * (loss_avg - dot_avg - share_sum * lower_bound) + here
    rate = gap.clamp(min=0) / torch.where(square == 0, 1.0, square)
    return dict(update=rate.clamp(max=lr / share_sum) * update)
