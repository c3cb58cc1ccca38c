"""Optimizers from online learning: the leader, dual averaging, and optimism."""

from functional_sgd.catalogue.parts import given, l2, recipe
from functional_sgd.chaining import Chain, chain
from functional_sgd.rules import (
    average_grad,
    average_sqr_grad,
    debias,
    dual_average_step,
    follow_leader_step,
    optimistic,
    scale_by_rms,
    sgd_step,
)
from functional_sgd.trial import rename

__all__ = ["ftrl", "madgrad", "optimistic_adam", "optimistic_sgd"]


@recipe
def ftrl(lr: float = 1e-3, beta: float = 0.0, l1: float = 0.0, l2: float = 0.0) -> Chain:
    """Adagrad that keeps elements of little use at exactly 0: for sparse, linear models.

    param = 0 where |slope| <= l1, else (sign(slope) * l1 - slope) / ((beta + sqrt(sqr_sum)) / lr +
    l2);  slope is the sum of grad - (how much sqrt(sqr_sum) has grown) / lr * param

    lr and beta are the paper's alpha and beta; it has beta=1. An element that has had no gradient
    stays where it is; pytorch_optimizer and TensorFlow make it 0.

    Source: McMahan et al. 2013 (KDD), algorithm 1; numbers of pytorch_optimizer.FTRL.

    >>> print(*ftrl().rules)
    follow_leader_step
    """
    return chain(follow_leader_step, lr=lr, beta=beta, l1=l1, l2=l2)


@recipe
def madgrad(
    lr: float = 1e-2, mom: float = 0.9, eps: float = 1e-6, wd: float | None = None
) -> Chain:
    """Dual averaging with a divisor for each element, the cube root of the squares, and momentum.
    `wd` is L2; it needs less than others, often none.

    goal = start - sum of w * grad / (cbrt(sum of w * grad**2) + eps), w = (lr + eps) * sqrt(step)
    param = mom * param + (1 - mom) * goal

    Source: Defazio and Jelassi 2022 (JMLR); numbers of their code.

    >>> print(*madgrad().rules)
    dual_average_step
    """
    return chain(*l2(wd), dual_average_step, **given(lr=lr, mom=mom, eps=eps, wd=wd))


@recipe
def optimistic_sgd(lr: float = 1e-3, optimism: float = 1.0) -> Chain:
    """Gradient descent that expects the gradient to change again as it has just changed: for games,
    in which plain descent goes round in circles.

    param = param - lr * (grad + optimism * (grad - last_grad))

    Source: Popov 1980; Daskalakis et al. 2018 (ICLR); numbers of optax.optimistic_gradient_descent
    with alpha=1.

    >>> print(*optimistic_sgd().rules)
    optimistic sgd_step
    """
    return chain(optimistic, sgd_step, lr=lr, optimism=optimism)


@recipe
def optimistic_adam(
    lr: float = 1e-3,
    mom: float = 0.9,
    sqr_mom: float = 0.999,
    eps: float = 1e-8,
    optimism: float = 1.0,
) -> Chain:
    """Adam that expects its update to change again as it has just changed: for games.

    param = param - lr * (update + optimism * (update - last_update)), with the update of adam

    optax adds Nesterov momentum unless it is told nesterov=False; the paper has none.

    Source: Daskalakis et al. 2018 (ICLR), algorithm 1; numbers of
    optax.optimistic_adam_v2(nesterov=False).

    >>> print(*[rule.name for rule in optimistic_adam().rules])
    average_grad average_sqr_grad debias scale_by_rms optimistic sgd_step
    """
    look = rename(optimistic, grad="update", last_grad="last_update")
    parts = (average_grad, average_sqr_grad, debias, scale_by_rms, look, sgd_step)
    return chain(*parts, lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, optimism=optimism)
