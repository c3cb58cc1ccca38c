"""Rules that keep running averages of the gradient, and correct them."""

import torch
from torch import Tensor

from functional_sgd.ranges import Decay, NonNegative, Share
from functional_sgd.rule import elementwise

__all__ = [
    "average_grad",
    "average_grad_from_first",
    "average_sqr_grad",
    "dampen",
    "debias",
    "heavy_ball",
    "mix_grad",
    "nesterov",
    "nesterov_average",
    "optimistic",
    "quasi_hyperbolic",
    "sign_of_average",
    "sum_sqr_grad",
]


@elementwise(grad_avg=torch.zeros_like)
def average_grad(grad: Tensor, grad_avg: Tensor, *, mom: Decay = 0.9) -> dict[str, Tensor]:
    """Move along the running mean of the gradients: momentum, dampened so that it stays on the
    gradient's scale.

    grad_avg = mom * grad_avg + (1 - mom) * grad;  update = grad_avg

    Reads grad and mom in [0, 1); with mom = 0 the update is the gradient. Keeps grad_avg, which
    starts at 0. Source: fastbook chapter 16; the first moment of Adam (Kingma and Ba 2015).

    >>> average_grad(torch.tensor([1.0]), torch.tensor([0.0]), mom=0.5)
    {'grad_avg': tensor([0.5000]), 'update': tensor([0.5000])}
    """
    grad_avg = mom * grad_avg + (1 - mom) * grad
    return dict(grad_avg=grad_avg, update=grad_avg)


@elementwise(grad_avg=torch.zeros_like)
def average_grad_from_first(
    grad: Tensor, grad_avg: Tensor, *, step: Tensor, mom: Decay = 0.9
) -> dict[str, Tensor]:
    """average_grad with an average that starts as the first gradient, so that it has no bias.

    grad_avg = grad at step 1, mom * grad_avg + (1 - mom) * grad afterwards;  update = grad_avg

    Reads grad, mom in [0, 1) and step; keeps grad_avg. Source: MoMo (Schaipp et al. 2024).

    >>> one, two = torch.tensor([1.0]), torch.tensor([2.0])
    >>> average_grad_from_first(one, two, step=torch.tensor(1), mom=0.5)
    {'grad_avg': tensor([1.]), 'update': tensor([1.])}
    """
    grad_avg = averaged_from_first(grad_avg, grad, mom, step)
    return dict(grad_avg=grad_avg, update=grad_avg)


@elementwise(velocity=torch.zeros_like)
def heavy_ball(grad: Tensor, velocity: Tensor, *, mom: Decay = 0.9) -> dict[str, Tensor]:
    """Move with the speed that the gradients have built up: torch.optim.SGD's momentum.

    velocity = mom * velocity + grad;  update = velocity

    Reads grad and mom in [0, 1). Keeps velocity, which starts at 0. It is not an average: under a
    constant gradient it grows to grad / (1 - mom), so it needs no debias.
    Source: Polyak 1964; Sutskever et al. 2013.

    >>> heavy_ball(torch.tensor([1.0]), torch.tensor([1.0]), mom=0.5)
    {'velocity': tensor([1.5000]), 'update': tensor([1.5000])}
    """
    velocity = mom * velocity + grad
    return dict(velocity=velocity, update=velocity)


@elementwise
def dampen(grad: Tensor, *, step: Tensor, dampening: Share = 0.0) -> dict[str, Tensor]:
    """Let later gradients weigh less than the first, as torch.optim.SGD(dampening=...) does before
    its momentum.

    grad = grad at step 1, (1 - dampening) * grad afterwards

    Reads grad, dampening in [0, 1], step. Source: torch.optim.SGD.

    >>> dampen(torch.tensor([2.0]), step=torch.tensor(2), dampening=0.5)
    {'grad': tensor([1.])}
    """
    return dict(grad=torch.where(step <= 1, grad, (1 - dampening) * grad))


@elementwise
def nesterov(grad: Tensor, velocity: Tensor, *, mom: Decay = 0.9) -> dict[str, Tensor]:
    """Look one step of momentum ahead: use the new speed and this gradient together.

    update = grad + mom * velocity

    Reads grad, velocity (of heavy_ball) and mom in [0, 1). Source: Sutskever et al. 2013, in the
    form of torch.optim.SGD.

    >>> nesterov(torch.tensor([1.0]), torch.tensor([2.0]), mom=0.5)
    {'update': tensor([2.])}
    """
    return dict(update=grad + mom * velocity)


