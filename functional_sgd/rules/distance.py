"""Rules that find the rate themselves: by how far the parameters have gone, or by the loss."""

import torch
from torch import Tensor

from functional_sgd.ranges import Decay, NonNegative, Positive
from functional_sgd.reduction import norm, root, total
from functional_sgd.rule import elementwise

__all__ = [
    "add_up_dot",
    "add_up_grad",
    "average_dot",
    "average_loss",
    "average_loss_from_first",
    "average_progress",
    "bet_coins",
    "compare_squares",
    "compare_with_slope",
    "compare_with_slope_length",
    "divide_by_first_norm",
    "dog_ratio",
    "dowg_ratio",
    "estimate_distance",
    "limit_growth",
    "momo_ratio",
    "polyak_ratio",
    "rate_by_distance",
    "scale_by_distance_rms",
    "step_from_start",
    "track_slope",
    "weigh_by_sqr_sum",
    "weigh_slope",
]

# Prodigy and D-Adaptation. The estimate is made at the start of a step, of the sums that the step
# before has left, so a whole step is one pass over memory.


@elementwise(distance=0.0)
def estimate_distance(
    *, distance: Tensor, estimate: Tensor, first_distance: Positive = 1e-6
) -> dict[str, Tensor]:
    """Know that the solution is at least this far from the start: a bound that only grows.

    distance = max(distance, estimate, first_distance)

    Reads first_distance > 0 and the estimate, as the step before left it. Keeps distance, a number
    of the tree. Source: D-Adaptation (Defazio and Mishchenko 2023).

    >>> estimate_distance(distance=torch.tensor(1.0), estimate=torch.tensor(3.0))
    {'distance': tensor(3.)}
    """
    return dict(distance=distance.clamp(min=estimate).clamp(min=first_distance))


@elementwise(slow_distance=0.0)
def limit_growth(
    *,
    distance: Tensor,
    slow_distance: Tensor,
    first_distance: Positive = 1e-6,
    growth_rate: Positive = 1.02,
) -> dict[str, Tensor]:
    """Follow an estimate that grows by no more than a factor at each step: a kind of warm-up.

    slow_distance = min(distance, growth_rate * slow_distance);  the first change is free

    Reads distance (of estimate_distance), first_distance > 0 and growth_rate >= 1. Keeps
    slow_distance, a number of the tree. Source: prodigyopt's growth_rate.

    >>> one, nine = torch.tensor(1.0), torch.tensor(9.0)
    >>> limit_growth(distance=nine, slow_distance=one, growth_rate=2.0)
    {'slow_distance': tensor(2.)}
    """
    grown = (growth_rate * slow_distance).clamp(max=distance)
    return dict(slow_distance=torch.where(slow_distance <= first_distance, distance, grown))


@elementwise(rate=0.0)
def rate_by_distance(*, rate: Tensor, distance: Tensor, lr: NonNegative = 1.0) -> dict[str, Tensor]:
    """Take the estimated distance as the learning rate.

    rate = lr * distance

    Reads distance (of estimate_distance) and lr >= 0, one number for all leaves. Keeps rate, a
    number of the tree; other rules read it as their lr: rename(sgd_step, lr="rate").
    Source: D-Adaptation (Defazio and Mishchenko 2023).

    >>> rate_by_distance(rate=torch.tensor(0.0), distance=torch.tensor(3.0), lr=0.5)
    {'rate': tensor(1.5000)}
    """
    return dict(rate=lr * distance)


@elementwise(start=torch.clone, slope=torch.zeros_like)
def track_slope(
    grad: Tensor,
    start: Tensor,
    slope: Tensor,
    *,
    distance: Tensor,
    lr: NonNegative = 1.0,
    slope_mom: Decay = 0.9995,
    first_distance: Positive = 1e-6,
) -> dict[str, Tensor]:
    """Add up, with decay, the gradients, each weighed by the square of the distance by then.

    slope = slope_mom * slope + lr * distance**2 / first_distance * grad

    Reads grad, distance (of estimate_distance), lr >= 0, slope_mom in [0, 1), and first_distance,
    which keeps the numbers from being tiny. Keeps slope, and start, the first parameters.
    Source: Prodigy (Mishchenko and Defazio 2024).

    >>> two = torch.tensor([2.0])
    >>> track_slope(two, two, two, distance=torch.tensor(1.0), slope_mom=0.5, first_distance=1.0)
    {'start': tensor([2.]), 'slope': tensor([3.])}
    """
    weight = lr * distance * distance / first_distance
    return dict(start=start, slope=slope_mom * slope + weight * grad)


