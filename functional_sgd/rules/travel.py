"""Rules that go by how far the parameters have come from where they started."""

import torch
from torch import Tensor

from functional_sgd.ranges import Positive
from functional_sgd.reduction import norm, root, total
from functional_sgd.rule import elementwise
from functional_sgd.rules.loss import square_of_grad

__all__ = [
    "bet_coins",
    "dog_ratio",
    "dowg_ratio",
]


def _square_away(param: Tensor, start: Tensor) -> Tensor:
    return (param - start).square()


@elementwise(start=torch.clone, distance=0.0, grad_squares=0.0)
def dog_ratio(
    param: Tensor,
    grad: Tensor,
    start: Tensor,
    *,
    distance: Tensor,
    grad_squares: Tensor,
    size: Tensor = norm("start", over="tree"),
    sqr_away: Tensor = total(_square_away, over="tree"),
    sqr_norm: Tensor = total(square_of_grad, over="tree"),
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
    sqr_away: Tensor = total(_square_away, over="tree"),
    sqr_norm: Tensor = total(square_of_grad, over="tree"),
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
    positive=("largest_grad", "abs_sum", "reward"),
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
