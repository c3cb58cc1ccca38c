"""Rules that go less far where gradients are mostly noise, or where that was not usual so far."""

import torch
from torch import Tensor

from functional_sgd.ranges import Decay, NonNegative
from functional_sgd.rule import elementwise
from functional_sgd.rules.moments import adam_scale

__all__ = ["limit_by_past_rates", "scale_by_signal"]


@elementwise(rate_avg=torch.zeros_like, positive=("rate_avg",))
def limit_by_past_rates(
    update: Tensor,
    sqr_avg: Tensor,
    rate_avg: Tensor,
    *,
    step: Tensor,
    lr: NonNegative,
    mom: Decay = 0.9,
    sqr_mom: Decay = 0.99,
    rate_mom: Decay = 0.999,
    eps: NonNegative = 1e-8,
) -> dict[str, Tensor]:
    """Scale the average as Adam does, but by no more than was usual so far.

    rate = lr * sqrt(1 - sqr_mom**step) / (1 - mom**step) / (sqrt(sqr_avg) + eps)
    rate_avg = rate_mom * rate_avg + (1 - rate_mom) * rate;  update = min(rate, rate_avg) * update

    Reads update and sqr_avg (both averages not debiased), step, lr, the momenta in [0, 1) and eps
    >= 0 (at 0, 0 / 0 is NaN). Keeps rate_avg, which starts at 0: a warm-up. The rate is in the
    update: `take_step`. Source: AdaMod (Ding et al. 2019).

    >>> one, four = torch.tensor([1.0]), torch.tensor([4.0])
    >>> limit_by_past_rates(one, 4 * one, 0 * one, step=torch.tensor(1), lr=1.0, mom=0.5,
    ...                     sqr_mom=0.75, rate_mom=0.5, eps=0.0)
    {'update': tensor([0.2500]), 'rate_avg': tensor([0.2500])}
    """
    rate = adam_scale(sqr_avg, step, mom, sqr_mom, eps, lr)
    rate_avg = rate_mom * rate_avg + (1 - rate_mom) * rate
    return dict(update=torch.minimum(rate, rate_avg) * update, rate_avg=rate_avg)


@elementwise
def scale_by_signal(
    update: Tensor, sqr_avg: Tensor, *, step: Tensor, mom: Decay = 0.9
) -> dict[str, Tensor]:
    """Go as far as the average of the gradient can be told from noise.

    update and sqr_avg without bias: each divided by 1 - mom**step
    noise = rho * (sqr_avg - update**2) / (1 - rho);  update = update**3 / (update**2 + noise)
    rho = min((1 - mom) * (1 + mom**step) / ((1 + mom) * (1 - mom**step)), 0.9999)

    Reads update (the average) and sqr_avg, both not debiased and of one momentum, step and mom in
    [0, 1). Where both are 0, so is the update. Source: M-SVAG (Balles and Hennig 2018).

    >>> m, v = torch.tensor([0.75]), torch.tensor([2.25])  # without bias 1 and 3
    >>> scale_by_signal(m, v, step=torch.tensor(2), mom=0.5)  # rho is 5 / 9, noise is 2.5
    {'update': tensor([0.2857])}
    """
    power = mom**step
    update, sqr_avg = update / (1 - power), sqr_avg / (1 - power)
    # At the first step rho is 1, and 1 - rho would be a divisor of 0. The bound is that of
    # pytorch_optimizer.
    rho = ((1 - mom) * (1 + power) / ((1 + mom) * (1 - power))).clamp(max=0.9999)
    square = update.square()
    # Rounding can make the mean of squares smaller than the square of the mean.
    whole = square + (sqr_avg - square).clamp(min=0) * (rho / (1 - rho))
    # As a share: in float32 the cube of 1e-16 is 0, its square is not. Where both are 0, 0 / 0 must
    # not be computed at all: chosen or not, its derivative is NaN.
    still = whole == 0
    share = torch.where(still, 0.0, square / torch.where(still, 1.0, whole))
    return dict(update=share * update)