@elementwise(dot_sum=0.0)
def average_progress(
    param: Tensor,
    grad: Tensor,
    start: Tensor,
    *,
    dot_sum: Tensor,
    distance: Tensor,
    lr: NonNegative = 1.0,
    slope_mom: Decay = 0.9995,
    first_distance: Positive = 1e-6,
    dot: Tensor = total(lambda param, grad, start: grad * (start - param), over="tree"),
) -> dict[str, Tensor]:
    """Add up, with decay, how far the parameters have gone against each gradient.

    dot_sum = slope_mom * dot_sum + lr * distance**2 / first_distance * (sum of all grad * (start -
    param))

    Reads param, grad, start (of track_slope) and what track_slope reads. Keeps dot_sum, a number of
    the tree. Source: Prodigy (Mishchenko and Defazio 2024).

    >>> two, one = torch.tensor([2.0]), torch.tensor(1.0)
    >>> average_progress(0 * two, two, two, dot_sum=one, distance=one, slope_mom=0.5,
    ...     first_distance=1.0)
    {'dot_sum': tensor(4.5000, dtype=torch.float64)}
    """
    weight = lr * distance * distance / first_distance
    return dict(dot_sum=slope_mom * dot_sum + weight * dot)


@elementwise(estimate=0.0)
def compare_with_slope(
    slope: Tensor,
    *,
    estimate: Tensor,
    dot_sum: Tensor,
    size: Tensor = total(lambda slope: slope.abs(), over="tree"),
    distance_coeff: Positive = 1.0,
) -> dict[str, Tensor]:
    """A lower bound of the distance to the solution, along the slope that the gradients have had.

    estimate = distance_coeff * dot_sum / (sum of all |slope|), 0 while the slope is 0

    Reads slope, dot_sum and distance_coeff > 0; keeps estimate, a number of the tree.
    Source: D-Adaptation (Defazio and Mishchenko 2023).

    >>> zero, six = torch.tensor(0.0), torch.tensor(6.0)
    >>> compare_with_slope(torch.tensor([1.0, -2.0]), estimate=zero, dot_sum=six)
    {'estimate': tensor(2., dtype=torch.float64)}
    """
    ratio = distance_coeff * dot_sum / torch.where(size == 0, 1.0, size)
    return dict(estimate=torch.where(size == 0, 0.0, ratio))


@elementwise
def scale_by_distance_rms(
    update: Tensor, sqr_avg: Tensor, *, distance: Tensor, eps: NonNegative = 1e-8
) -> dict[str, Tensor]:
    """scale_by_rms for averages of gradients that were multiplied by the distance.

    update = update / (sqrt(sqr_avg) + distance * eps)

    Reads update, sqr_avg, distance (of estimate_distance) and eps >= 0.
    Source: Prodigy (Mishchenko and Defazio 2024).

    >>> four = torch.tensor([4.0])
    >>> scale_by_distance_rms(four, four, distance=torch.tensor(2.0), eps=1.0)
    {'update': tensor([1.])}
    """
    return dict(update=update / (root(sqr_avg) + distance * eps))


@elementwise(before=("slope", "sqr_avg"))
def weigh_slope(slope: Tensor, sqr_avg: Tensor, *, eps: NonNegative = 1e-8) -> dict[str, Tensor]:
    """The slope of the step before, divided by how steep each direction has been until then.

    weighed_slope = slope / (sqrt(sqr_avg) + eps)

    Reads slope and sqr_avg as the step before left them, and eps > 0.
    Source: D-Adaptation (Defazio and Mishchenko 2023).

    >>> weigh_slope(torch.tensor([4.0]), torch.tensor([4.0]), eps=0.0)
    {'weighed_slope': tensor([2.])}
    """
    return dict(weighed_slope=slope / (root(sqr_avg) + eps))


@elementwise(dot_sum=0.0)
def average_dot(
    grad: Tensor,
    weighed_slope: Tensor,
    *,
    dot_sum: Tensor,
    slope_mom: Decay = 0.9995,
    dot: Tensor = total(lambda grad, weighed_slope: grad * weighed_slope, over="tree"),
) -> dict[str, Tensor]:
    """Add up, with decay, how far gradients go on pointing where earlier ones have pointed.

    dot_sum = slope_mom * dot_sum + (sum of all grad * weighed_slope)

    Reads grad (times the rate), weighed_slope and slope_mom in [0, 1); keeps dot_sum, a number of
    the tree. Source: D-Adaptation (Defazio and Mishchenko 2023).

    >>> two, one = torch.tensor([2.0]), torch.tensor(1.0)
    >>> average_dot(two, two, dot_sum=one, slope_mom=0.5)
    {'dot_sum': tensor(4.5000, dtype=torch.float64)}
    """
    return dict(dot_sum=slope_mom * dot_sum + dot)


