"""The first optimizers with a rate for each element, and averaged gradient descent."""

from functional_sgd.catalogue.parts import given, l2, recipe
from functional_sgd.chaining import Chain, chain
from functional_sgd.rules import (
    average_late,
    average_sqr_grad,
    bottou_rate,
    decay_rate,
    l2_reg,
    resilient_step,
    scale_by_past_updates,
    scale_by_rms,
    scale_by_rms_eps_inside,
    sgd_step,
    sum_sqr_grad,
)
from functional_sgd.trial import rename

__all__ = ["adadelta", "adagrad", "asgd", "rprop"]


@recipe
def adagrad(
    lr: float = 1e-2,
    eps: float = 1e-10,
    lr_decay: float | None = None,
    first_sum: float = 0.0,
    wd: float | None = None,
) -> Chain:
    """SGD with each direction divided by the root of all its squared gradients. `wd` is L2, as in
    torch.optim.Adagrad.

    The sums begin with `first_sum` (initial_accumulator_value in torch). Source: Duchi et al. 2011;
    numbers of torch.optim.Adagrad.

    >>> print(*adagrad().rules)
    sum_sqr_grad rename(scale_by_rms, sqr_avg='sqr_sum') sgd_step
    """
    slower = [] if lr_decay is None else [decay_rate]
    parts = (sum_sqr_grad, rename(scale_by_rms, sqr_avg="sqr_sum"), *slower, sgd_step)
    hypers = given(lr=lr, eps=eps, lr_decay=lr_decay, first_sum=first_sum, wd=wd)
    return chain(*l2(wd), *parts, **hypers)


@recipe
def adadelta(
    lr: float = 1.0, sqr_mom: float = 0.9, eps: float = 1e-6, wd: float | None = None
) -> Chain:
    """RMSProp whose steps have the size of past steps, so that no rate is needed. `wd` is L2, as in
    torch.optim.Adadelta.

    The paper's rho is `sqr_mom`. Source: Zeiler 2012; numbers of torch.optim.Adadelta.

    >>> print(*adadelta().rules)
    average_sqr_grad scale_by_rms_eps_inside scale_by_past_updates sgd_step
    """
    parts = (average_sqr_grad, scale_by_rms_eps_inside, scale_by_past_updates, sgd_step)
    return chain(*l2(wd), *parts, **given(lr=lr, sqr_mom=sqr_mom, eps=eps, wd=wd))


@recipe
def rprop(
    lr: float = 1e-2,
    shrink: float = 0.5,
    grow: float = 1.2,
    min_size: float = 1e-6,
    max_size: float = 50.0,
) -> Chain:
    """Steps by the sign of the gradient, each element with a length of its own. For whole data
    sets.

    `lr` is the length of the first step, and later ones do not read it. Source: Riedmiller and
    Braun 1993; numbers of torch.optim.Rprop, whose etas are (shrink, grow).

    >>> print(*rprop().rules)
    resilient_step
    """
    return chain(
        resilient_step, lr=lr, shrink=shrink, grow=grow, min_size=min_size, max_size=max_size
    )


@recipe
def asgd(
    lr: float = 1e-2,
    lambd: float = 1e-4,
    power: float = 0.75,
    average_from: float = 1e6,
    wd: float | None = None,
) -> Chain:
    """SGD with an L2 penalty and a falling rate, whose params are averaged from a late step on.

    The average is what is evaluated: `opt.evaluated(params, state)`, and `fit` does it by itself.
    `wd` is an L2 penalty too, but one that the rate does not depend on.

    Source: Polyak and Juditsky 1992; Bottou 2012; numbers of torch.optim.ASGD (t0 is
    `average_from`, alpha is `power`), where a new lr is heeded one step later, and scalars are kept
    in torch's default dtype.

    >>> print(*asgd().rules)
    rename(l2_reg, wd='lambd') bottou_rate sgd_step average_late
    """
    penalty = rename(l2_reg, wd="lambd")
    hypers = given(lr=lr, lambd=lambd, power=power, average_from=average_from, wd=wd)
    return chain(*l2(wd), penalty, bottou_rate, sgd_step, average_late, **hypers)
