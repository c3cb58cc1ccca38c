"""Optimizers that need no rate that falls: they evaluate an average of their steps."""

from functional_sgd.catalogue.parts import recipe
from functional_sgd.chaining import Chain, chain
from functional_sgd.rules import (
    average_sqr_grad,
    rectify_lr,
    scale_by_debiased_rms,
    sgd_step,
    step_from_fast,
    train_between,
    weigh_steps,
)
from functional_sgd.trial import rename
from functional_sgd.wrappers import schedule_free

__all__ = ["schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"]


@recipe
def schedule_free_adamw(
    lr: float = 2.5e-3, mom: float = 0.9, sqr_mom: float = 0.999, eps: float = 1e-8, wd: float = 0.0
) -> Chain:
    """Adam with schedule-free averaging in the place of momentum, and decoupled weight decay.

    Source: Defazio et al. 2024; numbers of schedulefree.AdamWScheduleFree without warm-up.

    >>> schedule_free_adamw(lr=0.01).hyper
    {'lr': 0.01, 'lr_power': 2.0, 'wd': 0.0, 'sqr_mom': 0.999, 'eps': 1e-08, 'mom': 0.9}
    """
    inner = chain(
        average_sqr_grad, scale_by_debiased_rms, sgd_step, lr=lr, sqr_mom=sqr_mom, eps=eps
    )
    return schedule_free(inner, mom=mom, wd=wd)


@recipe
def schedule_free_sgd(lr: float = 1.0, mom: float = 0.9, wd: float = 0.0) -> Chain:
    """SGD with schedule-free averaging in the place of momentum.

    `wd` is an L2 penalty where the gradient is taken.

    Source: Defazio et al. 2024; numbers of schedulefree.SGDScheduleFree without warm-up.

    >>> schedule_free_sgd(lr=0.5).hyper
    {'lr': 0.5, 'lr_power': 2.0, 'wd': 0.0, 'mom': 0.9}
    """
    return schedule_free(chain(sgd_step, lr=lr), mom=mom, wd=wd)


@recipe
def schedule_free_radam(
    lr: float = 2.5e-3, mom: float = 0.9, sqr_mom: float = 0.999, eps: float = 1e-8, wd: float = 0.0
) -> Chain:
    """schedule_free_adamw whose lr rises by itself as its mean square can be trusted: it needs no
    warm-up.

    rate = nu * lr, with nu of RAdam;  0 in the first steps (four for sqr_mom = 0.999), which only
    fill the mean square

    Source: Defazio et al. 2024; Liu et al. 2020; numbers of schedulefree.RAdamScheduleFree with
    silent_sgd_phase=True, its default.

    >>> print(*schedule_free_radam().rules[:2])
    rectify_lr rename(weigh_steps, lr='rate')
    >>> print(*schedule_free_radam().rules[3:5])
    average_sqr_grad scale_by_debiased_rms
    """
    # Weighed by the rate as well, the steps that do not move anything have no share in the average.
    front = (rectify_lr, rename(weigh_steps, lr="rate"), rename(step_from_fast, lr="rate"))
    inner = (average_sqr_grad, scale_by_debiased_rms, rename(sgd_step, lr="rate"))
    hypers = dict(mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)
    return chain(*front, *inner, train_between, lr=lr, **hypers)
