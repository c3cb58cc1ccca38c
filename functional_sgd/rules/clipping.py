"""Rules that condition the gradient before anything else reads it."""

import torch
from torch import Tensor

from functional_sgd.ranges import NonNegative, Positive
from functional_sgd.reduction import mean, norm, root
from functional_sgd.rule import elementwise, leafwise

__all__ = [
    "adaptive_clip",
    "ascend",
    "centralize",
    "clip_leaf_norm",
    "clip_norm",
    "clip_rms",
    "clip_value",
    "normalize",
]


@elementwise
def ascend(grad: Tensor) -> dict[str, Tensor]:
    """Go up instead of down: turn the gradient round, for the rules after it.

    grad = -grad

    Put it first: weight decay after it still pulls towards zero, as with maximize=True in
    torch.optim.

    >>> import torch
    >>> ascend(torch.tensor([3.0, -1.0]))
    {'grad': tensor([-3.,  1.])}
    """
    return dict(grad=-grad)


@elementwise
def clip_value(grad: Tensor, *, max_value: NonNegative = 1.0) -> dict[str, Tensor]:
    """Cut every element of the gradient to [-max_value, max_value]; max_value >= 0.

    Source: torch.nn.utils.clip_grad_value_.

    >>> import torch
    >>> clip_value(torch.tensor([-3.0, 0.5]), max_value=1.0)
    {'grad': tensor([-1.0000,  0.5000])}
    """
    return dict(grad=grad.clamp(-max_value, max_value))


@elementwise
def clip_norm(
    grad: Tensor, *, grad_norm: Tensor = norm("grad", over="tree"), max_norm: Positive = 1.0
) -> dict[str, Tensor]:
    """Shorten the whole gradient, all leaves together, to length max_norm if it is longer.

    grad = grad * min(1, max_norm / (grad_norm + 1e-6));  grad_norm = sqrt(sum of all squares)

    Reads grad and max_norm > 0; leaves without a gradient do not count. As a function of one tensor
    it takes the norm of that, or the one it is given. Source: Pascanu et al. 2013, with
    torch.nn.utils.clip_grad_norm_'s 1e-6.

    >>> import torch
    >>> clip_norm(torch.tensor([3.0, 4.0]), max_norm=2.5)
    {'grad': tensor([1.5000, 2.0000])}
    >>> clip_norm(torch.tensor([3.0, 4.0]), max_norm=2.5, grad_norm=torch.tensor(50.0))
    {'grad': tensor([0.1500, 0.2000])}
    """
    return dict(grad=grad * (max_norm / (grad_norm + 1e-6)).clamp(max=1.0))


@elementwise
def clip_leaf_norm(
    grad: Tensor, *, length: Tensor = norm("grad"), max_norm: Positive = 1.0
) -> dict[str, Tensor]:
    """Shorten the gradient of each leaf to length max_norm if it is longer, whatever the others do.

    grad = grad * max_norm / length where length > max_norm;  length is the norm of the leaf

    Reads grad and max_norm > 0. Source: MARS (Yuan et al. 2024), with max_norm = 1.

    >>> clip_leaf_norm(torch.tensor([3.0, 4.0]), max_norm=2.5)
    {'grad': tensor([1.5000, 2.0000])}
    """
    # The larger of the two divides, so a length of 0 never does, and a short gradient is multiplied
    # by exactly 1. MARS adds no 1e-6 to the length, unlike clip_norm.
    return dict(grad=grad * (max_norm / torch.where(length > max_norm, length, max_norm)))


@elementwise
def clip_rms(
    grad: Tensor,
    *,
    mean_sqr: Tensor = mean(lambda grad: grad * grad),
    max_rms: Positive = 1.0,
) -> dict[str, Tensor]:
    """Shorten each leaf's gradient so that the root of its mean square is at most max_rms.

    grad = grad / max(1, sqrt(mean_sqr) / max_rms);  mean_sqr is the mean of grad**2, of each leaf

    Reads grad and max_rms > 0. For updates: rename(clip_rms, grad="update").
    Source: Adafactor (Shazeer and Stern 2018), section 6.

    >>> import torch
    >>> clip_rms(torch.tensor([3.0, -3.0]), max_rms=1.0)
    {'grad': tensor([ 1., -1.])}
    """
    return dict(grad=grad / (root(mean_sqr) / max_rms).clamp(min=1.0))


@leafwise
def centralize(grad: Tensor) -> dict[str, Tensor]:
    """Subtract from the gradient of every output unit its mean; vectors and scalars stay.

    grad = grad - mean over all axes but the first, for leaves of 2 or more axes (torch's layout:
    outputs first)

    Source: gradient centralization (Yong et al. 2020).

    >>> import torch
    >>> centralize(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))
    {'grad': tensor([[-1.,  1.],
            [ 0.,  0.]])}
    """
    if grad.dim() < 2:
        return dict(grad=grad)
    return dict(grad=grad - grad.mean(dim=tuple(range(1, grad.dim())), keepdim=True))


@leafwise
def adaptive_clip(
    param: Tensor, grad: Tensor, *, max_ratio: Positive = 0.01, eps: Positive = 1e-3
) -> dict[str, Tensor]:
    """Shorten the gradient of every output unit that is long for the size of the unit's weights.

    grad = grad * min(1, max_ratio * max(size, eps) / slope);  size and slope are the Euclidean
    norms of param and grad over all axes but the first, of vectors over the whole leaf

    Reads param, grad, max_ratio > 0 and eps > 0, which lets weights that are zero move.
    Source: NFNets (Brock et al. 2021); numbers of optax.adaptive_grad_clip, in torch's layout
    (outputs first).

    >>> import torch
    >>> adaptive_clip(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]]), max_ratio=0.1)
    {'grad': tensor([[0.0000, 0.5000]])}
    """
    slope = _unit_norms(grad)
    longest = max_ratio * _unit_norms(param).clamp(min=eps)
    # A slope of 0 is never clipped, but the quotient is computed there, too. 1e-6 is optax's.
    return dict(grad=torch.where(slope > longest, grad * (longest / slope.clamp(min=1e-6)), grad))


@elementwise
def normalize(
    grad: Tensor, *, grad_norm: Tensor = norm("grad", over="tree"), eps: NonNegative = 1e-6
) -> dict[str, Tensor]:
    """Give the whole gradient, all leaves together, length 1: its direction is what is left.

    grad = grad / (grad_norm + eps);  grad_norm = sqrt(sum of all squares)

    Reads grad and eps >= 0, which, above 0, keeps a gradient of 0 at 0. For an update:
    `rename(normalize, grad="update")`. Source: Hazan et al. 2015; optax.normalize_by_update_norm.

    >>> import torch
    >>> normalize(torch.tensor([3.0, 4.0]), eps=0.0)
    {'grad': tensor([0.6000, 0.8000])}
    """
    return dict(grad=grad / (grad_norm + eps))


def _unit_norms(leaf: Tensor) -> Tensor:
    """The length of each output unit's weights, in a shape that spreads over the leaf."""
    first = 1 if leaf.dim() > 1 else 0  # the axis of the outputs stays
    axes = tuple(range(first, leaf.dim()))
    # abs, since a leafwise rule sees complex numbers, whose squares are no lengths.
    return root(leaf.abs().square().sum(axes, keepdim=True))
