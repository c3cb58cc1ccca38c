"""Rules of schedule-free learning: steps and their average at once, and no rate that falls."""

import torch
from torch import Tensor

from functional_sgd.ranges import Decay, NonNegative
from functional_sgd.rule import elementwise
from functional_sgd.rules.scaling import rectification

__all__ = ["rectify_lr", "step_from_fast", "train_between", "weigh_steps"]


@elementwise(lr_max=0.0, weight_sum=0.0, share=0.0)
def weigh_steps(
    *,
    lr: NonNegative,
    lr_max: Tensor,
    weight_sum: Tensor,
    share: Tensor,
    lr_power: NonNegative = 2.0,
) -> dict[str, Tensor]:
    """The share that this step has in an average of steps, weighed by the largest lr so far.

    lr_max = max(lr_max, lr);  weight = lr_max**lr_power
    weight_sum = weight_sum + weight;  share = weight / weight_sum

    All three are numbers of the whole tree, so lr must be one number.

    >>> zero = torch.tensor(0.0)
    >>> weigh_steps(lr=0.5, lr_max=zero, weight_sum=torch.tensor(0.75), share=zero)
    {'lr_max': tensor(0.5000), 'weight_sum': tensor(1.), 'share': tensor(0.2500)}
    """
    lr_max = torch.where(lr_max > lr, lr_max, lr)
    weight = lr_max**lr_power
    weight_sum = weight_sum + weight
    # A warm-up that begins at lr = 0 has no weight yet, and no share.
    share = weight / torch.where(weight_sum == 0, 1.0, weight_sum)
    return dict(lr_max=lr_max, weight_sum=weight_sum, share=share)


@elementwise(before=("fast",))
def step_from_fast(
    param: Tensor, fast: Tensor, *, lr: NonNegative, wd: NonNegative = 0.0
) -> dict[str, Tensor]:
    """Let the rules after this one move the fast weights, decayed by the params.

    param = fast - lr * wd * param

    Reads fast as train_between left it in the step before, param (where the gradient was taken),
    lr and wd >= 0.

    >>> step_from_fast(torch.tensor([2.0]), torch.tensor([1.0]), lr=0.5, wd=0.5)
    {'param': tensor([0.5000])}
    """
    return dict(param=fast - lr * wd * param)


@elementwise(evaluate="average", fast=torch.clone, average=torch.clone)
def train_between(
    param: Tensor, fast: Tensor, average: Tensor, *, share: Tensor, mom: Decay = 0.9
) -> dict[str, Tensor]:
    """Average the fast weights, and go on from a point between them and their average.

    fast = param;  average = (1 - share) * average + share * fast
    param = mom * average + (1 - mom) * fast

    Reads param, share (of weigh_steps) and mom in [0, 1); keeps fast and average, which start as
    the parameter. The average is what is to be evaluated.

    >>> one, two, four = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([4.0])
    >>> train_between(two, one, four, share=torch.tensor(0.5), mom=0.5)
    {'fast': tensor([2.]), 'average': tensor([3.]), 'param': tensor([2.5000])}
    """
    average = (1 - share) * average + share * param
    return dict(fast=param, average=average, param=mom * average + (1 - mom) * param)


@elementwise(rate=0.0)
def rectify_lr(
    *, lr: NonNegative, rate: Tensor, step: Tensor, sqr_mom: Decay = 0.99
) -> dict[str, Tensor]:
    """The lr that RAdam moves with: 0 as long as it does not trust its mean square.

    rate = nu * lr where r > 4, else 0;  r and nu as in `rectification`

    A number of the whole tree, so lr must be one number.

    >>> early = torch.tensor(4.0, dtype=torch.float64)
    >>> rectify_lr(lr=0.5, rate=torch.tensor(0.0), step=early, sqr_mom=0.999)
    {'rate': tensor(0., dtype=torch.float64)}
    """
    trusted, nu = rectification(step, sqr_mom, threshold=4.0)
    return dict(rate=torch.where(trusted, nu * lr, 0.0))