@elementwise(sqr_avg=torch.zeros_like, positive=("sqr_avg",))
def average_sqr_grad(grad: Tensor, sqr_avg: Tensor, *, sqr_mom: Decay = 0.99) -> dict[str, Tensor]:
    """Keep the running mean of the squared gradient: how steep each direction has been.

    sqr_avg = sqr_mom * sqr_avg + (1 - sqr_mom) * grad**2

    Reads grad and sqr_mom in [0, 1); keeps sqr_avg (same shape as the parameter, at least float32),
    which starts at 0. Source: Hinton, lecture 6e (RMSProp); fastbook chapter 16.

    >>> average_sqr_grad(torch.tensor([2.0]), torch.tensor([0.0]), sqr_mom=0.5)
    {'sqr_avg': tensor([2.])}
    """
    return dict(sqr_avg=sqr_mom * sqr_avg + (1 - sqr_mom) * grad.square())


@elementwise(sqr_sum=torch.zeros_like, positive=("sqr_sum",))
def sum_sqr_grad(
    grad: Tensor, sqr_sum: Tensor, *, step: Tensor, first_sum: NonNegative = 0.0
) -> dict[str, Tensor]:
    """Add up the squared gradients, and forget none.

    sqr_sum = sqr_sum + grad**2

    Reads grad, step and first_sum >= 0, what the sum begins with: it is added at step 1. Keeps
    sqr_sum, which starts at 0. Source: Adagrad (Duchi et al. 2011).

    >>> sum_sqr_grad(torch.tensor([2.0]), torch.tensor([0.0]), step=torch.tensor(1), first_sum=0.5)
    {'sqr_sum': tensor([4.5000])}
    """
    # first_sum is a hyper, and slots begin before hypers are known: so it comes in at the first
    # step.
    return dict(sqr_sum=torch.where(step <= 1, sqr_sum + first_sum, sqr_sum) + grad.square())


@elementwise(belongs=dict(update="grad_avg"))
def debias(
    update: Tensor,
    grad_avg: Tensor | None = None,
    sqr_avg: Tensor | None = None,
    *,
    step: Tensor,
    mom: Decay = 0.9,
    sqr_mom: Decay = 0.99,
) -> dict[str, Tensor]:
    """Undo the pull of the averages towards the zero that they started from; what is kept stays
    biased.

    grad_avg = grad_avg / (1 - mom**step);  sqr_avg = sqr_avg / (1 - sqr_mom**step)

    Reads whichever of grad_avg (then also update, which it divides likewise) and sqr_avg the chain
    has, their momenta and step. Shadows them for the rest of the step. Source: Adam (Kingma and Ba
    2015), section 3.

    >>> debias(torch.tensor([0.5]), torch.tensor([0.5]), step=torch.tensor(1), mom=0.5)
    {'grad_avg': tensor([1.]), 'update': tensor([1.])}
    """
    unbiased: dict[str, Tensor] = {}
    if grad_avg is not None:
        # In float64, as step is: in float32, 1 - 0.999 is off by 1e-5 of its value.
        weight = 1 - mom**step
        unbiased |= dict(grad_avg=grad_avg / weight, update=update / weight)
    if sqr_avg is not None:
        unbiased |= dict(sqr_avg=sqr_avg / (1 - sqr_mom**step))
    return unbiased


@elementwise(mom_product=torch.ones_like, positive=("mom_product",))
def nesterov_average(
    grad: Tensor,
    grad_avg: Tensor,
    mom_product: Tensor,
    *,
    step: Tensor,
    mom: Decay = 0.9,
    mom_decay: NonNegative = 4e-3,
) -> dict[str, Tensor]:
    """Look one step of momentum ahead with an average, and undo its pull towards zero; the momentum
    grows to its full value with the steps.

    mu(t) = mom * (1 - 0.96**(t * mom_decay) / 2);  mom_product = mom_product * mu(step)
    update = (1 - mu(step)) / (1 - mom_product) * grad
    + mu(step + 1) / (1 - mom_product * mu(step + 1)) * grad_avg

    Reads grad, grad_avg (of average_grad, not debiased), step, mom in [0, 1) and mom_decay >= 0.
    Keeps mom_product, which starts at 1: one number, which every element has, so that the rule is
    part of a kernel. Source: NAdam (Dozat 2016), with the numbers of torch.optim.NAdam.

    >>> one = torch.tensor([1.0])  # mu is 1/4
    >>> nesterov_average(3 * one, 0 * one, one, step=torch.tensor(1), mom=0.5, mom_decay=0.0)
    {'update': tensor([3.]), 'mom_product': tensor([0.2500])}
    """
    now = mom * (1 - 0.5 * 0.96 ** (step * mom_decay))
    soon = mom * (1 - 0.5 * 0.96 ** ((step + 1) * mom_decay))
    mom_product = mom_product * now
    of_grad, of_average = (1 - now) / (1 - mom_product), soon / (1 - mom_product * soon)
    return dict(update=of_grad * grad + of_average * grad_avg, mom_product=mom_product)


