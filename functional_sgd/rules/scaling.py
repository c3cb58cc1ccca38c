"""Rules that divide the update by how steep each direction has been."""

import torch
from torch import Tensor

from functional_sgd.ranges import Decay, NonNegative, Positive
from functional_sgd.reduction import root
from functional_sgd.rule import elementwise

__all__ = [
    "center",
    "rectify",
    "rectify_eps_early",
    "rectify_softplus",
    "scale_by_debiased_rms",
    "scale_by_past_updates",
    "scale_by_rms",
    "scale_by_rms_eps_early",
    "scale_by_rms_eps_inside",
    "take_sign",
]


@elementwise
def scale_by_rms(update: Tensor, sqr_avg: Tensor, *, eps: NonNegative = 1e-8) -> dict[str, Tensor]:
    """Give every direction the same speed: divide by the root of its mean squared gradient.

    update = update / (sqrt(sqr_avg) + eps)

    Reads update, sqr_avg and eps >= 0, which bounds the step: |update| <= |update| / eps. At eps =
    0, an element that has had no gradient becomes NaN: 0 / 0. Source: Hinton, lecture 6e (RMSProp);
    eps outside the root as in torch.optim.

    >>> scale_by_rms(torch.tensor([4.0]), torch.tensor([4.0]), eps=0.0)
    {'update': tensor([2.])}
    """
    return dict(update=update / (root(sqr_avg) + eps))


@elementwise
def scale_by_rms_eps_inside(
    update: Tensor, sqr_avg: Tensor, *, eps: NonNegative = 1e-8
) -> dict[str, Tensor]:
    """scale_by_rms with eps inside the root, as the book and optax write RMSProp.

    update = update / sqrt(sqr_avg + eps)

    Reads update, sqr_avg and eps >= 0 (at 0, 0 / 0 is NaN). Source: fastbook chapter 16.

    >>> scale_by_rms_eps_inside(torch.tensor([4.0]), torch.tensor([3.0]), eps=1.0)
    {'update': tensor([2.])}
    """
    return dict(update=update / root(sqr_avg + eps))


@elementwise
def scale_by_rms_eps_early(
    update: Tensor, sqr_avg: Tensor, *, step: Tensor, sqr_mom: Decay = 0.99, eps: NonNegative = 1e-8
) -> dict[str, Tensor]:
    """scale_by_rms with eps added to the root before the bias is corrected, so that it weighs more
    in early steps.

    update = update / (sqrt(sqr_avg) + eps / sqrt(1 - sqr_mom**step))

    Reads update, the debiased sqr_avg, step, sqr_mom in [0, 1) and eps >= 0 (at 0, 0 / 0 is NaN).
    Source: the faster form in section 2 of Kingma and Ba 2015 (their eps hat);
    torch.optim.SparseAdam.

    >>> step = torch.tensor(1)  # the root of 1 - 0.75 is a half
    >>> scale_by_rms_eps_early(torch.tensor([4.0]), torch.tensor([4.0]), step=step, sqr_mom=0.75,
    ...                        eps=1.0)
    {'update': tensor([1.])}
    """
    return dict(update=update / (root(sqr_avg) + _early(eps, step, sqr_mom)))


@elementwise
def scale_by_debiased_rms(
    update: Tensor,
    sqr_avg: Tensor,
    *,
    step: Tensor,
    sqr_mom: Decay = 0.99,
    eps: NonNegative = 1e-8,
) -> dict[str, Tensor]:
    """scale_by_rms with debias for the squares alone, so that the chain has no `mom`.

    update = update / (sqrt(sqr_avg / (1 - sqr_mom**step)) + eps)

    >>> four, eight = torch.tensor([4.0]), torch.tensor([8.0])
    >>> scale_by_debiased_rms(four, eight, step=torch.tensor(1), sqr_mom=0.5, eps=0.0)
    {'update': tensor([1.])}
    """
    return dict(update=update / (root(sqr_avg / (1 - sqr_mom**step)) + eps))


@elementwise(sqr_update_avg=torch.zeros_like, positive=("sqr_update_avg",))
def scale_by_past_updates(
    update: Tensor, sqr_update_avg: Tensor, *, sqr_mom: Decay = 0.99, eps: NonNegative = 1e-8
) -> dict[str, Tensor]:
    """Move as far as in the past: multiply by the root of the mean squared update.

    update = update * sqrt(sqr_update_avg + eps)
    sqr_update_avg = sqr_mom * sqr_update_avg + (1 - sqr_mom) * update**2

    Reads update, sqr_mom in [0, 1) and eps >= 0; at 0 nothing would begin to move. Keeps
    sqr_update_avg, which starts at 0. Source: Adadelta (Zeiler 2012), its correction of units.

    >>> scale_by_past_updates(torch.tensor([2.0]), torch.tensor([3.0]), sqr_mom=0.5, eps=1.0)
    {'update': tensor([4.]), 'sqr_update_avg': tensor([9.5000])}
    """
    update = update * root(sqr_update_avg + eps)
    average = sqr_mom * sqr_update_avg + (1 - sqr_mom) * update.square()
    return dict(update=update, sqr_update_avg=average)


