"""Adam's kin: what is averaged, what it is divided by, or what is made of the update, is another
thing than in Adam. All have decoupled weight decay, unless they say what else.
"""

from functional_sgd.catalogue.parts import given, l2, recipe
from functional_sgd.chaining import Chain, chain
from functional_sgd.rules import (
    add_average_difference,
    add_weighted,
    average_difference,
    average_grad,
    average_sqr_error,
    average_sqr_grad,
    average_sqr_grad_additive,
    average_sqr_grad_from_first,
    bound_rate,
    clip_growing,
    debias,
    debias_ahead,
    heavy_ball,
    l2_reg,
    limit_by_rms,
    normalize_by_past_rms,
    project_radial,
    proximal_decay,
    scale_by_past_rms,
    scale_by_rms,
    sgd_step,
    sqr_ratio,
    weight_decay,
)
from functional_sgd.trial import rename

__all__ = [
    "acprop",
    "adabelief",
    "adabound",
    "adamp",
    "adan",
    "ademamix",
    "adopt",
    "laprop",
    "nadamw",
    "simplified_ademamix",
    "stable_adamw",
    "yogi",
]


@recipe
def adabelief(
    lr: float = 1e-3,
    mom: float = 0.9,
    sqr_mom: float = 0.999,
    eps: float = 1e-16,
    eps_root: float = 1e-16,
    wd: float = 0.0,
) -> Chain:
    """Adam that divides by how far gradients are from their average, not by how large they are.

    sqr_avg = sqr_mom * sqr_avg + (1 - sqr_mom) * (grad - grad_avg)**2 + eps_root

    Source: Zhuang et al. 2020 (NeurIPS); numbers of optax.adabelief, which are those of its authors
    (their eps is both eps and eps_root).

    >>> print(*adabelief().rules)
    weight_decay average_grad average_sqr_error debias scale_by_rms sgd_step
    """
    parts = (weight_decay, average_grad, average_sqr_error, debias, scale_by_rms, sgd_step)
    return chain(*parts, lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, eps_root=eps_root, wd=wd)


@recipe
def acprop(
    lr: float = 1e-3,
    mom: float = 0.9,
    sqr_mom: float = 0.999,
    eps: float = 1e-16,
    eps_root: float = 1e-16,
    wd: float = 0.0,
) -> Chain:
    """AdaBelief that divides the gradient, not its average, by a mean that does not know it yet.

    update = grad / (sqrt(sqr_avg of the step before) + eps), and grad itself in the first step

    Source: Zhuang et al. 2021 (NeurIPS); numbers of its authors' code with rectify=False.
    optax.contrib.acprop differs: it takes errors from the average before this gradient.

    >>> print(*acprop().rules)
    weight_decay average_grad scale_by_past_rms average_sqr_error sgd_step
    """
    parts = (weight_decay, average_grad, scale_by_past_rms, average_sqr_error, sgd_step)
    return chain(*parts, lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, eps_root=eps_root, wd=wd)


@recipe
def yogi(
    lr: float = 1e-2, mom: float = 0.9, sqr_mom: float = 0.999, eps: float = 1e-3, wd: float = 0.0
) -> Chain:
    """Adam whose mean square falls slowly, so that a rare large gradient is not forgotten soon.

    sqr_avg = sqr_avg - (1 - sqr_mom) * sign(sqr_avg - grad**2) * grad**2, from 1e-6 on

    Source: Zaheer et al. 2018 (NeurIPS); numbers of optax.yogi but for one: the average of the
    gradient starts at 0 here and in the paper, at 1e-6 there.

    >>> print(*yogi().rules)
    weight_decay average_grad average_sqr_grad_additive debias scale_by_rms sgd_step
    """
    parts = (weight_decay, average_grad, average_sqr_grad_additive, debias, scale_by_rms, sgd_step)
    return chain(*parts, lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)


@recipe
def adan(
    lr: float = 1e-3,
    mom: float = 0.98,
    diff_mom: float = 0.92,
    sqr_mom: float = 0.99,
    eps: float = 1e-8,
    wd: float = 0.0,
) -> Chain:
    """Adam with an average of how the gradient changes, which looks ahead as Nesterov's momentum
    does.

    update = (grad_avg + diff_mom * diff_avg) / (sqrt(sqr_avg) + eps), all debiased;  sqr_avg is of
    grad + diff_mom * (grad - last_grad)

    The decay is proximal: param / (1 + lr * wd), after the step. Source: Xie et al. 2022; numbers
    of its authors' code, whose betas are mom, diff_mom and sqr_mom (in the paper, 1 minus these).
    optax.adan differs: it weighs differences by 1 - diff_mom.

    >>> print(*adan().rules[:4])
    average_difference average_grad rename(average_sqr_grad, grad='ahead') debias
    >>> print(*adan().rules[4:])
    add_average_difference scale_by_rms sgd_step proximal_decay
    """
    moments = (average_difference, average_grad, rename(average_sqr_grad, grad="ahead"), debias)
    parts = (*moments, add_average_difference, scale_by_rms, sgd_step, proximal_decay)
    return chain(*parts, lr=lr, mom=mom, diff_mom=diff_mom, sqr_mom=sqr_mom, eps=eps, wd=wd)


