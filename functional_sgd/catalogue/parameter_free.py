"""Optimizers that find the learning rate themselves: by distances and gradients, or by the loss.

Those that measure how far the parameters have come (prodigy, dog, dowg) begin with steps of 1e-6 or
so, which parameters in bfloat16 lose in rounding: they never move, and no estimate grows. Keep such
parameters in float32, or end the chain with `round_stochastically`.
"""

from functional_sgd.catalogue.parts import given, l2, recipe
from functional_sgd.chaining import Chain, chain
from functional_sgd.rule import Rule
from functional_sgd.rules import (
    add_up_dot,
    add_up_grad,
    average_dot,
    average_grad,
    average_grad_from_first,
    average_loss,
    average_loss_from_first,
    average_progress,
    average_sqr_grad,
    bet_coins,
    compare_squares,
    compare_with_slope,
    compare_with_slope_length,
    divide_by_first_norm,
    dog_ratio,
    dowg_ratio,
    estimate_distance,
    limit_growth,
    momo_ratio,
    polyak_ratio,
    proximal_decay,
    rate_by_distance,
    scale_by,
    scale_by_debiased_rms,
    scale_by_distance_rms,
    scale_by_rms,
    sgd_step,
    step_from_start,
    take_step,
    track_slope,
    weigh_by_sqr_sum,
    weigh_slope,
    weight_decay,
)
from functional_sgd.trial import rename

__all__ = [
    "cocob",
    "d_adapt_adagrad",
    "d_adapt_adam",
    "d_adapt_sgd",
    "dog",
    "dowg",
    "momo",
    "momo_adam",
    "polyak_sgd",
    "prodigy",
]

_TIMES_RATE = rename(scale_by, update="grad", factor="rate")
_DECAY_BY_RATE = rename(weight_decay, lr="rate")
_STEP_BY_RATE = rename(sgd_step, lr="rate")


@recipe
def prodigy(
    lr: float = 1.0,
    mom: float = 0.9,
    sqr_mom: float = 0.999,
    slope_mom: float | None = None,
    eps: float = 1e-8,
    wd: float | None = None,
    first_distance: float = 1e-6,
    distance_coeff: float = 1.0,
    growth_rate: float | None = None,
    safeguard_warmup: bool = False,
) -> Chain:
    """Adam with a learning rate that is an estimate of how far away the solution is.

    Leave lr at 1, or schedule it around 1; `wd` is decoupled weight decay, times the estimated
    rate. `slope_mom` is the root of sqr_mom if it is not given. With `growth_rate`, such as 1.02,
    the estimate grows by no more than that factor at each step; `safeguard_warmup` leaves lr out of
    what the estimate is divided by, so that a small lr cannot blow it up.

    weight = lr * d**2 / first_distance;  slope = slope_mom * slope + weight * grad
    dot_sum = slope_mom * dot_sum + weight * <grad, start - param>
    param = param - lr * d * (average of d * grad) / (sqrt(average of (d * grad)**2) + d * eps)
    d = max(d, distance_coeff * dot_sum / sum(|slope|)), for the next step

    As in the paper, eps is multiplied by the d of this step; prodigyopt takes that of the next one.
    Adam's bias correction is left out, as in both. Parameters in bfloat16 lose the first steps in
    rounding and never move: keep them in float32, or use chain(prodigy(), round_stochastically).

    Source: Mishchenko and Defazio 2024 (ICML); numbers of prodigyopt.Prodigy.

    >>> print(*prodigy().rules[:4])
    estimate_distance rate_by_distance track_slope average_progress
    """
    track = rename(track_slope, lr="slope_lr") if safeguard_warmup else track_slope
    rules = (
        rate_by_distance,
        track,
        average_progress,
        compare_with_slope,
        *([] if wd is None else [_DECAY_BY_RATE]),
        # The slope is of the gradient itself, Adam's averages are of it times the distance.
        rename(scale_by, update="grad", factor="distance"),
        average_grad,
        average_sqr_grad,
        scale_by_distance_rms,
        _STEP_BY_RATE,
    )
    if growth_rate is not None:
        rules = (limit_growth, *map(_follow_slow_distance, rules))
    slope_lr = 1.0 if safeguard_warmup else None
    if slope_mom is None:
        slope_mom = sqr_mom**0.5
    hypers = given(
        lr=lr,
        mom=mom,
        sqr_mom=sqr_mom,
        slope_mom=slope_mom,
        eps=eps,
        wd=wd,
        first_distance=first_distance,
        distance_coeff=distance_coeff,
        growth_rate=growth_rate,
        slope_lr=slope_lr,
    )
    return chain(estimate_distance, *rules, **hypers)


