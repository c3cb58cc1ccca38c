"""Measures of one batch: means over its samples, as plain functions (pred, target) -> 0-d
tensor.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from loop.metrics.tally import check_classes, flat


def accuracy(pred: Tensor, target: Tensor) -> Tensor:
    """The share of samples whose highest score is the target's: pred (N, ..., C) or scores, target
    (N, ...) of classes.

    Raises ValueError for scores of one class, pred (N, 1): see accuracy_multi.

    >>> accuracy(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
    tensor(0.5000)
    """
    check_classes("accuracy", pred)
    # Without `flat`, targets (N, 1) against predictions (N,) would make a table of N x N.
    given, wanted = flat("accuracy", pred.argmax(dim=-1), target)
    return (given == wanted).float().mean()


def error_rate(pred: Tensor, target: Tensor) -> Tensor:
    """The share of samples whose highest score is not the target's.

    >>> error_rate(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
    tensor(0.5000)
    """
    return 1 - accuracy(pred, target)


def top_k_accuracy(k: int = 5) -> Callable[[Tensor, Tensor], Tensor]:
    """The metric "the target's score is among the k highest": pred (N, ..., C), target (N, ...).
    Column top_k_accuracy.

    Raises ValueError if k is below 1, and, when it measures, if there are fewer classes than k.

    >>> top_k_accuracy(2)(torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]]), torch.tensor([1, 0]))
    tensor(0.5000)
    """
    if k < 1:
        raise ValueError(f"top_k_accuracy: k must be at least 1, got {k}.")

    def measure(pred: Tensor, target: Tensor) -> Tensor:
        if pred.shape[-1] < k:
            raise ValueError(
                f"{measure.__name__}: expected scores of {k} classes or more, got "
                f"{pred.shape[-1]}. Use top_k_accuracy(k) with a k below that."
            )
        check_classes(measure.__name__, pred)
        best = pred.topk(k, dim=-1).indices
        # One of the k has the shape that the targets must have.
        _, wanted = flat(measure.__name__, best[..., 0], target)
        return (best.reshape(-1, k) == wanted[:, None]).any(dim=-1).float().mean()

    measure.__name__ = f"top_{k}_accuracy"
    return measure


def accuracy_multi(
    threshold: float = 0.5, sigmoid: bool = True
) -> Callable[[Tensor, Tensor], Tensor]:
    """The metric "the share of yes-or-no answers that are right", for targets of several labels at
    once.

    pred and target have one shape; the answer is yes where pred, as a probability, is above the
    threshold. `sigmoid` makes a probability of it first; leave it out if the model does that
    already. Column accuracy_multi.

    >>> accuracy_multi()(torch.tensor([[2.0, -1.0], [0.5, 3.0]]), torch.tensor([[1, 0], [0, 1]]))
    tensor(0.7500)
    """

    def measure(pred: Tensor, target: Tensor) -> Tensor:
        pred, target = flat("accuracy_multi", pred, target)
        scores = pred.sigmoid() if sigmoid else pred
        return (scores.gt(threshold) == target.bool()).float().mean()

    measure.__name__ = "accuracy_multi"
    return measure


def mse(pred: Tensor, target: Tensor) -> Tensor:
    """The mean of the squared differences.

    >>> mse(torch.tensor([1.0, 4.0]), torch.tensor([[1.0], [2.0]]))
    tensor(2.)
    """
    pred, target = _numbers("mse", pred, target)
    return (pred - target).square().mean()


def mae(pred: Tensor, target: Tensor) -> Tensor:
    """The mean of the absolute differences.

    >>> mae(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 2.0]))
    tensor(1.)
    """
    pred, target = _numbers("mae", pred, target)
    return (pred - target).abs().mean()


def msle(pred: Tensor, target: Tensor) -> Tensor:
    """The mean of (log(1 + pred) - log(1 + target))**2; nan where one is below -1.

    >>> msle(torch.tensor([0.0]), torch.tensor([torch.e - 1]))
    tensor(1.)
    """
    pred, target = _numbers("msle", pred, target)
    return (torch.log1p(pred) - torch.log1p(target)).square().mean()


def _numbers(what: str, pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both as vectors, pred in float32 at least: squares overflow in float16, and a mean has two
    digits in bfloat16.
    """
    pred, target = flat(what, pred, target)
    if target.dtype == torch.bool:  # which torch does not subtract
        target = target.to(torch.float32)
    return pred.to(torch.promote_types(pred.dtype, torch.float32)), target