@elementwise(grad_mean=torch.zeros_like)
def center(
    grad: Tensor, sqr_avg: Tensor, grad_mean: Tensor, *, sqr_mom: Decay = 0.99
) -> dict[str, Tensor]:
    """Replace the mean square by the variance, so that a steady slope is not slowed down.

    grad_mean = sqr_mom * grad_mean + (1 - sqr_mom) * grad;  sqr_avg = max(sqr_avg - grad_mean**2,
    0)

    Reads grad, sqr_avg and sqr_mom in [0, 1); keeps grad_mean; shadows sqr_avg.
    Source: Graves 2013, as torch.optim.RMSprop(centered=True); rounding below 0 is cut off here.

    >>> center(torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([0.0]), sqr_mom=0.5)
    {'grad_mean': tensor([0.5000]), 'sqr_avg': tensor([0.7500])}
    """
    grad_mean = sqr_mom * grad_mean + (1 - sqr_mom) * grad
    return dict(grad_mean=grad_mean, sqr_avg=(sqr_avg - grad_mean.square()).clamp(min=0))


@elementwise
def rectify(
    update: Tensor, sqr_avg: Tensor, *, step: Tensor, sqr_mom: Decay = 0.99, eps: NonNegative = 1e-8
) -> dict[str, Tensor]:
    """scale_by_rms, but only as far as sqr_avg can be trusted: not at all in the first steps.

    update = nu * update / (sqrt(sqr_avg) + eps) where r > 5, else update;  r and nu as in
    `rectification`

    Reads update, the debiased sqr_avg, step, sqr_mom in [0, 1), eps >= 0 (added to the
    debiased root, as fastai does; at 0, 0 / 0 is NaN). Source: RAdam (Liu et al. 2020).

    >>> early = torch.tensor(1)  # too early: unchanged
    >>> rectify(torch.tensor([4.0]), torch.tensor([4.0]), step=early)
    {'update': tensor([4.])}
    """
    return dict(update=_rectified(update, root(sqr_avg) + eps, step, sqr_mom))


@elementwise
def rectify_eps_early(
    update: Tensor, sqr_avg: Tensor, *, step: Tensor, sqr_mom: Decay = 0.99, eps: NonNegative = 1e-8
) -> dict[str, Tensor]:
    """rectify with eps added to the root before the bias is corrected, as torch.optim.RAdam does.

    Reads what `rectify` reads; the two differ by about eps. Source: torch.optim.RAdam.

    >>> rectify_eps_early(torch.tensor([4.0]), torch.tensor([4.0]), step=torch.tensor(1))
    {'update': tensor([4.])}
    """
    divisor = root(sqr_avg) + _early(eps, step, sqr_mom)
    return dict(update=_rectified(update, divisor, step, sqr_mom))


@elementwise
def rectify_softplus(
    update: Tensor,
    sqr_avg: Tensor,
    *,
    step: Tensor,
    sqr_mom: Decay = 0.99,
    eps: NonNegative = 1e-8,
    beta: Positive = 50.0,
) -> dict[str, Tensor]:
    """rectify with a divisor that cannot come near zero: softplus(sqrt(sqr_avg) + eps), of
    sharpness beta > 0.

    softplus(x) = log(1 + exp(beta * x)) / beta, and x itself where beta * x > 20

    Reads what `rectify` reads, and beta. Source: SAdam (Tong et al. 2019), fastai's
    RAdam(beta=...).

    >>> rectify_softplus(torch.tensor([4.0]), torch.tensor([4.0]), step=torch.tensor(1))
    {'update': tensor([4.])}
    """
    divisor = root(sqr_avg) + eps
    # Bounded first: exp of more than 88 is infinite in float32, and its derivative NaN, chosen or
    # not. 20 is where torch's softplus, which fastai calls, goes over to x.
    soft = (beta * divisor).clamp(max=20.0).exp().log1p() / beta
    return dict(
        update=_rectified(update, torch.where(beta * divisor > 20, divisor, soft), step, sqr_mom)
    )


def rectification(
    step: Tensor, sqr_mom: float | Tensor, threshold: float = 5.0
) -> tuple[Tensor, Tensor]:
    """(whether the variance can be trusted, the factor nu) of RAdam.

    r_max = 2 / (1 - sqr_mom) - 1;  r = r_max - 2 * step * sqr_mom**step / (1 - sqr_mom**step)
    nu = sqrt((r - 4) (r - 2) r_max / ((r_max - 4) (r_max - 2) r)), used where r > threshold
    """
    r_max = 2 / (1 - sqr_mom) - 1
    decayed = sqr_mom**step
    r = r_max - 2 * step * decayed / (1 - decayed)
    trusted = r > threshold
    r = torch.where(trusted, r, 6.0)  # keep the root real where it is not used
    return trusted, ((r - 4) * (r - 2) * r_max / ((r_max - 4) * (r_max - 2) * r)).sqrt()


def _early(eps: float, step: Tensor, sqr_mom: float) -> Tensor:
    """What an eps that is added before the bias is corrected becomes by the correction."""
    # A number / a tensor is rounded twice by torch, and once by a kernel; this is twice by both.
    return eps * (1 - sqr_mom**step).sqrt().reciprocal()


def _rectified(update: Tensor, divisor: Tensor, step: Tensor, sqr_mom: float) -> Tensor:
    trusted, nu = rectification(step, sqr_mom)
    return torch.where(trusted, nu * update / divisor, update)


@elementwise
def take_sign(update: Tensor) -> dict[str, Tensor]:
    """Move every element by one unit, whatever the size of its update; sign(0) is 0.

    update = sign(update)

    Reads update. Source: signSGD (Bernstein et al. 2018).

    >>> take_sign(torch.tensor([-3.0, 0.0, 0.5]))
    {'update': tensor([-1.,  0.,  1.])}
    """
    return dict(update=update.sign())