@recipe
def d_adapt_adam(
    lr: float = 1.0,
    mom: float = 0.9,
    sqr_mom: float = 0.999,
    eps: float = 1e-8,
    wd: float | None = None,
    decoupled: bool = False,
    first_distance: float = 1e-6,
) -> Chain:
    """Adam with a learning rate that is a lower bound of how far away the solution is.

    Leave lr at 1, or schedule it around 1. `wd` is L2, or, `decoupled`, weight decay times the
    estimated rate. Adam's bias correction is left out, as it is there.

    d = max(d, dot_sum / sum(|slope|)), for the next step;  a = sqrt(sqr_mom), rate = lr * d
    dot_sum = a * dot_sum + rate * <grad, slope / (sqrt(sqr_avg) + eps)>, of the old averages
    slope = a * slope + (1 - a) * rate * grad;  grad_avg = mom * grad_avg + (1 - mom) * rate * grad
    param = param - grad_avg / (sqrt(sqr_avg) + eps)

    Source: Defazio and Mishchenko 2023 (ICML); numbers of dadaptation.DAdaptAdam.

    >>> print(*d_adapt_adam().rules[:4])
    estimate_distance rate_by_distance weigh_slope average_sqr_grad
    """
    coupled = [] if decoupled else l2(wd)
    decay = [_DECAY_BY_RATE] if decoupled else []
    rules = (
        estimate_distance,
        rate_by_distance,
        *coupled,
        weigh_slope,
        average_sqr_grad,
        *decay,
        # The squares are of the gradient itself, what follows is of it times the rate.
        _TIMES_RATE,
        average_dot,
        rename(average_grad, grad_avg="slope", mom="slope_mom"),
        compare_with_slope,
        average_grad,
        scale_by_rms,
        take_step,
    )
    hypers = given(lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd, first_distance=first_distance)
    return chain(*rules, slope_mom=sqr_mom**0.5, **hypers)


@recipe
def d_adapt_sgd(
    lr: float = 1.0, mom: float = 0.0, wd: float | None = None, first_distance: float = 1e-6
) -> Chain:
    """SGD with a learning rate that is a lower bound of how far away the solution is.

    Leave lr at 1, or schedule it around 1. `mom` averages the parameters, and `wd` is L2; it counts
    in the length of the first gradient, where dadaptation computes it and drops the result.

    rate = lr * d / |first gradient|;  dot_sum = dot_sum + <rate * grad, slope>
    slope = slope + rate * grad;  param = mom * param + (1 - mom) * (start - slope)
    d = max(d, 2 * dot_sum / |slope|), for the next step

    Source: Defazio and Mishchenko 2023 (ICML); numbers of dadaptation.DAdaptSGD.

    >>> print(*d_adapt_sgd().rules[:3])
    estimate_distance rate_by_distance divide_by_first_norm
    """
    rules = (
        estimate_distance,
        rate_by_distance,
        *l2(wd),
        divide_by_first_norm,
        _TIMES_RATE,
        add_up_dot,
        add_up_grad,
        compare_with_slope_length,
        step_from_start,
    )
    hypers = given(lr=lr, mom=mom, wd=wd, first_distance=first_distance)
    return chain(*rules, **hypers)


