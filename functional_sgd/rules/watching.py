"""Rules that change nothing, and keep a number to look at: of any column, anywhere in a chain."""

from torch import Tensor

from functional_sgd.reduction import largest, mean, norm
from functional_sgd.rule import elementwise

__all__ = ["snapshot_largest", "snapshot_mean", "snapshot_norm"]


@elementwise(norm_seen=0.0)
def snapshot_norm(
    grad: Tensor, *, norm_seen: Tensor, size: Tensor = norm("grad", over="tree")
) -> dict[str, Tensor]:
    """Keep the length of a column, of all leaves together, in the state.

    norm_seen = sqrt(sum of all squares)

    Reads grad; `rename(snapshot_norm, grad="update", norm_seen="update_norm")` looks at the update
    at this place in the chain, and keeps `state["update_norm"]`. Source: optax.snapshot.

    >>> import torch
    >>> zero = torch.tensor(0.0)
    >>> snapshot_norm(torch.tensor([3.0, 4.0]), norm_seen=zero)
    {'norm_seen': tensor(5., dtype=torch.float64)}
    """
    return dict(norm_seen=size)


@elementwise(mean_seen=0.0)
def snapshot_mean(
    grad: Tensor,
    *,
    mean_seen: Tensor,
    size: Tensor = mean(lambda grad: grad.abs(), over="tree"),
) -> dict[str, Tensor]:
    """Keep the mean of a column's absolute values, over all leaves together, in the state.

    Reads grad; for another column or another name, `rename`, as for snapshot_norm. Source:
    optax.snapshot.

    >>> import torch
    >>> zero = torch.tensor(0.0)
    >>> snapshot_mean(torch.tensor([3.0, -4.0]), mean_seen=zero)
    {'mean_seen': tensor(3.5000, dtype=torch.float64)}
    """
    return dict(mean_seen=size)


@elementwise(largest_seen=0.0)
def snapshot_largest(
    grad: Tensor,
    *,
    largest_seen: Tensor,
    size: Tensor = largest(lambda grad: grad.abs(), over="tree"),
) -> dict[str, Tensor]:
    """Keep a column's largest absolute value, over all leaves together, in the state.

    Reads grad; for another column or another name, `rename`, as for snapshot_norm. Source:
    optax.snapshot.

    >>> import torch
    >>> zero = torch.tensor(0.0)
    >>> snapshot_largest(torch.tensor([3.0, -4.0]), largest_seen=zero)
    {'largest_seen': tensor(4., dtype=torch.float64)}
    """
    return dict(largest_seen=size)