@elementwise(dot_sum=0.0, before=("slope",))
def add_up_dot(
    grad: Tensor,
    slope: Tensor,
    *,
    dot_sum: Tensor,
    dot: Tensor = total(lambda grad, slope: grad * slope, over="tree"),
) -> dict[str, Tensor]:
    """Add up how far each gradient points where the sum of those before it points.

    dot_sum = dot_sum + (sum of all grad * slope)

    Reads grad (times the rate) and slope as the step before left it; keeps dot_sum, a number of the
    tree. Source: D-Adaptation (Defazio and Mishchenko 2023).

    >>> add_up_dot(torch.tensor([2.0]), torch.tensor([3.0]), dot_sum=torch.tensor(1.0))
    {'dot_sum': tensor(7., dtype=torch.float64)}
    """
    return dict(dot_sum=dot_sum + dot)


@elementwise(slope=torch.zeros_like)
def add_up_grad(grad: Tensor, slope: Tensor) -> dict[str, Tensor]:
    """Add up all gradients: dual averaging, if the sum is then taken from the first parameters.

    slope = slope + grad;  update = slope

    Reads grad; keeps slope, which starts at 0. Source: Nesterov 2009; D-Adaptation (Defazio and
    Mishchenko 2023).

    >>> add_up_grad(torch.tensor([2.0]), torch.tensor([3.0]))
    {'slope': tensor([5.]), 'update': tensor([5.])}
    """
    return dict(slope=slope + grad, update=slope + grad)


@elementwise(estimate=0.0)
def compare_with_slope_length(
    slope: Tensor,
    *,
    estimate: Tensor,
    dot_sum: Tensor,
    length: Tensor = norm("slope", over="tree"),
    distance_coeff: Positive = 2.0,
) -> dict[str, Tensor]:
    """compare_with_slope by the Euclidean length of all leaves as one vector.

    estimate = distance_coeff * dot_sum / |slope|, 0 while the slope is 0

    Reads slope, dot_sum and distance_coeff > 0; keeps estimate, a number of the tree.
    Source: D-Adaptation (Defazio and Mishchenko 2023), for SGD.

    >>> zero, ten = torch.tensor(0.0), torch.tensor(10.0)
    >>> compare_with_slope_length(torch.tensor([3.0, -4.0]), estimate=zero, dot_sum=ten)
    {'estimate': tensor(4., dtype=torch.float64)}
    """
    ratio = distance_coeff * dot_sum / torch.where(length == 0, 1.0, length)
    return dict(estimate=torch.where(length == 0, 0.0, ratio))


@elementwise(first_norm=0.0)
def divide_by_first_norm(
    grad: Tensor, *, first_norm: Tensor, grad_norm: Tensor = norm("grad", over="tree")
) -> dict[str, Tensor]:
    """Measure all gradients by the length of the first one that is not 0.

    first_norm = grad_norm if first_norm is 0;  grad = grad / first_norm

    Reads grad; keeps first_norm, a number of the tree.
    Source: D-Adaptation (Defazio and Mishchenko 2023), for SGD.

    >>> divide_by_first_norm(torch.tensor([3.0]), first_norm=torch.tensor(2.0))
    {'grad': tensor([1.5000]), 'first_norm': tensor(2., dtype=torch.float64)}
    """
    first_norm = torch.where(first_norm == 0, grad_norm, first_norm)
    return dict(grad=grad / torch.where(first_norm == 0, 1.0, first_norm), first_norm=first_norm)


@elementwise(start=torch.clone)
def step_from_start(
    param: Tensor, update: Tensor, start: Tensor, *, mom: Decay = 0.0
) -> dict[str, Tensor]:
    """Take the update from the first parameters, and the average of that with where one was.

    param = mom * param + (1 - mom) * (start - update)

    Reads param, update (a sum over all steps) and mom in [0, 1); keeps start, the first parameters.
    Source: Nesterov 2009 (dual averaging); D-Adaptation (Defazio and Mishchenko 2023).

    >>> one, two, four = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([4.0])
    >>> step_from_start(two, one, four, mom=0.5)
    {'param': tensor([2.5000]), 'start': tensor([4.])}
    """
    return dict(param=mom * param + (1 - mom) * (start - update), start=start)


