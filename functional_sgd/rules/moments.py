"""Rules of Adam's kin: other averages, other ways to divide by them, and what to do with the update
where gradient and averages disagree.
"""

import torch
from torch import Tensor

from functional_sgd.ranges import Decay, NonNegative, Positive, Share
from functional_sgd.reduction import mean, root
from functional_sgd.rule import elementwise, leafwise

__all__ = [
    "add_average_difference",
    "add_weighted",
    "average_difference",
    "average_sqr_error",
    "average_sqr_grad_additive",
    "average_sqr_grad_from_first",
    "bound_rate",
    "cautious",
    "clip_growing",
    "grokfast",
    "limit_by_rms",
    "nesterov_average",
    "normalize_by_past_rms",
    "project_radial",
    "reduce_variance",
    "scale_by_past_rms",
    "sqr_ratio",
]


@elementwise(sqr_avg=torch.zeros_like)
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


@elementwise(sqr_avg=small)
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


@elementwise(sqr_avg=torch.zeros_like)
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
    return dict(sqr_avg=_averaged_from_first(sqr_avg, grad.square(), sqr_mom, step))


@elementwise(before=("sqr_avg",))
def normalize_by_past_rms(
    grad: Tensor, sqr_avg: Tensor, *, step: Tensor, eps: NonNegative = 1e-6
) -> dict[str, Tensor]:
    """Divide the gradient by the root of a mean that does not know it yet; do nothing in the first
    step, which has none.

    update = 0 at step 1, then grad / max(sqrt(sqr_avg), eps)

    Reads grad, sqr_avg as the step before left it (so it stands in front of the rule that keeps
    it), step, eps > 0. Source: ADOPT (Taniguchi et al. 2024).

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
    it), step, sqr_mom in [0, 1), eps > 0. Source: ACProp (Zhuang et al. 2021).

    >>> one, two = torch.tensor([1.0]), torch.tensor([2.0])
    >>> scale_by_past_rms(one, two, step=torch.tensor(2), sqr_mom=0.5, eps=0.0)
    {'update': tensor([0.5000])}
    """
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
def nesterov_average(
    grad: Tensor, grad_avg: Tensor, *, step: Tensor, mom: Decay = 0.9
) -> dict[str, Tensor]:
    """Look one step of the average ahead, without bias: average and gradient as the next step would
    weigh them.

    update = mom * grad_avg / (1 - mom**(step + 1)) + (1 - mom) * grad / (1 - mom**step)

    Reads grad, grad_avg (of average_grad, not debiased), step and mom in [0, 1). Source: Dozat
    2016, in the form of optax.nadam; torch.optim.NAdam has a mom that grows.

    >>> three = torch.tensor([3.0])
    >>> nesterov_average(torch.tensor([1.0]), three, step=torch.tensor(1), mom=0.5)
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

    Reads update and sqr_avg (both averages not debiased), step, mom and sqr_mom in [0, 1), eps > 0,
    final_scale >= 0, gamma > 0. Source: AdaBound (Luo et al. 2019).

    >>> one = torch.tensor([1.0])
    >>> bound_rate(one, 0 * one, step=torch.tensor(1), final_scale=2.0, gamma=1.0)  # from above
    {'update': tensor([4.])}
    """
    weights = (1 - sqr_mom**step) ** 0.5 / (1 - mom**step)
    low = final_scale * (1 - 1 / (gamma * step + 1))
    high = final_scale * (1 + 1 / (gamma * step))
    return dict(update=(weights / (root(sqr_avg) + eps)).clamp(low, high) * update)


@elementwise(last_grad=torch.zeros_like)
def reduce_variance(
    grad: Tensor, last_grad: Tensor, *, mom: Decay = 0.9, gamma: NonNegative = 0.025
) -> dict[str, Tensor]:
    """Correct the gradient by how it has changed, for the averages after it.

    grad = grad + gamma * mom / (1 - mom) * (grad - last_grad)

    Reads grad, mom in [0, 1) (of the average after it) and gamma >= 0. Keeps last_grad, the
    gradient as it came, which starts at 0. Source: MARS (Yuan et al. 2024), the form with one
    gradient a step.

    >>> one, three = torch.tensor([1.0]), torch.tensor([3.0])
    >>> reduce_variance(three, one, mom=0.5, gamma=0.5)
    {'grad': tensor([4.]), 'last_grad': tensor([3.])}
    """
    corrected = grad + gamma * (mom / (1 - mom)) * (grad - last_grad)
    return dict(grad=corrected, last_grad=grad)


@elementwise(slow_grad=torch.zeros_like)
def grokfast(
    grad: Tensor,
    slow_grad: Tensor,
    *,
    step: Tensor,
    slow_mom: Decay = 0.98,
    amplify: NonNegative = 2.0,
) -> dict[str, Tensor]:
    """Amplify the part of the gradient that changes slowly, for the rules after it.

    slow_grad = grad at step 1, then slow_mom * slow_grad + (1 - slow_mom) * grad
    grad = grad + amplify * slow_grad

    Reads grad, step, slow_mom in [0, 1) and amplify >= 0. Keeps slow_grad. Put it first: it makes
    gradients up to 1 + amplify times as long. Source: Grokfast-EMA (Lee et al. 2024).

    >>> one, three = torch.tensor([1.0]), torch.tensor([3.0])
    >>> grokfast(one, three, step=torch.tensor(2), slow_mom=0.5)
    {'grad': tensor([5.]), 'slow_grad': tensor([2.])}
    """
    slow_grad = _averaged_from_first(slow_grad, grad, slow_mom, step)
    return dict(grad=grad + amplify * slow_grad, slow_grad=slow_grad)


