"""Optimizers that torch.optim does not have, written as one would by hand: in place, with torch's
foreach functions.
"""

import torch
from torch import Tensor

List = list[Tensor]


def lion(
    params: List, grads: List, state: dict[str, List], lr: float = 1e-4, wd: float = 0.1
) -> None:
    """Chen et al. 2023, with averages of 0.9 and 0.99."""
    update = torch._foreach_lerp(state["grad_avg"], grads, 0.1)
    torch._foreach_sign_(update)
    torch._foreach_mul_(params, 1 - lr * wd)
    torch._foreach_add_(params, update, alpha=-lr)
    torch._foreach_lerp_(state["grad_avg"], grads, 0.01)


def lamb(params: List, grads: List, state: dict[str, List], lr: float = 1e-3) -> None:
    """You et al. 2020, with a trust ratio of at most 10."""
    update = adam_update(grads, state, sqr_mom=0.99, eps=1e-5)
    sizes, lengths = (
        torch.stack(torch._foreach_norm(params)),
        torch.stack(torch._foreach_norm(update)),
    )
    ratios = (sizes / lengths).clamp(max=10.0)
    ratios = torch.where((sizes == 0) | (lengths == 0), 1.0, ratios)
    torch._foreach_mul_(update, list(ratios.unbind()))
    torch._foreach_add_(params, update, alpha=-lr)


def four(
    params: List, grads: List, state: dict[str, List], lr: float = 1e-3, wd: float = 0.01
) -> None:
    """The gradient clipped to a norm of 1, AdamW, cautious updates, and an average of the
    parameters.
    """
    norm = torch.stack(torch._foreach_norm(grads)).norm()
    grads = torch._foreach_mul(grads, (1 / (norm + 1e-6)).clamp(max=1.0))
    update = adam_update(grads, state, sqr_mom=0.999, eps=1e-8)
    agrees = torch._foreach_mul(update, grads)
    torch._foreach_sign_(agrees)
    torch._foreach_clamp_min_(agrees, 0.0)
    torch._foreach_mul_(update, agrees)
    torch._foreach_mul_(params, 1 - lr * wd)
    torch._foreach_add_(params, update, alpha=-lr)
    torch._foreach_lerp_(state["param_avg"], params, 0.001)


def adam_update(grads: List, state: dict[str, List], sqr_mom: float, eps: float) -> List:
    """The averages brought up to date; returns the direction of Adam."""
    state["step"][0] += 1
    step = int(state["step"][0])
    torch._foreach_lerp_(state["grad_avg"], grads, 0.1)
    torch._foreach_mul_(state["sqr_avg"], sqr_mom)
    torch._foreach_addcmul_(state["sqr_avg"], grads, grads, 1 - sqr_mom)
    divisor = torch._foreach_div(state["sqr_avg"], 1 - sqr_mom**step)
    torch._foreach_sqrt_(divisor)
    torch._foreach_add_(divisor, eps)
    torch._foreach_mul_(divisor, 1 - 0.9**step)
    return torch._foreach_div(state["grad_avg"], divisor)


def init(params: List) -> dict[str, List]:
    """What any of them keeps."""
    return {
        "step": [torch.zeros((), dtype=torch.int64)],
        "grad_avg": [torch.zeros_like(param) for param in params],
        "sqr_avg": [torch.zeros_like(param) for param in params],
        "param_avg": [param.clone() for param in params],
    }


BY_HAND = {"lion": lion, "lamb": lamb, "four": four}