@elementwise(sqr_sum=torch.zeros_like)
def weigh_by_sqr_sum(
    grad: Tensor, sqr_sum: Tensor, *, first_sum: Positive = 1e-6, eps: NonNegative = 1e-6
) -> dict[str, Tensor]:
    """The weight of each direction in Adagrad's metric, which falls as squared gradients add up.

    sqr_sum = sqr_sum + grad**2;  weight = 1 / (sqrt(first_sum + sqr_sum) + eps)

    Reads grad, first_sum > 0 and eps >= 0; keeps sqr_sum, which starts at 0. Source: Duchi et al.
    2011, as in D-Adaptation (Defazio and Mishchenko 2023).

    >>> weigh_by_sqr_sum(torch.tensor([1.0]), torch.tensor([2.0]), first_sum=1.0, eps=0.0)
    {'sqr_sum': tensor([3.]), 'weight': tensor([0.5000])}
    """
    sqr_sum = sqr_sum + grad.square()
    return dict(sqr_sum=sqr_sum, weight=1 / (root(first_sum + sqr_sum) + eps))


@elementwise(dot_sum=0.0, grad_squares=0.0)
def compare_squares(
    grad: Tensor,
    slope: Tensor,
    weight: Tensor,
    *,
    dot_sum: Tensor,
    grad_squares: Tensor,
    whole: Tensor = total(lambda slope, weight: slope * slope * weight, over="tree"),
    single: Tensor = total(lambda grad, weight: grad * grad * weight, over="tree"),
) -> dict[str, Tensor]:
    """How much longer the sum of all gradients is than gradients without a common direction are.

    dot_sum = (sum of all weight * slope**2) - (the sums of all weight * grad**2 so far)

    update = weight * slope

    Reads grad (times the rate), slope (their sum) and weight; keeps dot_sum and grad_squares,
    numbers of the tree. Source: D-Adaptation (Defazio and Mishchenko 2023), for AdaGrad.

    >>> two, three, number = torch.tensor([2.0]), torch.tensor([3.0]), torch.tensor(1.0)
    >>> found = compare_squares(two, three, two, dot_sum=number, grad_squares=number)
    >>> found["update"], float(found["dot_sum"]), float(found["grad_squares"])
    (tensor([6.]), 9.0, 9.0)
    """
    grad_squares = grad_squares + single
    return dict(update=weight * slope, dot_sum=whole - grad_squares, grad_squares=grad_squares)


# DoG, DoWG and COCOB.


@elementwise(start=torch.clone, distance=0.0, grad_squares=0.0)
def dog_ratio(
    param: Tensor,
    grad: Tensor,
    start: Tensor,
    *,
    distance: Tensor,
    grad_squares: Tensor,
    size: Tensor = norm("start", over="tree"),
    sqr_away: Tensor = total(lambda param, start: (param - start).square(), over="tree"),
    sqr_norm: Tensor = total(lambda grad: grad.square(), over="tree"),
    first_move: Positive = 1e-6,
    eps: Positive = 1e-8,
) -> dict[str, Tensor]:
    """Distance over gradients: go as far as the parameters have got, shared among all gradients.

    distance = max(distance, |param - start|, first_move * (1 + |start|))
    grad_squares = grad_squares + |grad|**2;  update = grad * distance / sqrt(grad_squares + eps)

    Reads param, grad, first_move > 0 and eps > 0; lengths are those of all leaves as one vector.
    Keeps start (the first parameters), and distance and grad_squares, numbers of the tree.
    Source: DoG (Ivgi et al. 2023).

    >>> one, two, zero = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor(0.0)
    >>> dog_ratio(5 * one, two, two, distance=zero, grad_squares=zero, eps=5.0)["update"]
    tensor([2.])
    """
    distance = torch.maximum(torch.maximum(distance, root(sqr_away)), first_move * (1 + size))
    grad_squares = grad_squares + sqr_norm
    return dict(
        update=distance / root(grad_squares + eps) * grad,
        start=start,
        distance=distance,
        grad_squares=grad_squares,
    )


