"""Recipes: each returns a chain, with the hypers of its paper as keywords. A chain expression is
all there is to one.

`wd=None` leaves weight decay out. Where a recipe is in torch.optim, its numbers and its kind of
decay are torch's; for the other kind, put the other rule in front: `chain(weight_decay, radam(),
wd=0.01)`.
"""

from functional_sgd import rules
from functional_sgd.chaining import Chain, chain
from functional_sgd.rule import Rule
from functional_sgd.rules import (
    average_grad,
    average_sqr_grad,
    debias,
    heavy_ball,
    scale_by_rms,
    sgd_step,
)
from functional_sgd.trial import rename
from functional_sgd.wrappers.lookahead import lookahead


def sgd(
    lr: float = 1e-3,
    mom: float | None = None,
    nesterov: bool = False,
    dampening: float | None = None,
    wd: float | None = None,
) -> Chain:
    """Stochastic gradient descent; with `mom`, torch.optim.SGD's (undampened) momentum. `wd` is an
    L2 penalty.

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
        return chain(*_l2(wd), sgd_step, **_given(lr=lr, wd=wd))
    damped = [rules.dampen] if dampening else []
    ahead = [rules.nesterov] if nesterov else []
    given = _given(lr=lr, mom=mom, dampening=dampening or None, wd=wd)
    return chain(*_l2(wd), *damped, heavy_ball, *ahead, sgd_step, **given)


def momentum(lr: float = 1e-3, mom: float = 0.9) -> Chain:
    """SGD along the running mean of the gradients (dampened: the mean stays on the gradient's
    scale).

    >>> momentum(lr=0.1)
    chain(average_grad, sgd_step, lr=0.1, mom=0.9)
    """
    return chain(average_grad, sgd_step, lr=lr, mom=mom)


def rmsprop(
    lr: float = 1e-2,
    sqr_mom: float = 0.99,
    eps: float = 1e-8,
    mom: float | None = None,
    centered: bool = False,
    wd: float | None = None,
) -> Chain:
    """SGD with the speed of every direction made equal. `mom` acts on the scaled update and `wd` is
    L2, as in torch.

    Source: Hinton, lecture 6e; numbers of torch.optim.RMSprop.

    >>> rmsprop(lr=0.1)
    chain(average_sqr_grad, scale_by_rms, sgd_step, lr=0.1, sqr_mom=0.99, eps=1e-08)
    """
    middle = [rules.center] if centered else []
    ball = [] if mom is None else [rename(heavy_ball, grad="update")]
    given = _given(lr=lr, sqr_mom=sqr_mom, eps=eps, mom=mom, wd=wd)
    return chain(*_l2(wd), average_sqr_grad, *middle, scale_by_rms, *ball, sgd_step, **given)


def adam(
    lr: float = 1e-3,
    mom: float = 0.9,
    sqr_mom: float = 0.999,
    eps: float = 1e-8,
    wd: float | None = None,
) -> Chain:
    """Momentum's and RMSProp's rules, and debias. `wd` is L2, as in torch.optim.Adam; adamw has the
    other kind.

    Source: Kingma and Ba 2015; numbers of torch.optim.Adam.

    >>> print(*adam().rules)
    average_grad average_sqr_grad debias scale_by_rms sgd_step
    """
    given = _given(lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)
    return chain(*_l2(wd), average_grad, average_sqr_grad, debias, scale_by_rms, sgd_step, **given)


def adamw(
    lr: float = 1e-3, mom: float = 0.9, sqr_mom: float = 0.999, eps: float = 1e-8, wd: float = 1e-2
) -> Chain:
    """Adam after decoupled weight decay.

    Source: Loshchilov and Hutter 2019; numbers of torch.optim.AdamW.

    >>> print(*adamw().rules)
    weight_decay average_grad average_sqr_grad debias scale_by_rms sgd_step
    """
    return chain(rules.weight_decay, adam(lr, mom, sqr_mom, eps), wd=wd)


def radam(
    lr: float = 1e-3,
    mom: float = 0.9,
    sqr_mom: float = 0.999,
    eps: float = 1e-8,
    wd: float | None = None,
) -> Chain:
    """Adam that does not trust its averages until it has seen enough gradients. `wd` is L2, as in
    torch.optim.RAdam.

    Source: Liu et al. 2020; numbers of torch.optim.RAdam. With `rectify` in place of
    `rectify_eps_early`, fastai's.

    >>> print(*radam().rules)
    average_grad average_sqr_grad debias rectify_eps_early sgd_step
    """
    given = _given(lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)
    return chain(
        *_l2(wd), average_grad, average_sqr_grad, debias, rules.rectify_eps_early, sgd_step, **given
    )


def qhadam(
    lr: float = 1e-3,
    mom: float = 0.999,
    sqr_mom: float = 0.999,
    nu_1: float = 0.7,
    nu_2: float = 1.0,
    eps: float = 1e-8,
    wd: float = 0.0,
) -> Chain:
    """Adam that mixes its averages with the gradient of the moment; decoupled weight decay.

    Source: Ma and Yarats 2019; numbers of fastai.

    >>> print(*qhadam().rules)
    weight_decay average_grad average_sqr_grad debias quasi_hyperbolic scale_by_rms sgd_step
    """
    parts = (average_grad, average_sqr_grad, debias, rules.quasi_hyperbolic, scale_by_rms, sgd_step)
    return chain(
        rules.weight_decay,
        *parts,
        lr=lr,
        mom=mom,
        sqr_mom=sqr_mom,
        nu_1=nu_1,
        nu_2=nu_2,
        eps=eps,
        wd=wd,
    )


def larc(
    lr: float = 1e-3,
    mom: float = 0.9,
    trust_coeff: float = 0.02,
    eps: float = 1e-8,
    wd: float = 0.0,
) -> Chain:
    """SGD with momentum in which no layer moves far for its size; decoupled weight decay.

    Source: You et al. 2017; numbers of fastai. With `lars_ratio` in place of `larc_ratio`, LARS.

    >>> print(*larc().rules)
    weight_decay heavy_ball larc_ratio sgd_step
    """
    parts = (rules.weight_decay, heavy_ball, rules.larc_ratio, sgd_step)
    return chain(*parts, lr=lr, mom=mom, trust_coeff=trust_coeff, eps=eps, wd=wd)


def lamb(
    lr: float = 1e-3,
    mom: float = 0.9,
    sqr_mom: float = 0.99,
    eps: float = 1e-5,
    max_trust: float = 10.0,
    wd: float = 0.0,
) -> Chain:
    """Adam in which every layer moves in proportion to its size; decoupled weight decay, outside
    the ratio.

    Source: You et al. 2020; numbers of fastai.

    >>> print(*lamb().rules)
    weight_decay average_grad average_sqr_grad debias scale_by_rms trust_ratio sgd_step
    """
    parts = (average_grad, average_sqr_grad, debias, scale_by_rms, rules.trust_ratio, sgd_step)
    return chain(
        rules.weight_decay,
        *parts,
        lr=lr,
        mom=mom,
        sqr_mom=sqr_mom,
        eps=eps,
        max_trust=max_trust,
        wd=wd,
    )


def ranger(
    lr: float = 1e-3,
    mom: float = 0.95,
    sqr_mom: float = 0.99,
    eps: float = 1e-6,
    wd: float = 0.01,
    sync_every: int = 6,
    slow_step: float = 0.5,
) -> Chain:
    """RAdam with decoupled weight decay, inside Lookahead.

    Source: Wright 2019; numbers of fastai.

    >>> print(*ranger().rules)
    weight_decay average_grad average_sqr_grad debias rectify sgd_step sync_slow_params
    """
    parts = (rules.weight_decay, average_grad, average_sqr_grad, debias, rules.rectify, sgd_step)
    inner = chain(*parts, lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)
    return lookahead(inner, sync_every=sync_every, slow_step=slow_step)


def lion(lr: float = 1e-4, mom: float = 0.9, slow_mom: float = 0.99, wd: float = 0.0) -> Chain:
    """Steps of equal size in the direction on which gradient and average agree; decoupled weight
    decay.

    Choose lr 3 to 10 times smaller, and wd as much larger, than for adamw. Source: Chen et al.
    2023.

    >>> print(*lion().rules)
    weight_decay sign_of_average sgd_step
    """
    parts = (rules.weight_decay, rules.sign_of_average, sgd_step)
    return chain(*parts, lr=lr, mom=mom, slow_mom=slow_mom, wd=wd)


def _l2(wd: float | None) -> list[Rule]:
    return [] if wd is None else [rules.l2_reg]


def _given(**hypers: float | None) -> dict[str, float]:
    return {name: value for name, value in hypers.items() if value is not None}
