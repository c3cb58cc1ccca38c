"""Rules of Adam's kin: other averages than Adam's, and other ways to divide by them."""

import torch
from torch import Tensor

from functional_sgd.ranges import Decay, NonNegative, Positive
from functional_sgd.reduction import root
from functional_sgd.rule import elementwise
from functional_sgd.rules.averaging import average_sqr_grad, averaged_from_first

__all__ = [
    "add_average_difference",
    "add_weighted",
    "average_difference",
    "average_sqr_error",
    "average_sqr_grad_additive",
    "average_sqr_grad_from_first",
    "average_sqr_grad_from_one",
    "bound_rate",
    "clip_growing",
    "debias_ahead",
    "normalize_by_past_rms",
    "scale_by_past_rms",
]


@elementwise(sqr_avg=torch.zeros_like, positive=("sqr_avg",))
def average_sqr_error(
    grad: Tensor,
    grad_avg: Tensor,
    sqr_avg: Tensor,
    *,
    sqr_mom: Decay = 0.99,
    eps_root: NonNegative = 1e-16,
) -> dict[str, Tensor]:
    """Keep the running mean of how far, squared, the gradient was from its average: where that is
    small, the average can be believed.

    sqr_avg = sqr_mom * sqr_avg + (1 - sqr_mom) * (grad - grad_avg)**2 + eps_root

    Reads grad, grad_avg (of average_grad, this gradient included), sqr_mom in [0, 1) and
    eps_root >= 0, which is added at every step and kept. Keeps sqr_avg, which starts at 0.
    Source: AdaBelief (Zhuang et al. 2020), as its authors' code.

    >>> one, three = torch.tensor([1.0]), torch.tensor([3.0])
    >>> average_sqr_error(three, one, torch.tensor([0.0]), sqr_mom=0.5)
    {'sqr_avg': tensor([2.])}
    """
    error = grad - grad_avg
    return dict(sqr_avg=sqr_mom * sqr_avg + (1 - sqr_mom) * error.square() + eps_root)


def small(param: Tensor) -> Tensor:
    """What Yogi's mean square starts with: 1e-6."""
    return torch.full_like(param, 1e-6)


@elementwise(sqr_avg=small, positive=("sqr_avg",))
def average_sqr_grad_additive(
    grad: Tensor, sqr_avg: Tensor, *, sqr_mom: Decay = 0.99
) -> dict[str, Tensor]:
    """Move an estimate of the squared gradient towards it by a step that does not depend on how far
    off it is, so that it does not fall as fast as a mean does.

    sqr_avg = sqr_avg - (1 - sqr_mom) * sign(sqr_avg - grad**2) * grad**2

    Reads grad and sqr_mom in [0, 1). Keeps sqr_avg, which starts at 1e-6. Source: Yogi (Zaheer et
    al. 2018).

    >>> average_sqr_grad_additive(torch.tensor([2.0]), torch.tensor([9.0]), sqr_mom=0.5)
    {'sqr_avg': tensor([7.])}
    """
    square = grad.square()
    return dict(sqr_avg=sqr_avg - (1 - sqr_mom) * (sqr_avg - square).sign() * square)


@elementwise(sqr_avg=torch.zeros_like, positive=("sqr_avg",))
def average_sqr_grad_from_first(
    grad: Tensor, sqr_avg: Tensor, *, step: Tensor, sqr_mom: Decay = 0.99
) -> dict[str, Tensor]:
    """Keep the running mean of the squared gradient, which starts with the first one, so it has no
    bias towards 0.

    sqr_avg = grad**2 at step 1, then sqr_mom * sqr_avg + (1 - sqr_mom) * grad**2

    Reads grad, step and sqr_mom in [0, 1). Keeps sqr_avg. Source: ADOPT (Taniguchi et al. 2024).

    >>> average_sqr_grad_from_first(torch.tensor([2.0]), torch.tensor([0.0]), step=torch.tensor(1))
    {'sqr_avg': tensor([4.])}
    """
    return dict(sqr_avg=averaged_from_first(sqr_avg, grad.square(), sqr_mom, step))