@elementwise(start=torch.clone, sqr_distance=0.0, grad_squares=0.0)
def dowg_ratio(
    param: Tensor,
    grad: Tensor,
    start: Tensor,
    *,
    sqr_distance: Tensor,
    grad_squares: Tensor,
    sqr_away: Tensor = total(lambda param, start: (param - start).square(), over="tree"),
    sqr_norm: Tensor = total(lambda grad: grad.square(), over="tree"),
    first_sqr_distance: Positive = 1e-4,
    eps: Positive = 1e-4,
) -> dict[str, Tensor]:
    """Distance over weighted gradients: each gradient counts by the distance that it was taken at.

    sqr_distance = max(sqr_distance, |param - start|**2, first_sqr_distance)
    grad_squares = grad_squares + sqr_distance * |grad|**2
    update = grad * sqr_distance / (sqrt(grad_squares) + eps)

    Reads param, grad, first_sqr_distance > 0 and eps > 0; lengths are those of all leaves as one
    vector. Keeps start (the first parameters), and sqr_distance and grad_squares, numbers of the
    tree. Source: DoWG (Khaled et al. 2023), with optax's eps.

    >>> one, two, zero = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor(0.0)
    >>> dowg_ratio(5 * one, two, two, sqr_distance=zero, grad_squares=zero, eps=3.0)["update"]
    tensor([2.])
    """
    sqr_distance = torch.maximum(sqr_distance, sqr_away).clamp(min=first_sqr_distance)
    grad_squares = grad_squares + sqr_distance * sqr_norm
    return dict(
        update=sqr_distance / (root(grad_squares) + eps) * grad,
        start=start,
        sqr_distance=sqr_distance,
        grad_squares=grad_squares,
    )


@elementwise(
    start=torch.clone,
    slope=torch.zeros_like,
    largest_grad=torch.zeros_like,
    abs_sum=torch.zeros_like,
    reward=torch.zeros_like,
)
def bet_coins(
    param: Tensor,
    grad: Tensor,
    start: Tensor,
    slope: Tensor,
    largest_grad: Tensor,
    abs_sum: Tensor,
    reward: Tensor,
    *,
    alpha: Positive = 100.0,
    eps: Positive = 1e-8,
) -> dict[str, Tensor]:
    """Bet on each element's next gradient a share of what the bets so far have won.

    largest = max(largest, |grad|, eps);  abs_sum = abs_sum + |grad|;  slope = slope + grad
    reward = max(reward - grad * (param - start), 0)
    param = start - slope * (largest + reward) / (largest * max(abs_sum + largest, alpha * largest))

    Reads param, grad, alpha > 0 and eps > 0; keeps start (the first parameters), slope,
    largest_grad, abs_sum and reward. Source: COCOB-Backprop (Orabona and Tommasi 2017).

    >>> one, zero = torch.tensor([1.0]), torch.tensor([0.0])
    >>> bet_coins(3 * one, one, 4 * one, zero, zero, zero, zero, alpha=4.0)["param"]
    tensor([3.5000])
    """
    largest_grad = torch.maximum(largest_grad, grad.abs()).clamp(min=eps)
    abs_sum = abs_sum + grad.abs()
    reward = (reward - grad * (param - start)).clamp(min=0)
    slope = slope + grad
    caution = torch.maximum(abs_sum + largest_grad, alpha * largest_grad)
    return dict(
        param=start - slope / (largest_grad * caution) * (largest_grad + reward),
        start=start,
        slope=slope,
        largest_grad=largest_grad,
        abs_sum=abs_sum,
        reward=reward,
    )


# Rates that are made of the loss.


@elementwise
def polyak_ratio(
    grad: Tensor,
    *,
    value: Tensor,
    square: Tensor = total(lambda grad: grad.square(), over="tree"),
    lower_bound: float = 0.0,
    max_rate: Positive = 1.0,
    eps: NonNegative = 0.0,
) -> dict[str, Tensor]:
    """Go as far as a straight line with this slope needs from the loss to its lowest value.

    update = grad * min(max(value - lower_bound, 0) / (|grad|**2 + eps), max_rate)

    Reads grad, the loss (`value`, from the caller), lower_bound (of the loss), max_rate > 0 and
    eps >= 0; the length is that of all leaves as one vector. An update along zeros is zero.
    Source: Polyak 1987; SPS_max (Loizou et al. 2021).

    >>> polyak_ratio(torch.tensor([1.0, 1.0]), value=torch.tensor(1.0))
    {'update': tensor([0.5000, 0.5000])}
    """
    square = square + eps
    rate = (value - lower_bound) / torch.where(square == 0, 1.0, square)
    return dict(update=rate.clamp(0.0, max_rate) * grad)