@recipe
def d_adapt_adagrad(
    lr: float = 1.0,
    mom: float = 0.0,
    eps: float = 1e-6,
    wd: float | None = None,
    first_sum: float = 1e-6,
    first_distance: float = 1e-6,
) -> Chain:
    """Adagrad with a learning rate that is a lower bound of how far away the solution is.

    Leave lr at 1, or schedule it around 1. `mom` averages the parameters, and `wd` is L2.

    rate = lr * d;  slope = slope + rate * grad;  sqr_sum = sqr_sum + grad**2
    weight = 1 / (sqrt(first_sum + sqr_sum) + eps)
    squares = squares + rate**2 * <grad, weight * grad>
    param = mom * param + (1 - mom) * (start - weight * slope)
    d = max(d, (<slope, weight * slope> - squares) / sum(|slope|)), for the next step

    Source: Defazio and Mishchenko 2023 (ICML); numbers of dadaptation.DAdaptAdaGrad.

    >>> print(*d_adapt_adagrad().rules[:3])
    estimate_distance rate_by_distance weigh_by_sqr_sum
    """
    rules = (
        estimate_distance,
        rate_by_distance,
        *l2(wd),
        weigh_by_sqr_sum,
        _TIMES_RATE,
        add_up_grad,
        compare_squares,
        compare_with_slope,
        step_from_start,
    )
    hypers = given(
        lr=lr, mom=mom, eps=eps, wd=wd, first_sum=first_sum, first_distance=first_distance
    )
    return chain(*rules, **hypers)


@recipe
def dog(
    lr: float = 1.0, first_move: float = 1e-6, eps: float = 1e-8, wd: float | None = None
) -> Chain:
    """SGD with a rate made of how far the parameters have gone, and how long gradients have been.

    Leave lr at 1. `first_move` is the length of the first step relative to 1 + |start|: 1e-4 with
    batch norm. `wd` is L2. The authors evaluate an average of the parameters: see `average_params`.
    Parameters in bfloat16 lose the first steps in rounding and never move: keep them in float32.

    param = param - lr * (largest |param - start| so far) / sqrt(sum of all |grad|**2 + eps) * grad

    Source: Ivgi et al. 2023 (ICML); numbers of optax.contrib.dog.

    >>> print(*dog().rules)
    dog_ratio sgd_step
    """
    hypers = given(lr=lr, first_move=first_move, eps=eps, wd=wd)
    return chain(*l2(wd), dog_ratio, sgd_step, **hypers)


@recipe
def dowg(
    lr: float = 1.0, first_sqr_distance: float = 1e-4, eps: float = 1e-4, wd: float | None = None
) -> Chain:
    """DoG with gradients that are weighed by how far the parameters had gone when they were taken.

    Leave lr at 1. `wd` is L2. Parameters in bfloat16 lose the first steps in rounding and never
    move: keep them in float32, or use chain(dowg(), round_stochastically).

    param = param - lr * d / (sqrt(sum of all d * |grad|**2) + eps) * grad;  d is the largest
    |param - start|**2 so far, and at least first_sqr_distance

    Source: Khaled et al. 2023 (NeurIPS); numbers of optax.contrib.dowg.

    >>> print(*dowg().rules)
    dowg_ratio sgd_step
    """
    hypers = given(lr=lr, first_sqr_distance=first_sqr_distance, eps=eps, wd=wd)
    return chain(*l2(wd), dowg_ratio, sgd_step, **hypers)


@recipe
def cocob(alpha: float = 100.0, eps: float = 1e-8, wd: float | None = None) -> Chain:
    """Gradient descent as betting on coins, each element for itself, without a learning rate.

    `wd` is L2. `alpha` keeps the first bets small. The formula is that of `bet_coins`.

    Source: Orabona and Tommasi 2017 (NeurIPS); numbers of optax.contrib.cocob.

    >>> cocob()
    chain(bet_coins, alpha=100.0, eps=1e-08)
    """
    return chain(*l2(wd), bet_coins, **given(alpha=alpha, eps=eps, wd=wd))


