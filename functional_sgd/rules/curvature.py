"""Rules that read the diagonal of the Hessian, which the caller gives."""

import torch
from torch import Tensor

from functional_sgd.ranges import Count, Decay, Positive
from functional_sgd.rule import elementwise

__all__ = ["average_curvature", "scale_by_curvature"]


@elementwise(curvature=torch.zeros_like)
def average_curvature(
    hessian: Tensor,
    curvature: Tensor,
    *,
    step: Tensor,
    sqr_mom: Decay = 0.99,
    hessian_every: Count = 10,
) -> dict[str, Tensor]:
    """Keep the running mean of what the caller says the diagonal of the Hessian is.

    curvature = sqr_mom * curvature + (1 - sqr_mom) * hessian at steps 1, 1 + hessian_every, ...

    Reads hessian, which the caller passes: `opt(..., hessian=tree)`, sqr_mom in [0, 1), step and
    hessian_every >= 1; keeps curvature, which starts at 0. At the other steps hessian is not looked
    at, so zeros will do. Source: Sophia (Liu et al. 2024), algorithm 3.

    >>> two, zero = torch.tensor([2.0]), torch.tensor([0.0])
    >>> average_curvature(two, zero, step=torch.tensor(11), sqr_mom=0.5)
    {'curvature': tensor([1.])}
    >>> average_curvature(two, zero, step=torch.tensor(12), sqr_mom=0.5)
    {'curvature': tensor([0.])}
    """
    mixed = sqr_mom * curvature + (1 - sqr_mom) * hessian
    return dict(curvature=torch.where((step - 1) % hessian_every == 0, mixed, curvature))


@elementwise
def scale_by_curvature(
    update: Tensor, curvature: Tensor, *, rho: Positive = 0.04, eps: Positive = 1e-12
) -> dict[str, Tensor]:
    """Divide by the curvature, as Newton's method does, but move no element by more than one unit.

    update = clip(update / max(rho * curvature, eps), -1, 1)

    Reads update, curvature, rho > 0 and eps > 0, which also takes the place of curvatures below 0.
    Source: Sophia (Liu et al. 2024), algorithm 3, where rho is gamma.

    >>> scale_by_curvature(torch.tensor([1.0, -1.0]), torch.tensor([4.0, -1.0]), rho=0.5)
    {'update': tensor([ 0.5000, -1.0000])}
    """
    return dict(update=(update / (rho * curvature).clamp(min=eps)).clamp(-1, 1))
