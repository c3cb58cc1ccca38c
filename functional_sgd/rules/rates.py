"""Rules that make steps shorter as their number grows."""

from torch import Tensor

from functional_sgd.ranges import NonNegative
from functional_sgd.rule import elementwise

__all__ = ["bottou_rate", "decay_rate", "relative_step"]


@elementwise
def decay_rate(update: Tensor, *, step: Tensor, lr_decay: NonNegative = 0.0) -> dict[str, Tensor]:
    """Let steps become shorter, as one over their number.

    update = update / (1 + (step - 1) * lr_decay)

    Reads update, step and lr_decay >= 0. Source: torch.optim.Adagrad(lr_decay=...).

    >>> import torch
    >>> decay_rate(torch.tensor([6.0]), step=torch.tensor(3), lr_decay=1.0)
    {'update': tensor([2.])}
    """
    return dict(update=update / (1 + (step - 1) * lr_decay))


@elementwise
def bottou_rate(
    update: Tensor,
    *,
    step: Tensor,
    lr: NonNegative,
    lambd: NonNegative = 1e-4,
    power: NonNegative = 0.75,
) -> dict[str, Tensor]:
    """Let steps become shorter as a power of their number, the sooner the larger they are.

    update = update / (1 + lambd * lr * (step - 1))**power

    Reads update, step, lr, lambd >= 0 (the weight of the L2 penalty) and power >= 0.
    Source: Bottou 2012, "Stochastic gradient descent tricks"; torch.optim.ASGD.

    >>> import torch
    >>> bottou_rate(torch.tensor([4.0]), step=torch.tensor(4), lr=1.0, lambd=1.0, power=0.5)
    {'update': tensor([2.])}
    """
    return dict(update=update / (1 + lambd * lr * (step - 1)) ** power)


@elementwise
def relative_step(
    param: Tensor, update: Tensor, *, step: Tensor, lr: NonNegative
) -> dict[str, Tensor]:
    """sgd_step with a rate that falls as the root of the number of steps, once it is below lr.

    param = param - min(lr, 1 / sqrt(step)) * update

    Reads param, update, step and lr. Source: Adafactor (Shazeer and Stern 2018).

    >>> import torch
    >>> relative_step(torch.tensor([1.0]), torch.tensor([1.0]), step=torch.tensor(4.0), lr=1.0)
    {'param': tensor([0.5000])}
    """
    return dict(param=param - (step**-0.5).clamp(max=lr) * update)