def _agree(update: Tensor, grad: Tensor) -> Tensor:
    """Where the signs of both are the same and not 0; the product of small ones would be 0."""
    return update.sign() * grad.sign() > 0


@elementwise
def cautious(grad: Tensor, update: Tensor, *, share: Tensor = mean(_agree)) -> dict[str, Tensor]:
    """Take no step where the update goes against this gradient, and longer ones elsewhere.

    update = mask * update / max(mean of mask, 1e-3);  mask = 1 where update * grad > 0, else 0

    The mean is that of the leaf. Reads grad and update. Put it right in front of the step, after
    whatever makes the update: `chain(average_grad, cautious, sgd_step)`. Source: C-AdamW (Liang et
    al. 2024), as its authors' code; its paper divides by (count + 1) / size instead.

    >>> cautious(torch.tensor([1.0, -1.0]), torch.tensor([3.0, 3.0]))
    {'update': tensor([6., 0.])}
    """
    return dict(update=torch.where(_agree(update, grad), update / share.clamp(min=1e-3), 0.0))


@elementwise
def sqr_ratio(grad: Tensor, sqr_avg: Tensor, *, eps: NonNegative = 1e-8) -> dict[str, Tensor]:
    """How much larger than its mean the squared gradient is: far above 1, the mean is out of date.

    ratio = grad**2 / max(sqr_avg, eps**2)

    Reads grad, sqr_avg (debiased) and eps > 0. Source: StableAdamW (Wortsman et al. 2023).

    >>> sqr_ratio(torch.tensor([4.0]), torch.tensor([8.0]))
    {'ratio': tensor([2.])}
    """
    return dict(ratio=grad.square() / sqr_avg.clamp(min=eps**2))


@elementwise
def limit_by_rms(
    update: Tensor, ratio: Tensor, *, mean_ratio: Tensor = mean(lambda ratio: ratio)
) -> dict[str, Tensor]:
    """Slow a leaf down while its gradients are larger than what they are divided by.

    update = update / max(1, sqrt(mean of ratio))

    The mean is that of the leaf. Reads update and ratio (of sqr_ratio). Source: StableAdamW
    (Wortsman et al. 2023), the update clipping of Adafactor (Shazeer and Stern 2018).

    >>> limit_by_rms(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0]))
    {'update': tensor([0.5000, 1.0000])}
    """
    return dict(update=update / root(mean_ratio).clamp(min=1.0))


@leafwise
def project_radial(
    param: Tensor,
    grad: Tensor,
    update: Tensor,
    *,
    lr: NonNegative,
    wd: NonNegative = 0.0,
    wd_ratio: Share = 0.1,
    delta: NonNegative = 0.1,
    eps: NonNegative = 1e-8,
) -> dict[str, Tensor]:
    """Where a weight's length has no effect on the loss, do not let the update change it, and decay
    it less.

    A matrix (or more axes) has no such effect if the gradient is orthogonal to it: |cosine| <
    delta / sqrt(size) for every output unit, or else for the whole leaf. Then, for each unit (or
    the leaf): update = update - unit * (unit . update);  unit = param / (|param| + eps)

    param = (1 - lr * wd * (wd_ratio if projected, else 1)) * param

    Reads param, grad, update, lr, wd >= 0, wd_ratio in [0, 1], delta >= 0, eps > 0. Vectors and
    scalars are only decayed. Source: AdamP (Heo et al. 2021).

    >>> param, grad = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])  # orthogonal
    >>> made = project_radial(param, grad, torch.tensor([[3.0, 1.0]]), lr=0.5, wd=1.0)
    >>> made["update"], made["param"]
    (tensor([[0., 1.]]), tensor([[1.9000, 0.0000]]))
    """
    if param.dim() < 2 or param.numel() == 0:
        return dict(update=update, param=(1 - lr * wd) * param)
    columns = (_real(param), _real(grad), _real(update))
    by_unit, tangent_by_unit = _tangent(*columns, param.shape[0], delta, eps)
    whole, tangent = _tangent(*columns, 1, delta, eps)
    chosen = torch.where(by_unit, tangent_by_unit, torch.where(whole, tangent, columns[2]))
    less, full = ((1 - lr * wd * ratio) * columns[0] for ratio in (wd_ratio, 1.0))
    decayed = torch.where(by_unit | whole, less, full)
    return dict(update=_like(chosen, update), param=_like(decayed, param))


def _tangent(
    param: Tensor, grad: Tensor, update: Tensor, rows: int, delta: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Whether the gradient is orthogonal to each of so many rows, and the update if it is."""
    weight, slope, move = (one.reshape(rows, -1) for one in (param, grad, update))
    size, steepness = (root(one.square().sum(1, keepdim=True)) for one in (weight, slope))
    dot = (weight * slope).sum(1, keepdim=True)
    cosine = dot / (size.clamp(min=eps) * steepness.clamp(min=eps))
    unit = weight / (size + eps)
    tangent = move - unit * (unit * move).sum(1, keepdim=True)
    orthogonal = cosine.abs().amax() < delta / weight.shape[1] ** 0.5
    return orthogonal, tangent.reshape(update.shape)


def _real(one: Tensor) -> Tensor:
    return torch.view_as_real(one) if one.is_complex() else one


def _like(one: Tensor, like: Tensor) -> Tensor:
    return torch.view_as_complex(one) if like.is_complex() else one


def _averaged_from_first(average: Tensor, new: Tensor, mom: float, step: Tensor) -> Tensor:
    return torch.where(step <= 1, new, mom * average + (1 - mom) * new)
