"""Rules that correct the gradient before it is averaged, or the update that came of it."""

import torch
from torch import Tensor

from functional_sgd.pairs import as_complex, as_real
from functional_sgd.ranges import Decay, NonNegative, Share
from functional_sgd.reduction import mean, root
from functional_sgd.rule import elementwise, leafwise
from functional_sgd.rules.averaging import averaged_from_first

__all__ = [
    "cautious",
    "follow_sign",
    "grokfast",
    "limit_by_rms",
    "project_radial",
    "reduce_variance",
    "sqr_ratio",
]


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
    # Not spared at the first step, where last_grad is 0: neither is it in the authors' code.
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
    slow_grad = averaged_from_first(slow_grad, grad, slow_mom, step)
    return dict(grad=grad + amplify * slow_grad, slow_grad=slow_grad)


def _agree(update: Tensor, grad: Tensor) -> Tensor:
    """Where the signs of both are the same and not 0; the product of small ones would be 0."""
    return ((update > 0) & (grad > 0)) | ((update < 0) & (grad < 0))


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
def follow_sign(grad: Tensor, update: Tensor) -> dict[str, Tensor]:
    """Take from the update only how far to go, and the direction from this gradient.

    update = |update| * sign(grad)

    Reads grad and update. Put it right in front of the step. Source: Grams (Cao et al. 2024).

    >>> follow_sign(torch.tensor([1.0, -1.0, 0.0]), torch.tensor([3.0, 3.0, 3.0]))
    {'update': tensor([ 3., -3.,  0.])}
    """
    return dict(update=update.abs() * grad.sign())


@elementwise
def sqr_ratio(grad: Tensor, sqr_avg: Tensor, *, eps: NonNegative = 1e-8) -> dict[str, Tensor]:
    """How much larger than its mean the squared gradient is: far above 1, the mean is out of date.

    ratio = grad**2 / max(sqr_avg, eps**2)

    Reads grad, sqr_avg (debiased) and eps >= 0 (at 0, 0 / 0 is NaN). Source: StableAdamW (Wortsman
    et al. 2023).

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

    Reads param, grad, update, lr, wd >= 0, wd_ratio in [0, 1], delta >= 0, eps >= 0 (at 0, 0 / 0 is
    NaN). Vectors and scalars are only decayed. Source: AdamP (Heo et al. 2021).

    >>> param, grad = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])  # orthogonal
    >>> made = project_radial(param, grad, torch.tensor([[3.0, 1.0]]), lr=0.5, wd=1.0)
    >>> made["update"], made["param"]
    (tensor([[0., 1.]]), tensor([[1.9000, 0.0000]]))
    """
    if param.dim() < 2 or param.numel() == 0:
        return dict(update=update, param=(1 - lr * wd) * param)
    # Both projections are computed, and then one is chosen: to look first would make the host wait
    # for a GPU, and cannot be done under torch.vmap.
    columns = (as_real(param), as_real(grad), as_real(update))
    by_unit, tangent_by_unit = _tangent(*columns, param.shape[0], delta, eps)
    whole, tangent = _tangent(*columns, 1, delta, eps)
    chosen = torch.where(by_unit, tangent_by_unit, torch.where(whole, tangent, columns[2]))
    less, full = ((1 - lr * wd * ratio) * columns[0] for ratio in (wd_ratio, 1.0))
    decayed = torch.where(by_unit | whole, less, full)
    return dict(update=as_complex(chosen, update), param=as_complex(decayed, param))


def _tangent(
    param: Tensor, grad: Tensor, update: Tensor, rows: int, delta: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Whether the gradient is orthogonal to each of so many rows, and the update if it is."""
    weight, slope, move = (one.reshape(rows, -1) for one in (param, grad, update))
    size, steepness = (root(one.square().sum(1, keepdim=True)) for one in (weight, slope))
    dot = (weight * slope).sum(1, keepdim=True)
    # eps bounds the lengths here and is added to them below: so it is in the authors' code.
    cosine = dot / (size.clamp(min=eps) * steepness.clamp(min=eps))
    unit = weight / (size + eps)
    tangent = move - unit * (unit * move).sum(1, keepdim=True)
    orthogonal = cosine.abs().amax() < delta / weight.shape[1] ** 0.5
    return orthogonal, tangent.reshape(update.shape)