@recipe
def ademamix(
    lr: float = 1e-3,
    mom: float = 0.9,
    sqr_mom: float = 0.999,
    slow_mom: float = 0.9999,
    alpha: float = 5.0,
    eps: float = 1e-8,
    wd: float = 0.0,
) -> Chain:
    """Adam with a second, very slow average of the gradient, which is not debiased.

    update = (grad_avg + alpha * slow_avg) / (sqrt(sqr_avg) + eps), grad_avg and sqr_avg debiased

    The paper lets alpha rise from 0, and slow_mom from mom, over the whole training:
    `scheduled(ademamix(), steps=..., alpha=..., slow_mom=...)`. Source: Pagliardini et al. 2024;
    numbers of optax.contrib.ademamix; alpha is 2 in its authors' code.

    >>> print(*ademamix().rules[:2])
    weight_decay rename(average_grad, grad_avg='slow_avg', mom='slow_mom')
    >>> print(*ademamix().rules[2:-2])
    average_grad average_sqr_grad debias rename(add_weighted, other='slow_avg')
    """
    # In front of the fast average: both write the update, and debias divides it as the fast one.
    slow = rename(average_grad, grad_avg="slow_avg", mom="slow_mom")
    add_slow = rename(add_weighted, other="slow_avg")
    parts = (weight_decay, slow, average_grad, average_sqr_grad, debias, add_slow, scale_by_rms)
    hypers = dict(mom=mom, sqr_mom=sqr_mom, slow_mom=slow_mom, alpha=alpha, eps=eps)
    return chain(*parts, sgd_step, lr=lr, **hypers, wd=wd)


@recipe
def simplified_ademamix(
    lr: float = 1e-3,
    mom: float = 0.99,
    sqr_mom: float = 0.95,
    alpha: float = 0.0,
    eps: float = 1e-8,
    wd: float = 0.0,
) -> Chain:
    """AdEMAMix with one average: momentum that is not dampened, and the gradient on top of it.

    update = (velocity + alpha * grad) / (sqrt(sqr_avg) + eps), sqr_avg debiased

    Updates are up to 1 / (1 - mom) + alpha times as long as Adam's: choose lr so much smaller.
    Source: Morwani et al. 2025; numbers of optax.contrib.simplified_ademamix.

    >>> print(*simplified_ademamix().rules[:3])
    weight_decay heavy_ball rename(add_weighted, other='grad')
    >>> print(*simplified_ademamix().rules[3:])
    average_sqr_grad debias scale_by_rms sgd_step
    """
    add_grad = rename(add_weighted, other="grad")
    parts = (weight_decay, heavy_ball, add_grad, average_sqr_grad, debias, scale_by_rms, sgd_step)
    return chain(*parts, lr=lr, mom=mom, sqr_mom=sqr_mom, alpha=alpha, eps=eps, wd=wd)


@recipe
def adopt(
    lr: float = 1e-3,
    mom: float = 0.9,
    sqr_mom: float = 0.9999,
    eps: float = 1e-6,
    clip_power: float = 0.25,
    wd: float | None = None,
) -> Chain:
    """Adam that converges for every sqr_mom: it divides each gradient by a mean that does not know
    it yet, before momentum, and clips it. `wd` is L2.

    update = average of clamp(grad / max(sqrt(sqr_avg of the step before), eps), -c, c)
    c = (step - 1)**clip_power

    The first step only fills sqr_avg. Source: Taniguchi et al. 2024 (NeurIPS); numbers of its
    authors' code and of optax.contrib.adopt; pytorch_optimizer has c = step**clip_power.

    >>> print(*adopt().rules[:3])
    normalize_by_past_rms clip_growing rename(average_grad, grad='update')
    >>> print(*adopt().rules[3:])
    average_sqr_grad_from_first sgd_step
    """
    average = rename(average_grad, grad="update")
    parts = (normalize_by_past_rms, clip_growing, average, average_sqr_grad_from_first, sgd_step)
    hypers = given(lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, clip_power=clip_power, wd=wd)
    return chain(*l2(wd), *parts, **hypers)


