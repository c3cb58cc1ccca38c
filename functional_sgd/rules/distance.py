"""Rules that estimate how far away the solution is, and take that as the rate."""

import torch
from torch import Tensor

from functional_sgd.ranges import AtLeastOne, Decay, NonNegative, Positive
from functional_sgd.reduction import norm, root, total
from functional_sgd.rule import elementwise

__all__ = [
    "add_up_dot",
    "add_up_grad",
    "average_dot",
    "average_progress",
    "compare_squares",
    "compare_with_slope",
    "compare_with_slope_length",
    "divide_by_first_norm",
    "estimate_distance",
    "limit_growth",
    "rate_by_distance",
    "scale_by_distance_rms",
    "step_from_start",
    "track_slope",
    "weigh_by_sqr_sum",
    "weigh_slope",
]

# What sums are made of.


def _progress(param: Tensor, grad: Tensor, start: Tensor) -> Tensor:
    return grad * (start - param)


def _size(slope: Tensor) -> Tensor:
    return slope.abs()


def _times_slope(grad: Tensor, slope: Tensor) -> Tensor:
    return grad * slope


def _times_weighed(grad: Tensor, weighed_slope: Tensor) -> Tensor:
    return grad * weighed_slope


def _weighed_square(grad: Tensor, weight: Tensor) -> Tensor:
    return grad * grad * weight


def _longer(grad: Tensor, slope: Tensor, weight: Tensor) -> Tensor:
    return (slope * slope - grad * grad) * weight


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
    # The number of the tree begins as 0: first_distance is a hyper, known only when it is read.
    return dict(distance=distance.clamp(min=estimate).clamp(min=first_distance))


@elementwise(slow_distance=0.0)
def limit_growth(
    *,
    distance: Tensor,
    slow_distance: Tensor,
    first_distance: Positive = 1e-6,
    growth_rate: AtLeastOne = 1.02,
) -> dict[str, Tensor]:
    """Follow an estimate that grows by no more than a factor at each step: a kind of warm-up.

    slow_distance = min(distance, growth_rate * slow_distance);  the first change is free

    Reads distance (of estimate_distance), first_distance > 0 and growth_rate >= 1. Keeps
    slow_distance, a number of the tree. Source: prodigyopt's growth_rate.

    >>> one, nine = torch.tensor(1.0), torch.tensor(9.0)
    >>> limit_growth(distance=nine, slow_distance=one, growth_rate=2.0)
    {'slow_distance': tensor(2.)}
    """
    # No factor leads away from the 0 that it begins as; and prodigyopt does not limit what follows
    # first_distance, either.
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
    # Whoever owns a slot must write it, so the start is handed on as it is.
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
    dot: Tensor = total(_progress, over="tree"),
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
    size: Tensor = total(_size, over="tree"),
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
    # Two where, as in `root`: where 0 / 0 is computed derivatives are NaN, even if it is not
    # chosen.
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

    weighed_slope = slope / (sqrt(sqr_avg) + eps), 0 where both are 0

    Reads slope and sqr_avg as the step before left them, and eps >= 0.
    Source: D-Adaptation (Defazio and Mishchenko 2023).

    >>> weigh_slope(torch.tensor([4.0]), torch.tensor([4.0]), eps=0.0)
    {'weighed_slope': tensor([2.])}
    """
    divisor = root(sqr_avg) + eps
    # Both are 0 in the first step; a single NaN would be in the sum of the tree for ever.
    return dict(weighed_slope=slope / torch.where(divisor == 0, 1.0, divisor))


@elementwise(dot_sum=0.0)
def average_dot(
    grad: Tensor,
    weighed_slope: Tensor,
    *,
    dot_sum: Tensor,
    slope_mom: Decay = 0.9995,
    dot: Tensor = total(_times_weighed, over="tree"),
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
    dot: Tensor = total(_times_slope, over="tree"),
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


@elementwise(sqr_sum=torch.zeros_like, positive=("sqr_sum",))
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
    more: Tensor = total(_longer, over="tree"),
    single: Tensor = total(_weighed_square, over="tree"),
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
    # One sum of differences is exactly 0 at the first step, where slope is grad.
    return dict(
        update=weight * slope, dot_sum=more - grad_squares, grad_squares=grad_squares + single
    )
