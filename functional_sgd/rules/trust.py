"""Rules that set the length of each leaf's update by the length of the leaf."""

import torch
from torch import Tensor

from functional_sgd.rule import leafwise


@leafwise
def trust_ratio(param: Tensor, update: Tensor, *, max_trust: float = 10.0) -> dict[str, Tensor]:
    """Let a leaf move in proportion to its own size.

    update = update * min(|param| / |update|, max_trust), unchanged if either is 0;  |x| is the
    Euclidean norm

    Reads param, update and max_trust > 0. Source: LAMB (You et al. 2020), clipped as in fastai.

    >>> trust_ratio(torch.tensor([2.0, 2.0]), torch.tensor([0.5, -0.5]), max_trust=10.0)
    {'update': tensor([ 2., -2.])}
    """
    size: Tensor = torch.linalg.vector_norm(param)
    length: Tensor = torch.linalg.vector_norm(update)
    ratio = (size / torch.where(length == 0, 1.0, length)).clamp(max=max_trust)
    return dict(update=torch.where((size == 0) | (length == 0), 1.0, ratio) * update)


@leafwise
def larc_ratio(
    param: Tensor,
    grad: Tensor,
    update: Tensor,
    *,
    trust_coeff: float = 0.02,
    wd: float = 0.0,
    eps: float = 1e-8,
) -> dict[str, Tensor]:
    """Slow down the leaves that would move far for their size; never speed one up.

    update = update * min(1, local);  local = trust_coeff * |param| / (|grad| + wd * |param| + eps)

    Reads param, grad, update, trust_coeff > 0, wd >= 0, eps > 0; |x| is the Euclidean norm.
    Source: LARC (NVIDIA apex), numbers of fastai.

    >>> larc_ratio(torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([1.0]), trust_coeff=0.5, eps=0.0)
    {'update': tensor([0.5000])}
    """
    return dict(update=_local_rate(param, grad, trust_coeff, wd, eps).clamp(max=1.0) * update)


@leafwise
def lars_ratio(
    param: Tensor,
    grad: Tensor,
    update: Tensor,
    *,
    trust_coeff: float = 0.02,
    wd: float = 0.0,
    eps: float = 1e-8,
) -> dict[str, Tensor]:
    """larc_ratio without the ceiling: leaves may also be sped up.

    update = update * local

    Source: LARS (You et al. 2017), numbers of fastai's Larc(clip=False).

    >>> lars_ratio(torch.tensor([4.0]), torch.tensor([1.0]), torch.tensor([1.0]), trust_coeff=0.5, eps=0.0)
    {'update': tensor([2.])}
    """
    return dict(update=_local_rate(param, grad, trust_coeff, wd, eps) * update)


def _local_rate(param: Tensor, grad: Tensor, trust_coeff: float, wd: float, eps: float) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(param)
    slope: Tensor = torch.linalg.vector_norm(grad)
    return trust_coeff * size / (slope + size * wd + eps)