@elementwise(loss_avg=0.0, dot_avg=0.0, share_sum=0.0)
def average_loss(
    param: Tensor,
    grad: Tensor,
    *,
    value: Tensor,
    loss_avg: Tensor,
    dot_avg: Tensor,
    share_sum: Tensor,
    dot: Tensor = total(lambda param, grad: param * grad, over="tree"),
    mom: Decay = 0.9,
) -> dict[str, Tensor]:
    """Average the loss, and what its tangents give at 0, as average_grad does the gradients.

    loss_avg = mom * loss_avg + (1 - mom) * value
    dot_avg = mom * dot_avg + (1 - mom) * (sum of all param * grad)
    share_sum = mom * share_sum + (1 - mom)

    Reads param, grad, the loss (`value`, from the caller) and mom in [0, 1). Keeps the three, which
    are numbers of the tree and start at 0; share_sum is 1 - mom**steps.
    Source: MoMo-Adam (Schaipp et al. 2024).

    >>> two, zero = torch.tensor([2.0]), torch.tensor(0.0)
    >>> found = average_loss(two, two, value=torch.tensor(3.0), loss_avg=zero, dot_avg=zero,
    ...     share_sum=zero, mom=0.5)
    >>> [float(number) for number in found.values()]
    [1.5, 2.0, 0.5]
    """
    return dict(
        loss_avg=mom * loss_avg + (1 - mom) * value,
        dot_avg=mom * dot_avg + (1 - mom) * dot,
        share_sum=mom * share_sum + (1 - mom),
    )


@elementwise(loss_avg=0.0, dot_avg=0.0, share_sum=0.0)
def average_loss_from_first(
    param: Tensor,
    grad: Tensor,
    *,
    value: Tensor,
    loss_avg: Tensor,
    dot_avg: Tensor,
    share_sum: Tensor,
    dot: Tensor = total(lambda param, grad: param * grad, over="tree"),
    mom: Decay = 0.9,
) -> dict[str, Tensor]:
    """average_loss with averages that start as what is seen first, so that they have no bias.

    As average_loss, with mom = 0 at the first step. Source: MoMo (Schaipp et al. 2024).

    >>> two, zero = torch.tensor([2.0]), torch.tensor(0.0)
    >>> found = average_loss_from_first(two, two, value=torch.tensor(3.0), loss_avg=zero,
    ...     dot_avg=zero, share_sum=zero, mom=0.5)
    >>> [float(number) for number in found.values()]
    [3.0, 4.0, 1.0]
    """
    first = share_sum == 0
    return dict(
        loss_avg=torch.where(first, value, mom * loss_avg + (1 - mom) * value),
        dot_avg=torch.where(first, dot, mom * dot_avg + (1 - mom) * dot),
        share_sum=torch.where(first, 1.0, mom * share_sum + (1 - mom)),
    )


@elementwise
def momo_ratio(
    param: Tensor,
    update: Tensor,
    grad_avg: Tensor,
    *,
    loss_avg: Tensor,
    dot_avg: Tensor,
    share_sum: Tensor,
    here: Tensor = total(lambda param, grad_avg: param * grad_avg, over="tree"),
    square: Tensor = total(lambda update, grad_avg: update * grad_avg, over="tree"),
    lr: NonNegative = 1.0,
    wd: NonNegative = 0.0,
    lower_bound: float = 0.0,
) -> dict[str, Tensor]:
    """Go as far as the mean of all tangents of the loss needs to its lowest value, at most lr.

    model = loss_avg - dot_avg + (sum of all param * grad_avg): the mean tangent at param, for wd 0
    gap = max((1 + lr * wd) * (loss_avg - dot_avg - share_sum * lower_bound) + (sum ...), 0)
    update = update * min(lr / share_sum, gap / (sum of all update * grad_avg))

    Reads param, grad_avg, update (grad_avg, scaled or not), the numbers of average_loss, lr >= 0,
    wd >= 0 (that of a proximal_weight_decay afterwards) and lower_bound, which the loss should not
    go below. The update holds the rate, so take_step follows.
    Source: MoMo (Schaipp et al. 2024).

    >>> two, number = torch.tensor([2.0]), torch.tensor(1.0)
    >>> momo_ratio(two, two, two, loss_avg=2 * number, dot_avg=4 * number, share_sum=number)
    {'update': tensor([1.])}
    """
    gap = (1 + lr * wd) * (loss_avg - dot_avg - share_sum * lower_bound) + here
    rate = gap.clamp(min=0) / torch.where(square == 0, 1.0, square)
    return dict(update=rate.clamp(max=lr / share_sum) * update)