@elementwise(sqr_avg=torch.ones_like, positive=("sqr_avg",))
def average_sqr_grad_from_one(
    grad: Tensor, sqr_avg: Tensor, *, sqr_mom: Decay = 0.9
) -> dict[str, Tensor]:
    """average_sqr_grad with a mean that starts at 1, so that the first steps are not longer than
    the gradient.

    Reads grad and sqr_mom in [0, 1); keeps sqr_avg. Source: RMSProp as TensorFlow 1 has it.

    >>> average_sqr_grad_from_one(torch.tensor([2.0]), torch.tensor([1.0]), sqr_mom=0.5)
    {'sqr_avg': tensor([2.5000])}
    """
    return dict(average_sqr_grad.function(grad, sqr_avg, sqr_mom=sqr_mom))


@elementwise(before=("sqr_avg",))
def normalize_by_past_rms(
    grad: Tensor, sqr_avg: Tensor, *, step: Tensor, eps: NonNegative = 1e-6
) -> dict[str, Tensor]:
    """Divide the gradient by the root of a mean that does not know it yet; do nothing in the first
    step, which has none.

    update = 0 at step 1, then grad / max(sqrt(sqr_avg), eps)

    Reads grad, sqr_avg as the step before left it (so it stands in front of the rule that keeps
    it), step, eps >= 0 (at 0, 0 / 0 is NaN). Source: ADOPT (Taniguchi et al. 2024).

    >>> two, four = torch.tensor([2.0]), torch.tensor([4.0])
    >>> normalize_by_past_rms(two, four, step=torch.tensor(2), eps=0.5)
    {'update': tensor([1.])}
    """
    return dict(update=torch.where(step <= 1, 0.0, grad / root(sqr_avg).clamp(min=eps)))


@elementwise
def clip_growing(
    update: Tensor, *, step: Tensor, clip_power: NonNegative = 0.25
) -> dict[str, Tensor]:
    """Cut every element of the update to a range that grows with the steps.

    update = clamp(update, -c, c);  c = (step - 1)**clip_power

    Reads update, step and clip_power >= 0; the first step has c = 0. Source: ADOPT (Taniguchi et
    al. 2024), its clipped form.

    >>> clip_growing(torch.tensor([3.0, -1.0]), step=torch.tensor(17))
    {'update': tensor([ 2., -1.])}
    """
    most = (step - 1) ** clip_power
    return dict(update=update.clamp(-most, most))


@elementwise(before=("sqr_avg",))
def scale_by_past_rms(
    grad: Tensor,
    sqr_avg: Tensor,
    *,
    step: Tensor,
    sqr_mom: Decay = 0.99,
    eps: NonNegative = 1e-8,
) -> dict[str, Tensor]:
    """Divide the gradient by the debiased root of a mean that does not know it yet; the first one
    stays as it is.

    update = grad at step 1, then grad / (sqrt(sqr_avg / (1 - sqr_mom**(step - 1))) + eps)

    Reads grad, sqr_avg as the step before left it (so it stands in front of the rule that keeps
    it), step, sqr_mom in [0, 1), eps >= 0 (at 0, 0 / 0 is NaN). Source: ACProp (Zhuang et al.
    2021).

    >>> one, two = torch.tensor([1.0]), torch.tensor([2.0])
    >>> scale_by_past_rms(one, two, step=torch.tensor(2), sqr_mom=0.5, eps=0.0)
    {'update': tensor([0.5000])}
    """
    # 1 - sqr_mom**0 is 0: what is divided by it is not chosen, but would have NaN as its
    # derivative.
    weight = torch.where(step <= 1, 1.0, 1 - sqr_mom ** (step - 1))
    scaled = grad / (root(sqr_avg / weight) + eps)
    return dict(update=torch.where(step <= 1, grad, scaled))


@elementwise(last_grad=torch.zeros_like, diff_avg=torch.zeros_like)
def average_difference(
    grad: Tensor,
    last_grad: Tensor,
    diff_avg: Tensor,
    *,
    step: Tensor,
    diff_mom: Decay = 0.92,
) -> dict[str, Tensor]:
    """Keep the running mean of how the gradient changes, and say where it is going.

    diff = grad - last_grad, 0 at step 1;  diff_avg = diff_mom * diff_avg + (1 - diff_mom) * diff
    ahead = grad + diff_mom * diff

    Reads grad, step and diff_mom in [0, 1). Keeps last_grad and diff_avg, which start at 0.
    Source: Adan (Xie et al. 2022), whose beta_2 is 1 - diff_mom.

    >>> one, two, four = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([4.0])
    >>> average_difference(four, two, one, step=torch.tensor(2), diff_mom=0.5)
    {'last_grad': tensor([4.]), 'diff_avg': tensor([1.5000]), 'ahead': tensor([5.])}
    """
    diff = torch.where(step <= 1, 0.0, grad - last_grad)
    diff_avg = diff_mom * diff_avg + (1 - diff_mom) * diff
    return dict(last_grad=grad, diff_avg=diff_avg, ahead=grad + diff_mom * diff)


