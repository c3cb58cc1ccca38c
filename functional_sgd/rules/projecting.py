"""Rules that bring the parameters back into a set; they come after the step."""

import torch
from torch import Tensor

from functional_sgd.pairs import as_complex, as_real
from functional_sgd.ranges import NonNegative, Positive
from functional_sgd.reduction import norm
from functional_sgd.rule import elementwise, leafwise

__all__ = [
    "project_box",
    "project_l1_ball",
    "project_l2_ball",
    "project_l2_sphere",
    "project_non_negative",
    "project_simplex",
]


@elementwise
def project_non_negative(param: Tensor) -> dict[str, Tensor]:
    """Put every element that is below 0 to 0.

    param = max(param, 0)

    Source: optax.projections.projection_non_negative.

    >>> project_non_negative(torch.tensor([-1.0, 2.0]))
    {'param': tensor([0., 2.])}
    """
    return dict(param=param.clamp(min=0))


@elementwise
def project_box(param: Tensor, *, low: float = -1.0, high: float = 1.0) -> dict[str, Tensor]:
    """Cut every element to [low, high].

    param = min(max(param, low), high)

    Reads param, low and high, which may be trees. Where low is above high, all becomes high: a rule
    knows the range of one hyper, not of two. Source: optax.projections.projection_box.

    >>> project_box(torch.tensor([-3.0, 0.5, 2.0]), low=0.0, high=1.0)
    {'param': tensor([0.0000, 0.5000, 1.0000])}
    """
    return dict(param=param.clamp(min=low).clamp(max=high))


@elementwise
def project_l2_ball(
    param: Tensor, *, size: Tensor = norm("param"), radius: NonNegative = 1.0
) -> dict[str, Tensor]:
    """Shorten every leaf to the length `radius` if it is longer.

    param = param * min(1, radius / size);  size is the Euclidean norm of the leaf

    Reads param and radius >= 0. Source: optax.projections.projection_l2_ball, of a tree as a whole.

    >>> project_l2_ball(torch.tensor([3.0, 4.0]), radius=1.0)
    {'param': tensor([0.6000, 0.8000])}
    """
    return dict(param=param * torch.where(size > radius, radius / _not_zero(size), 1.0))


@elementwise
def project_l2_sphere(
    param: Tensor, *, size: Tensor = norm("param"), radius: NonNegative = 1.0
) -> dict[str, Tensor]:
    """Give every leaf the length `radius`; one of zeros stays.

    param = param * radius / size;  size is the Euclidean norm of the leaf

    Reads param and radius >= 0. Source: optax.projections.projection_l2_sphere, of a tree as a
    whole.

    >>> project_l2_sphere(torch.tensor([3.0, 4.0]), radius=10.0)
    {'param': tensor([6., 8.])}
    """
    return dict(param=param * (radius / _not_zero(size)))


@leafwise
def project_l1_ball(param: Tensor, *, radius: NonNegative = 1.0) -> dict[str, Tensor]:
    """Bring every leaf to the nearest point whose absolute values sum to `radius` or less.

    param = sign(param) * max(|param| - t, 0), with the smallest t >= 0 for which that holds

    Reads param and radius >= 0; most elements become 0. Parts of complex numbers count each.
    Source: Duchi et al. 2008; optax.projections.projection_l1_ball, of a tree as a whole.

    >>> project_l1_ball(torch.tensor([3.0, -2.0, 0.5]), radius=2.0)
    {'param': tensor([ 1.5000, -0.5000,  0.0000])}
    """
    real = as_real(param)
    size = real.abs()
    found = real.sign() * (size - _threshold(size, radius).clamp(min=0)).clamp(min=0)
    return dict(param=as_complex(found, param))


@leafwise
def project_simplex(param: Tensor, *, mass: Positive = 1.0) -> dict[str, Tensor]:
    """Bring every leaf to the nearest point without negative elements whose sum is `mass`.

    param = max(param - t, 0), with the t for which the sum is mass

    Reads param and mass > 0: with 1, a leaf is a distribution. Parts of complex numbers count each.
    Source: Duchi et al. 2008; optax.projections.projection_simplex, of a tree as a whole.

    >>> project_simplex(torch.tensor([1.5, 1.0, -3.0]))
    {'param': tensor([0.7500, 0.2500, 0.0000])}
    """
    real = as_real(param)
    found = (real - _threshold(real, mass)).clamp(min=0)
    return dict(param=as_complex(found, param))


def _threshold(values: Tensor, mass: float | Tensor) -> Tensor:
    """The t for which what the values have above it sums to mass: the largest, over k, of (sum of
    the k largest values - mass) / k.
    """
    if values.numel() == 0:
        return values.new_zeros(())
    # The paper looks for the last k whose value is above its threshold. The maximum is the same
    # number, without an index that depends on values.
    falling = values.reshape(-1).sort(descending=True).values
    counts = torch.arange(1, values.numel() + 1, dtype=values.dtype, device=values.device)
    return ((falling.cumsum(0) - mass) / counts).amax()


def _not_zero(size: Tensor) -> Tensor:
    return torch.where(size == 0, 1.0, size)
