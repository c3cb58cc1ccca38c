"""Rules against gradients that are suddenly far larger than those before."""

import math

import torch
from torch import Tensor

from functional_sgd.ranges import Count, Decay, NonNegative, Positive
from functional_sgd.reduction import root
from functional_sgd.rule import elementwise

__all__ = ["average_without_spikes", "warm_up_again"]


@elementwise(grad_avg=torch.zeros_like, sqr_avg=torch.zeros_like, positive=("sqr_avg",))
def average_without_spikes(
    grad: Tensor,
    grad_avg: Tensor,
    sqr_avg: Tensor,
    *,
    step: Tensor,
    mom: Decay = 0.9,
    sqr_mom: Decay = 0.999,
    spike: Positive = 5000.0,
    restart_every: Count = 500,
    patience: Count = 20,
) -> dict[str, Tensor]:
    """Keep Adam's two averages of gradients that are cut where they are far too large, and forget
    them every now and then.

    age = step % restart_every;  at age 0 both averages are 0 before they go on
    grad = sign(grad) * sqrt(spike * sqr_avg) where that is smaller and sqr_avg > 0, once age is at
    least patience;  then as average_grad and average_sqr_grad

    Reads grad, step, mom and sqr_mom in [0, 1), spike > 0 (how many mean squares a square may be),
    restart_every >= 1 and patience >= 1; keeps grad_avg and sqr_avg, which start at 0.
    Source: SPAM (Huang et al. 2025), whose code cuts to 0 where sqr_avg is 0, so that elements
    whose first gradient comes late never move.

    >>> ten, one, late = torch.tensor([10.0]), torch.tensor([1.0]), torch.tensor(30)
    >>> average_without_spikes(ten, one, one, step=late, mom=0.5, sqr_mom=0.5, spike=4.0)
    {'grad_avg': tensor([1.5000]), 'sqr_avg': tensor([2.5000]), 'update': tensor([1.5000])}
    """
    age = step % restart_every
    grad_avg = torch.where(age == 0, 0.0, grad_avg)
    sqr_avg = torch.where(age == 0, 0.0, sqr_avg)
    limit = spike * sqr_avg
    # Chosen by element first and by number then: Triton's interpreter cannot do both in one
    # condition.
    spiked = (grad.square() > limit) & (sqr_avg > 0)
    cut = torch.where(spiked, grad.sign() * root(limit), grad)
    grad = torch.where(age >= patience, cut, grad)
    grad_avg = mom * grad_avg + (1 - mom) * grad
    sqr_avg = sqr_mom * sqr_avg + (1 - sqr_mom) * grad.square()
    return dict(grad_avg=grad_avg, sqr_avg=sqr_avg, update=grad_avg)


@elementwise
def warm_up_again(
    update: Tensor, *, step: Tensor, restart_every: Count = 500, warmup: NonNegative = 150
) -> dict[str, Tensor]:
    """Begin with small steps once more after every restart; not at the very beginning.

    update = (1 - 0.99 * (1 + cos(pi * age / (warmup + 1))) / 2) * update while age = step %
    restart_every is below warmup, after the first restart

    Reads update, step, restart_every >= 1 and warmup >= 0. Source: SPAM (Huang et al. 2025), with
    the 0.99 of its code.

    >>> warm_up_again(torch.tensor([1.0]), step=torch.tensor(500))
    {'update': tensor([0.0100])}
    """
    age = step % restart_every
    share = 1 - 0.99 * (1 + (math.pi * age / (warmup + 1)).cos()) / 2
    warming = (step >= restart_every) & (age < warmup)
    return dict(update=torch.where(warming, share, 1.0) * update)