@elementwise
def add_average_difference(
    update: Tensor, diff_avg: Tensor, *, step: Tensor, diff_mom: Decay = 0.92
) -> dict[str, Tensor]:
    """Add to the update where the gradient is going, without bias.

    update = update + diff_mom * diff_avg / (1 - diff_mom**step)

    Reads update, diff_avg (of average_difference), step and diff_mom in [0, 1). Source: Adan (Xie
    et al. 2022).

    >>> one, two = torch.tensor([1.0]), torch.tensor([2.0])
    >>> add_average_difference(one, two, step=torch.tensor(1), diff_mom=0.5)
    {'update': tensor([3.])}
    """
    return dict(update=update + diff_mom * (diff_avg / (1 - diff_mom**step)))


@elementwise
def add_weighted(update: Tensor, other: Tensor, *, alpha: NonNegative = 1.0) -> dict[str, Tensor]:
    """Add a multiple of another column to the update.

    update = update + alpha * other

    Reads update, other (rename it: `rename(add_weighted, other="slow_avg")`) and alpha >= 0.
    Source: AdEMAMix (Pagliardini et al. 2024), which adds a slow average.

    >>> add_weighted(torch.tensor([1.0]), torch.tensor([2.0]), alpha=3.0)
    {'update': tensor([7.])}
    """
    return dict(update=update + alpha * other)


@elementwise
def debias_ahead(
    grad: Tensor, grad_avg: Tensor, *, step: Tensor, mom: Decay = 0.9
) -> dict[str, Tensor]:
    """Look one step of the average ahead, without bias: average and gradient as the next step would
    weigh them.

    update = mom * grad_avg / (1 - mom**(step + 1)) + (1 - mom) * grad / (1 - mom**step)

    Reads grad, grad_avg (of average_grad, not debiased), step and mom in [0, 1). Source: Dozat
    2016, in the form of optax.nadam; torch.optim.NAdam has a mom that grows.

    >>> three = torch.tensor([3.0])
    >>> debias_ahead(torch.tensor([1.0]), three, step=torch.tensor(1), mom=0.5)
    {'update': tensor([3.])}
    """
    average = grad_avg / (1 - mom ** (step + 1))
    return dict(update=mom * average + (1 - mom) * (grad / (1 - mom**step)))


@elementwise
def bound_rate(
    update: Tensor,
    sqr_avg: Tensor,
    *,
    step: Tensor,
    mom: Decay = 0.9,
    sqr_mom: Decay = 0.99,
    eps: NonNegative = 1e-8,
    final_scale: NonNegative = 100.0,
    gamma: Positive = 1e-3,
) -> dict[str, Tensor]:
    """Scale the average as Adam does, but within bounds that close in on one speed for all.

    scale = sqrt(1 - sqr_mom**step) / (1 - mom**step) / (sqrt(sqr_avg) + eps), at least
    final_scale * (1 - 1 / (gamma * step + 1)), at most final_scale * (1 + 1 / (gamma * step))

    update = scale * update

    Reads update and sqr_avg (both averages not debiased), step, mom and sqr_mom in [0, 1), eps and
    final_scale >= 0, gamma > 0. Source: AdaBound (Luo et al. 2019).

    >>> one = torch.tensor([1.0])
    >>> bound_rate(one, 0 * one, step=torch.tensor(1), final_scale=2.0, gamma=1.0)  # from above
    {'update': tensor([4.])}
    """
    low = final_scale * (1 - 1 / (gamma * step + 1))
    high = final_scale * (1 + 1 / (gamma * step))
    return dict(update=adam_scale(sqr_avg, step, mom, sqr_mom, eps).clamp(low, high) * update)


def adam_scale(
    sqr_avg: Tensor, step: Tensor, mom: float, sqr_mom: float, eps: float, lr: float = 1.0
) -> Tensor:
    """What Adam multiplies its average of the gradient with, both averages not debiased."""
    # Numbers are brought together first: kernels compute with them once a step, not for each
    # element.
    weights = lr * (1 - sqr_mom**step).sqrt() / (1 - mom**step)
    return weights / (root(sqr_avg) + eps)
