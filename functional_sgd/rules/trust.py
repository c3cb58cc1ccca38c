"""Rules that set the length of each leaf's update by the length of the leaf."""

import torch
from torch import Tensor

from functional_sgd.ranges import NonNegative, Positive
from functional_sgd.reduction import mean, norm, root
from functional_sgd.rule import elementwise

__all__ = [
    "larc_ratio",
    "lars_grad",
    "lars_ratio",
    "norm_ratio",
    "scale_by_param_rms",
    "trust_ratio",
]


@elementwise
def trust_ratio(
    param: Tensor,
    update: Tensor,
    *,
    size: Tensor = norm("param"),
    length: Tensor = norm("update"),
    max_trust: Positive = 10.0,
) -> dict[str, Tensor]:
    """Let a leaf move in proportion to its own size.

    update = update * min(size / length, max_trust), unchanged if either is 0;  size and length are
    the Euclidean norms of param and update, of each leaf

    Reads param, update and max_trust > 0. Source: LAMB (You et al. 2020), clipped as in fastai.

    >>> trust_ratio(torch.tensor([2.0, 2.0]), torch.tensor([0.5, -0.5]), max_trust=10.0)
    {'update': tensor([ 2., -2.])}
    """
    ratio = (size / torch.where(length == 0, 1.0, length)).clamp(max=max_trust)
    # In proportion to its size, a leaf of zeros (a new bias, say) would stay there for ever.
    return dict(update=torch.where((size == 0) | (length == 0), 1.0, ratio) * update)


@elementwise
def larc_ratio(
    param: Tensor,
    grad: Tensor,
    update: Tensor,
    *,
    size: Tensor = norm("param"),
    slope: Tensor = norm("grad"),
    trust_coeff: Positive = 0.02,
    wd: NonNegative = 0.0,
    eps: NonNegative = 1e-8,
) -> dict[str, Tensor]:
    """Slow down the leaves that would move far for their size; never speed one up.

    update = update * min(1, local);  local = trust_coeff * size / (slope + wd * size + eps), 1 if
    the divisor is 0;  size and slope are the Euclidean norms of param and grad, of each leaf

    Reads param, grad, update, trust_coeff > 0, wd >= 0, eps >= 0.
    Source: LARC (NVIDIA apex), numbers of fastai.

    >>> x = torch.tensor([1.0])
    >>> larc_ratio(x, x, x, trust_coeff=0.5, eps=0.0)
    {'update': tensor([0.5000])}
    """
    local = _local_rate(size, slope, trust_coeff, wd, eps)
    return dict(update=local.clamp(max=1.0) * update)


@elementwise
def lars_ratio(
    param: Tensor,
    grad: Tensor,
    update: Tensor,
    *,
    size: Tensor = norm("param"),
    slope: Tensor = norm("grad"),
    trust_coeff: Positive = 0.02,
    wd: NonNegative = 0.0,
    eps: NonNegative = 1e-8,
) -> dict[str, Tensor]:
    """larc_ratio without the ceiling: leaves may also be sped up.

    update = update * local

    Source: LARS (You et al. 2017), numbers of fastai's Larc(clip=False).

    >>> x = torch.tensor([1.0])
    >>> lars_ratio(4 * x, x, x, trust_coeff=0.5, eps=0.0)
    {'update': tensor([2.])}
    """
    return dict(update=_local_rate(size, slope, trust_coeff, wd, eps) * update)


@elementwise
def scale_by_param_rms(
    param: Tensor,
    update: Tensor,
    *,
    mean_sqr: Tensor = mean(lambda param: param * param),
    min_rms: NonNegative = 1e-3,
) -> dict[str, Tensor]:
    """Let a leaf move in proportion to the root of its mean square, and zeros as if it were
    min_rms.

    update = update * max(sqrt(mean_sqr), min_rms);  mean_sqr is the mean of param**2, of each leaf

    Reads param, update and min_rms >= 0. Source: Adafactor (Shazeer and Stern 2018), section 8.

    >>> scale_by_param_rms(torch.tensor([3.0, -3.0]), torch.tensor([1.0, 2.0]))
    {'update': tensor([3., 6.])}
    """
    return dict(update=update * root(mean_sqr).clamp(min=min_rms))


def _local_rate(size: Tensor, slope: Tensor, trust_coeff: float, wd: float, eps: float) -> Tensor:
    divisor = slope + size * wd + eps
    still = divisor == 0
    return torch.where(still, 1.0, trust_coeff * size / torch.where(still, 1.0, divisor))


@elementwise
def norm_ratio(
    param: Tensor,
    update: Tensor,
    *,
    size: Tensor = norm("param"),
    length: Tensor = norm("update"),
) -> dict[str, Tensor]:
    """trust_ratio without a ceiling: the update is as long as the leaf.

    update = update * size / length, unchanged if either is 0

    Reads param and update, and their Euclidean norms, of each leaf. Source: Fromage (Bernstein et
    al. 2020); LAMB as optax has it.

    >>> norm_ratio(torch.tensor([30.0, 40.0]), torch.tensor([0.0, -0.5]))
    {'update': tensor([  0., -50.])}
    """
    ratio = size / torch.where(length == 0, 1.0, length)
    return dict(update=torch.where((size == 0) | (length == 0), 1.0, ratio) * update)


@elementwise
def lars_grad(
    param: Tensor,
    grad: Tensor,
    *,
    size: Tensor = norm("param"),
    slope: Tensor = norm("grad"),
    trust_coeff: Positive = 0.001,
    wd: NonNegative = 0.0,
    eps: NonNegative = 0.0,
) -> dict[str, Tensor]:
    """Give the gradient of every leaf a length in proportion to the leaf, with an L2 penalty.

    grad = local * (grad + wd * param);  local = trust_coeff * size / (slope + wd * size + eps), 1
    if size or the divisor is 0;  size and slope are the Euclidean norms of param and grad

    Reads param, grad, trust_coeff > 0, wd >= 0, eps >= 0. Put it before momentum.
    Source: LARS (You et al. 2017), algorithm 1.

    >>> x = torch.tensor([1.0])
    >>> lars_grad(4 * x, x, trust_coeff=0.5)
    {'grad': tensor([2.])}
    """
    # As in trust_ratio, a leaf of zeros must be able to move.
    local = _local_rate(size, slope, trust_coeff, wd, eps)
    return dict(grad=torch.where(size == 0, 1.0, local) * (grad + wd * param))
