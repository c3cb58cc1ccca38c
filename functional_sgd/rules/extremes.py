"""Rules that go by the largest gradient, or the largest mean square, that there has been."""

import torch
from torch import Tensor

from functional_sgd.ranges import Decay, NonNegative
from functional_sgd.rule import elementwise

__all__ = ["amsgrad", "keep_max_grad", "scale_by_max"]


@elementwise(max_sqr_avg=torch.zeros_like, positive=("max_sqr_avg",))
def amsgrad(sqr_avg: Tensor, max_sqr_avg: Tensor) -> dict[str, Tensor]:
    """Never let a divisor become smaller: go by the largest mean square so far.

    max_sqr_avg = max(max_sqr_avg, sqr_avg);  sqr_avg = max_sqr_avg

    Reads sqr_avg, and shadows it for the rest of the step; keeps max_sqr_avg, which starts at 0.
    Before `debias` it compares what is kept, as torch.optim does; after it, the unbiased squares,
    as optax does. Source: AMSGrad (Reddi et al. 2018).

    >>> amsgrad(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 2.0]))
    {'max_sqr_avg': tensor([2., 4.]), 'sqr_avg': tensor([2., 4.])}
    """
    largest = torch.maximum(max_sqr_avg, sqr_avg)
    return dict(max_sqr_avg=largest, sqr_avg=largest)


@elementwise(max_grad=torch.zeros_like, positive=("max_grad",))
def keep_max_grad(
    grad: Tensor, max_grad: Tensor, *, sqr_mom: Decay = 0.99, eps: NonNegative = 1e-8
) -> dict[str, Tensor]:
    """Keep the size of the largest gradient, which is slowly forgotten.

    max_grad = max(sqr_mom * max_grad, |grad| + eps)

    Reads grad, sqr_mom in [0, 1) and eps >= 0 (at 0, 0 / 0 is NaN); keeps max_grad, which starts at
    0 and is at least eps from then on. Source: AdaMax (Kingma and Ba 2015, section 7.1), with eps
    as in torch.optim.

    >>> keep_max_grad(torch.tensor([-1.0, 3.0]), torch.tensor([4.0, 4.0]), sqr_mom=0.5, eps=0.0)
    {'max_grad': tensor([2., 3.])}
    """
    return dict(max_grad=torch.maximum(sqr_mom * max_grad, grad.abs() + eps))


@elementwise
def scale_by_max(update: Tensor, max_grad: Tensor) -> dict[str, Tensor]:
    """Give every direction the same speed: divide by its largest gradient.

    update = update / max_grad

    Reads update and max_grad (of keep_max_grad). Source: AdaMax (Kingma and Ba 2015).

    >>> scale_by_max(torch.tensor([4.0]), torch.tensor([2.0]))
    {'update': tensor([2.])}
    """
    return dict(update=update / max_grad)
