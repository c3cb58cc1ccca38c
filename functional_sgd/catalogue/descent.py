"""Gradient descent, with and without momentum, and steps by sign."""

from functional_sgd import rules
from functional_sgd.catalogue.parts import given, l2, recipe
from functional_sgd.chaining import Chain, chain
from functional_sgd.rules import (
    average_grad,
    heavy_ball,
    sgd_step,
    sign_of_average,
    weight_decay,
)

__all__ = ["lion", "momentum", "sgd", "sgdw"]


@recipe
def sgd(
    lr: float = 1e-3,
    mom: float | None = None,
    nesterov: bool = False,
    dampening: float | None = None,
    wd: float | None = None,
) -> Chain:
    """Stochastic gradient descent; with `mom`, torch.optim.SGD's (undampened) momentum. `wd` is an
    L2 penalty.

    Source: Robbins and Monro 1951; Polyak 1964; numbers of torch.optim.SGD.

    Raises ValueError for nesterov or dampening without momentum, and for both together.

    >>> sgd(lr=0.1)
    chain(sgd_step, lr=0.1)
    >>> sgd(lr=0.1, mom=0.9, nesterov=True)
    chain(heavy_ball, nesterov, sgd_step, lr=0.1, mom=0.9)
    """
    if mom is None and (nesterov or dampening):
        raise ValueError(
            "sgd: nesterov and dampening are kinds of momentum, but mom is None. Pass mom=0.9."
        )
    if nesterov and dampening:
        raise ValueError(
            f"sgd: nesterov momentum has no dampening, got dampening={dampening}. Leave one out."
        )
    if mom is None:
        return chain(*l2(wd), sgd_step, **given(lr=lr, wd=wd))
    damped = [rules.dampen] if dampening else []
    ahead = [rules.nesterov] if nesterov else []
    # With dampening = 0 there is no rule that reads it, and a chain refuses a hyper that none
    # reads.
    hypers = given(lr=lr, mom=mom, dampening=dampening or None, wd=wd)
    return chain(*l2(wd), *damped, heavy_ball, *ahead, sgd_step, **hypers)


@recipe
def sgdw(
    lr: float = 1e-3,
    mom: float | None = None,
    nesterov: bool = False,
    dampening: float | None = None,
    wd: float = 1e-2,
) -> Chain:
    """sgd after decoupled weight decay, which does not go through momentum.

    Source: Loshchilov and Hutter 2019, algorithm 1; numbers of pytorch_optimizer.SGDW. timm's is
    the same, with mom=0 and wd=0 where nothing is said.

    >>> print(*sgdw(mom=0.9).rules)
    weight_decay heavy_ball sgd_step
    """
    return chain(weight_decay, sgd(lr, mom, nesterov, dampening), wd=wd)


@recipe
def momentum(lr: float = 1e-3, mom: float = 0.9) -> Chain:
    """SGD along the running mean of the gradients (dampened: the mean stays on the gradient's
    scale).

    Source: fastbook chapter 16.

    >>> momentum(lr=0.1)
    chain(average_grad, sgd_step, lr=0.1, mom=0.9)
    """
    return chain(average_grad, sgd_step, lr=lr, mom=mom)


@recipe
def lion(lr: float = 1e-4, mom: float = 0.9, slow_mom: float = 0.99, wd: float = 0.0) -> Chain:
    """Steps of equal size in the direction on which gradient and average agree; decoupled weight
    decay.

    Choose lr 3 to 10 times smaller, and wd as much larger, than for adamw. Source: Chen et al.
    2023.

    >>> print(*lion().rules)
    weight_decay sign_of_average sgd_step
    """
    parts = (weight_decay, sign_of_average, sgd_step)
    return chain(*parts, lr=lr, mom=mom, slow_mom=slow_mom, wd=wd)
