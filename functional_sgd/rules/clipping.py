"""Rules that condition the gradient before anything else reads it."""

import torch
from torch import Tensor

from functional_sgd.ranges import NonNegative, Positive
from functional_sgd.reduction import mean, norm, root
from functional_sgd.rule import elementwise, leafwise

__all__ = ["ascend", "centralize", "clip_leaf_norm", "clip_norm", "clip_rms", "clip_value"]


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
    return dict(grad=grad * (max_norm / torch.where(length > max_norm, length, max_norm)))


def _squared(grad: Tensor) -> Tensor:  # has a name, so that chains can be pickled
    return grad * grad


@elementwise
def clip_rms(
    grad: Tensor,
    *,
    mean_sqr: Tensor = mean(_squared),
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