@recipe
def polyak_sgd(
    lr: float = 1.0, max_rate: float = 1.0, lower_bound: float = 0.0, eps: float = 0.0
) -> Chain:
    """SGD with the rate at which a straight line would reach the lowest value of the loss.

    Pass the loss: `opt(params, grads, state, value=loss)`; fit does. `lower_bound` is what the loss
    cannot go below, and `lr` a factor of the rate, after it was cut to max_rate. Where the loss is
    below the bound, nothing moves; optax has that as variant="sps+". optax multiplies the gradient
    by its scaling before the rate is made of it; here, as in its formula, lr multiplies the rate.

    param = param - lr * min(max(value - lower_bound, 0) / (|grad|**2 + eps), max_rate) * grad

    Source: Polyak 1987; Loizou et al. 2021 (AISTATS); numbers of optax.polyak_sgd.

    >>> print(*polyak_sgd().rules, polyak_sgd().required)
    polyak_ratio sgd_step ('value',)
    """
    hypers = given(lr=lr, max_rate=max_rate, lower_bound=lower_bound, eps=eps)
    return chain(polyak_ratio, sgd_step, **hypers)


@recipe
def momo(lr: float = 1.0, mom: float = 0.9, wd: float = 0.0, lower_bound: float = 0.0) -> Chain:
    """Momentum with a rate that goes by the mean of the loss and its tangents; at most lr.

    Pass the loss: `opt(params, grads, state, value=loss)`; fit does. `lower_bound` is what the loss
    cannot go below, and `wd` proximal weight decay.

    grad_avg, loss_avg, dot_avg = averages of grad, value and <param, grad>, from the first ones on
    rate = min(lr, max(loss_avg - dot_avg - lower_bound + <param, grad_avg>, 0) / |grad_avg|**2)
    param = param / (1 + lr * wd) - rate * grad_avg;  with wd the gap is that of momo_ratio

    Source: Schaipp et al. 2024 (ICML); numbers of optax.contrib.momo, whose adapt_lower_bound is
    not here.

    >>> print(*momo().rules)
    average_grad_from_first average_loss_from_first momo_ratio proximal_decay take_step
    """
    # The decay does not come last here: the paper does not shrink the step along with the params.
    parts = (average_grad_from_first, average_loss_from_first, momo_ratio)
    return chain(*parts, proximal_decay, take_step, lr=lr, mom=mom, wd=wd, lower_bound=lower_bound)


@recipe
def momo_adam(
    lr: float = 1e-2,
    mom: float = 0.9,
    sqr_mom: float = 0.999,
    eps: float = 1e-8,
    wd: float = 0.0,
    lower_bound: float = 0.0,
) -> Chain:
    """Adam with a rate that goes by the mean of the loss and its tangents; at most lr.

    Pass the loss: `opt(params, grads, state, value=loss)`; fit does. `lower_bound` is what the loss
    cannot go below, and `wd` proximal weight decay.

    As momo, with averages that start at 0 and are debiased in the rate, and with
    scaled = grad_avg / (sqrt(debiased sqr_avg) + eps): param moves along it, and the gap is divided
    by <grad_avg, scaled>

    Source: Schaipp et al. 2024 (ICML); numbers of optax.contrib.momo_adam, whose adapt_lower_bound
    is not here.

    >>> print(*momo_adam().rules[:4])
    average_grad average_sqr_grad scale_by_debiased_rms average_loss
    """
    parts = (average_grad, average_sqr_grad, scale_by_debiased_rms, average_loss, momo_ratio)
    return chain(
        *parts,
        proximal_decay,
        take_step,
        lr=lr,
        mom=mom,
        sqr_mom=sqr_mom,
        eps=eps,
        wd=wd,
        lower_bound=lower_bound,
    )


def _follow_slow_distance(rule: Rule) -> Rule:
    """The rule, reading slow_distance in the place of the distance, if it reads that."""
    reads = {rule.outer(name) for name in rule.scalars}
    return rename(rule, distance="slow_distance") if "distance" in reads else rule
