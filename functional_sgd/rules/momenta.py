"""Rules of momentum that is neither Polyak's nor Adam's."""

import torch
from torch import Tensor

from functional_sgd.ranges import Decay, Fraction, NonNegative, Positive, Share
from functional_sgd.reduction import mean
from functional_sgd.rule import elementwise

__all__ = ["accelerated_step", "average_by_turns", "average_with_inertia"]


@elementwise(average=torch.zeros_like, last_average=torch.zeros_like)
def average_by_turns(
    grad: Tensor,
    average: Tensor,
    last_average: Tensor,
    *,
    mom: Decay = 0.9,
    contrast: NonNegative = 1.0,
) -> dict[str, Tensor]:
    """Keep an average of every other gradient, and one of those between, and move along the
    difference: noise grows, and the direction stays.

    new = mom**2 * last_average + (1 - mom**2) * grad;  last_average = average;  average = new
    update = ((1 + contrast) * average - contrast * last_average)
    / sqrt((1 + contrast)**2 + contrast**2)

    Reads grad, mom in [0, 1) and contrast >= 0. Keeps average and last_average, which start at 0.
    Source: positive-negative momentum (Xie et al. 2021).

    >>> one, zero = torch.tensor([1.0]), torch.tensor([0.0])  # new = 0.75
    >>> average_by_turns(one, one, zero, mom=0.5, contrast=0.0)
    {'update': tensor([0.7500]), 'average': tensor([0.7500]), 'last_average': tensor([1.])}
    """
    new = mom * mom * last_average + (1 - mom * mom) * grad
    length = ((1 + contrast) * (1 + contrast) + contrast * contrast) ** 0.5
    update = ((1 + contrast) * new - contrast * average) / length
    return dict(update=update, average=new, last_average=average)


@elementwise(grad_avg=torch.zeros_like, mom_product=torch.ones_like, positive=("mom_product",))
def average_with_inertia(
    grad: Tensor,
    sqr_avg: Tensor,
    grad_avg: Tensor,
    mom_product: Tensor,
    *,
    mean_sqr: Tensor = mean(lambda sqr_avg: sqr_avg, over="tree"),
    looseness: NonNegative = 0.1,
    eps: Share = 1e-3,
) -> dict[str, Tensor]:
    """Average the gradient of each element the longer, the less steep its direction has been;
    undo the pull of the average towards zero.

    mom = 1 - looseness * sqr_avg / mean_sqr, cut to [0, 1 - eps];  mom_product = mom_product * mom
    grad_avg = mom * grad_avg + (1 - mom) * grad;  update = grad_avg / (1 - mom_product), 0 where
    both are 0

    mean_sqr is the mean of sqr_avg over all leaves. Reads grad, sqr_avg (debiased), looseness >= 0
    and eps in [0, 1]. Keeps grad_avg, which starts at 0, and mom_product, which starts at 1.
    Source: Adai (Xie et al. 2022), where looseness is beta_0.

    >>> grad, sqr, zero = torch.tensor([2.0, 2.0]), torch.tensor([5.0, 15.0]), torch.zeros(2)
    >>> average_with_inertia(grad, sqr, zero, zero + 1, looseness=0.5)["grad_avg"]
    tensor([0.5000, 1.5000])
    """
    # While all gradients are 0, no direction is steep.
    steepness = sqr_avg / torch.where(mean_sqr == 0, 1.0, mean_sqr)
    mom = (1 - looseness * steepness).clamp(min=0.0).clamp(max=1 - eps)
    mom_product = mom_product * mom
    grad_avg = mom * grad_avg + (1 - mom) * grad
    # 0 where mom has always been 1, as it is without a gradient if 1 - eps rounds to 1.
    counted = 1 - mom_product
    update = grad_avg / torch.where(counted == 0, 1.0, counted)
    return dict(update=update, grad_avg=grad_avg, mom_product=mom_product)


@elementwise(far_param=torch.clone)
def accelerated_step(
    param: Tensor,
    grad: Tensor,
    far_param: Tensor,
    *,
    lr: NonNegative,
    stretch: Positive = 1000.0,
    advantage: NonNegative = 10.0,
    caution: Fraction = 0.7,
) -> dict[str, Tensor]:
    """Take a short step, and pull it towards where long steps are going on average.

    share = advantage * caution**2 / stretch;  far = param - stretch / caution * lr * grad
    far_param = (1 - share) * far_param + share * far
    param = (caution * (param - lr * grad) + share * far_param) / (caution + share)

    Reads param, grad, lr, stretch > 0 (how much longer long steps are: kappa), advantage (xi, at
    most sqrt(stretch)) and caution in (0, 1). Keeps far_param, which starts as the parameter.
    Source: accelerated SGD (Jain et al. 2018; Kidambi et al. 2018).

    >>> one = torch.tensor([1.0])
    >>> accelerated_step(one, one, one, lr=0.5, stretch=1.0, advantage=2.0, caution=0.5)
    {'param': tensor([0.5000]), 'far_param': tensor([0.5000])}
    """
    share = advantage * caution * caution / stretch
    far = param - stretch / caution * lr * grad
    far_param = (1 - share) * far_param + share * far
    moved = (caution * (param - lr * grad) + share * far_param) / (caution + share)
    return dict(param=moved, far_param=far_param)