@recipe
def laprop(
    lr: float = 4e-4, mom: float = 0.9, sqr_mom: float = 0.999, eps: float = 1e-15, wd: float = 0.0
) -> Chain:
    """Adam's rules in another order: first divide the gradient, then average.

    update = average of grad / (sqrt(sqr_avg) + eps), both debiased

    Weight decay comes after the step. Source: Ziyin et al. 2020; numbers of its authors' code while
    lr stays the same (they average lr * grad / ..., and their decay is not multiplied by lr).

    >>> print(*laprop().rules[:4])
    average_sqr_grad debias scale_by_rms rename(average_grad, grad='update')
    >>> print(*laprop().rules[4:])
    debias sgd_step weight_decay
    """
    # The first debias finds the squares alone. The second is for the average; nobody reads what it
    # does to the squares.
    scaled = (average_sqr_grad, debias, scale_by_rms)
    parts = (*scaled, rename(average_grad, grad="update"), debias, sgd_step, weight_decay)
    return chain(*parts, lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)


@recipe
def adabound(
    lr: float = 1e-3,
    mom: float = 0.9,
    sqr_mom: float = 0.999,
    eps: float = 1e-8,
    final_scale: float = 100.0,
    gamma: float = 1e-3,
    wd: float | None = None,
) -> Chain:
    """Adam that becomes SGD: the speeds of all elements are kept within bounds, which close in on
    one speed. `wd` is L2.

    update = clamp(Adam's scale, low, high) * grad_avg;  low and high go to final_scale, the faster
    the larger gamma

    Source: Luo et al. 2019 (ICLR); numbers of its authors' code (its final_lr: final_scale * lr).

    >>> print(*adabound().rules)
    average_grad average_sqr_grad bound_rate sgd_step
    """
    hypers = given(
        lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, final_scale=final_scale, gamma=gamma, wd=wd
    )
    return chain(*l2(wd), average_grad, average_sqr_grad, bound_rate, sgd_step, **hypers)


@recipe
def adamp(
    lr: float = 1e-3,
    mom: float = 0.9,
    sqr_mom: float = 0.999,
    eps: float = 1e-8,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    wd: float = 0.0,
) -> Chain:
    """Adam that does not let momentum lengthen weights whose length has no effect, such as those
    before a normalization.

    update = the part of Adam's that is orthogonal to the weights, where the gradient is; these
    weights have wd_ratio * wd as their decay

    Source: Heo et al. 2021 (ICLR); numbers of its authors' code without nesterov.

    >>> print(*adamp().rules)
    average_grad average_sqr_grad debias scale_by_rms project_radial sgd_step
    """
    # No weight_decay: how much is decayed depends on what is projected, so project_radial does
    # both.
    parts = (average_grad, average_sqr_grad, debias, scale_by_rms, project_radial, sgd_step)
    hypers = dict(mom=mom, sqr_mom=sqr_mom, eps=eps, delta=delta, wd_ratio=wd_ratio)
    return chain(*parts, lr=lr, **hypers, wd=wd)


@recipe
def stable_adamw(
    lr: float = 1e-3, mom: float = 0.9, sqr_mom: float = 0.99, eps: float = 1e-8, wd: float = 1e-2
) -> Chain:
    """AdamW that slows a leaf down while its gradients are larger than what they are divided by, as
    Adafactor does: no gradient clipping is needed.

    lr of a leaf = lr / max(1, sqrt(mean of grad**2 / max(sqr_avg, eps**2)))

    The decay is slowed down likewise. Source: Wortsman et al. 2023 (NeurIPS); numbers of
    pytorch_optimizer.StableAdamW. sqr_mom is 0.99 there and in optimi, whose eps is 1e-6.

    >>> print(*stable_adamw().rules[:4])
    average_grad average_sqr_grad debias scale_by_rms
    >>> print(*stable_adamw().rules[4:])
    rename(l2_reg, grad='update') sqr_ratio limit_by_rms sgd_step
    """
    # l2_reg of the update is decoupled decay, which limit_by_rms slows down together with the rest.
    moments = (average_grad, average_sqr_grad, debias, scale_by_rms)
    parts = (*moments, rename(l2_reg, grad="update"), sqr_ratio, limit_by_rms, sgd_step)
    return chain(*parts, lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)


@recipe
def nadamw(
    lr: float = 1e-3, mom: float = 0.9, sqr_mom: float = 0.999, eps: float = 1e-8, wd: float = 1e-4
) -> Chain:
    """AdamW with Nesterov's momentum: it moves along the average as it would be one step ahead.

    update = mom * grad_avg / (1 - mom**(step + 1)) + (1 - mom) * grad / (1 - mom**step), divided as
    in Adam

    Source: Dozat 2016; numbers of optax.nadamw. torch.optim.NAdam has a momentum that grows with
    the steps.

    >>> print(*nadamw().rules)  # debias in front of the average corrects sqr_avg alone
    weight_decay average_sqr_grad debias average_grad debias_ahead scale_by_rms sgd_step
    """
    moments = (average_sqr_grad, debias, average_grad, debias_ahead, scale_by_rms)
    return chain(weight_decay, *moments, sgd_step, lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)
