"""Gradient descent with other momentum than Polyak's: mixed, several, or by the landscape."""

from functional_sgd import rules
from functional_sgd.catalogue.parts import given, l2, recipe
from functional_sgd.chaining import Chain, chain
from functional_sgd.rules import (
    accelerated_step,
    add_weighted,
    average_by_turns,
    average_difference,
    average_grad,
    average_sqr_grad,
    average_with_inertia,
    debias,
    heavy_ball,
    mix_grad,
    project_radial,
    scale_by,
    sgd_step,
    weight_decay,
)
from functional_sgd.trial import rename

__all__ = ["accsgd", "adai", "aggmo", "pid", "pnm", "qhm", "sgdp"]


@recipe
def qhm(lr: float = 1e-3, mom: float = 0.999, nu: float = 0.7, wd: float | None = None) -> Chain:
    """SGD along a mixture of the gradient and its running mean. `wd` is L2.

    update = (1 - nu) * grad + nu * grad_avg

    nu = 1 is `momentum`; nu = mom is Nesterov's. Source: Ma and Yarats 2019 (ICLR), with its
    defaults; numbers of pytorch_optimizer.QHM, which has momentum=0 and nu=1.

    >>> print(*qhm().rules)
    average_grad mix_grad sgd_step
    """
    hypers = given(lr=lr, mom=mom, nu=nu, wd=wd)
    return chain(*l2(wd), average_grad, mix_grad, sgd_step, **hypers)


@recipe
def aggmo(
    lr: float = 1e-3, mom: float = 0.9, slow_mom: float = 0.99, wd: float | None = None
) -> Chain:
    """SGD along the mean of the gradient and of two velocities, a faster one that holds back
    what a slower one would do too much of. `wd` is L2.

    update = (grad + velocity + slow_velocity) / 3, velocities of mom and of slow_mom

    The authors' form for three momenta, the first of them 0. Source: Lucas et al. 2019 (ICLR);
    numbers of pytorch_optimizer.AggMo(betas=(0, mom, slow_mom)).

    >>> print(*[rule.name for rule in aggmo().rules])
    heavy_ball heavy_ball add_weighted add_weighted scale_by sgd_step
    """
    slow = rename(heavy_ball, velocity="slow_velocity", mom="slow_mom")
    others = [rename(add_weighted, other=name) for name in ("slow_velocity", "grad")]
    parts = (slow, heavy_ball, *others, rename(scale_by, factor="share"), sgd_step)
    return chain(*l2(wd), *parts, share=1 / 3, **given(lr=lr, mom=mom, slow_mom=slow_mom, wd=wd))


@recipe
def pid(
    lr: float = 1e-3,
    mom: float = 0.9,
    integral: float = 5.0,
    derivative: float = 10.0,
    wd: float | None = None,
) -> Chain:
    """SGD as a controller: it goes by the gradient, by the sum of those before, and by how they
    change. `wd` is L2.

    update = grad + integral * velocity + derivative * average of (grad - last_grad)

    Source: An et al. 2018 (CVPR); numbers of pytorch_optimizer.PID(momentum=mom), whose momentum
    is 0 where nothing is said: then it is plain SGD.

    >>> print(*[rule.name for rule in pid().rules])
    heavy_ball average_difference add_weighted add_weighted sgd_step
    """
    # The update stays the gradient, to which the sums are added.
    ball = rename(heavy_ball, update="ball")
    change = rename(average_difference, diff_mom="mom")
    sums = (
        rename(add_weighted, other="velocity", alpha="integral"),
        rename(add_weighted, other="diff_avg", alpha="derivative"),
    )
    hypers = given(lr=lr, mom=mom, integral=integral, derivative=derivative, wd=wd)
    return chain(*l2(wd), ball, change, *sums, sgd_step, **hypers)


@recipe
def pnm(lr: float = 1e-3, mom: float = 0.9, contrast: float = 1.0, wd: float = 0.0) -> Chain:
    """SGD along the difference of two averages of every other gradient each: more noise, which
    finds flatter optima, at the same mean; decoupled weight decay.

    update = ((1 + contrast) * average - contrast * last_average) / its length for noise alone

    Source: Xie et al. 2021 (ICML), positive-negative momentum; numbers of pytorch_optimizer.PNM,
    whose betas are mom and contrast.

    >>> print(*pnm().rules)
    weight_decay average_by_turns sgd_step
    """
    parts = (weight_decay, average_by_turns, sgd_step)
    return chain(*parts, lr=lr, mom=mom, contrast=contrast, wd=wd)


@recipe
def adai(
    lr: float = 1e-3,
    looseness: float = 0.1,
    sqr_mom: float = 0.99,
    eps: float = 1e-3,
    wd: float | None = None,
) -> Chain:
    """SGD whose momentum is adaptive, not its rate: the less steep a direction, the more inertia.
    `wd` is L2; for decoupled decay, as in the authors' AdaiS, put `weight_decay` in front.

    mom = 1 - looseness * sqr_avg / (mean of sqr_avg over all leaves), cut to [0, 1 - eps]

    Source: Xie et al. 2022 (ICML); numbers of its authors' code, and of pytorch_optimizer.Adai
    while the mean of the squared gradients is at least eps, its least divisor.

    >>> print(*adai().rules)
    average_sqr_grad debias average_with_inertia sgd_step
    """
    parts = (average_sqr_grad, debias, average_with_inertia, sgd_step)
    hypers = given(lr=lr, looseness=looseness, sqr_mom=sqr_mom, eps=eps, wd=wd)
    return chain(*l2(wd), *parts, **hypers)


@recipe
def accsgd(
    lr: float = 1e-3,
    stretch: float = 1000.0,
    advantage: float = 10.0,
    caution: float = 0.7,
    wd: float | None = None,
) -> Chain:
    """SGD with the acceleration that can be proved for least squares with noise. `wd` is L2.

    Short steps, drawn to where steps stretch / caution times as long are going on average: the
    formula is that of `accelerated_step`.

    Source: Jain et al. 2018 (COLT); Kidambi et al. 2018 (ICLR), whose names are kappa, xi and a
    constant of 0.7; numbers of pytorch_optimizer.AccSGD, which is their code.

    >>> print(*accsgd().rules)
    accelerated_step
    """
    hypers = given(lr=lr, stretch=stretch, advantage=advantage, caution=caution, wd=wd)
    return chain(*l2(wd), accelerated_step, **hypers)


@recipe
def sgdp(
    lr: float = 1e-3,
    mom: float = 0.9,
    nesterov: bool = False,
    eps: float = 1e-8,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    wd: float = 0.0,
) -> Chain:
    """SGD that does not let momentum lengthen weights whose length has no effect, such as those
    before a normalization.

    update = the part of momentum's that is orthogonal to the weights, where the gradient is; these
    weights have wd_ratio * wd as their decay

    The authors divide wd by 1 - mom, which is to be done by hand here: a schedule of mom would
    change the decay. Source: Heo et al. 2021 (ICLR); numbers of pytorch_optimizer.SGDP, with its
    weight_decay / (1 - momentum) as wd.

    >>> print(*sgdp().rules)
    heavy_ball project_radial sgd_step
    """
    ahead = [rules.nesterov] if nesterov else []
    hypers = dict(lr=lr, mom=mom, eps=eps, delta=delta, wd_ratio=wd_ratio, wd=wd)
    return chain(heavy_ball, *ahead, project_radial, sgd_step, **hypers)