@elementwise
def quasi_hyperbolic(
    grad: Tensor, update: Tensor, sqr_avg: Tensor, *, nu_1: Share = 0.7, nu_2: Share = 1.0
) -> dict[str, Tensor]:
    """Mix the averages with the gradient of this very step.

    update = (1 - nu_1) * grad + nu_1 * update;  sqr_avg = (1 - nu_2) * grad**2 + nu_2 * sqr_avg

    Reads grad, update (the average), sqr_avg, nu_1 and nu_2 in [0, 1]; shadows sqr_avg.
    Source: QHAdam (Ma and Yarats 2019); defaults of fastai.

    >>> quasi_hyperbolic(torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([1.0]), nu_1=0.5)
    {'update': tensor([2.]), 'sqr_avg': tensor([1.])}
    """
    squares = _mixed(grad.square(), sqr_avg, nu_2)
    return dict(update=_mixed(grad, update, nu_1), sqr_avg=squares)


@elementwise
def mix_grad(grad: Tensor, update: Tensor, *, nu: Share = 0.7) -> dict[str, Tensor]:
    """Mix an average with the gradient of this very step.

    update = (1 - nu) * grad + nu * update

    Reads grad, update (the average) and nu in [0, 1]. Source: QHM (Ma and Yarats 2019).

    >>> mix_grad(torch.tensor([1.0]), torch.tensor([3.0]), nu=0.5)
    {'update': tensor([2.])}
    """
    return dict(update=_mixed(grad, update, nu))


def _mixed(new: Tensor, average: Tensor, nu: float) -> Tensor:
    return (1 - nu) * new + nu * average


@elementwise(grad_avg=torch.zeros_like)
def sign_of_average(
    grad: Tensor, grad_avg: Tensor, *, mom: Decay = 0.9, slow_mom: Decay = 0.99
) -> dict[str, Tensor]:
    """Move by one unit in the direction on which the gradient and its slow average agree.

    update = sign(mom * grad_avg + (1 - mom) * grad);  grad_avg = slow_mom * grad_avg + (1 -
    slow_mom) * grad

    Reads grad, mom and slow_mom in [0, 1); keeps grad_avg, which starts at 0. sign(0) is 0.
    Source: Lion (Chen et al. 2023).

    >>> sign_of_average(torch.tensor([-3.0]), torch.tensor([1.0]), mom=0.5, slow_mom=0.5)
    {'update': tensor([-1.]), 'grad_avg': tensor([-1.])}
    """
    update = (mom * grad_avg + (1 - mom) * grad).sign()
    return dict(update=update, grad_avg=slow_mom * grad_avg + (1 - slow_mom) * grad)


@elementwise(last_grad=torch.zeros_like)
def optimistic(
    grad: Tensor, last_grad: Tensor, *, step: Tensor, optimism: NonNegative = 1.0
) -> dict[str, Tensor]:
    """Go on as if the gradient would change once more as it has changed since the last step.

    update = grad + optimism * (grad - last_grad), the gradient alone at step 1;  last_grad = grad

    Reads grad, step and optimism >= 0; keeps last_grad. For an update: `rename(optimistic,
    grad="update", last_grad="last_update")`. Source: Popov 1980; Rakhlin and Sridharan 2013;
    numbers of optax.scale_by_optimistic_gradient with alpha=1.

    >>> three, one = torch.tensor([3.0]), torch.tensor([1.0])
    >>> optimistic(three, one, step=torch.tensor(2), optimism=0.5)
    {'update': tensor([4.]), 'last_grad': tensor([3.])}
    """
    # The slot begins as 0: without this the whole first gradient would count as a change.
    last_grad = torch.where(step <= 1, grad, last_grad)
    return dict(update=grad + optimism * (grad - last_grad), last_grad=grad)


def averaged_from_first(average: Tensor, new: Tensor, mom: float, step: Tensor) -> Tensor:
    """The running mean that starts with the first number."""
    return torch.where(step <= 1, new, mom * average + (1 - mom) * new)
