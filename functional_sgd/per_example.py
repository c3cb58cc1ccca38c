"""Gradients of each example of a batch: clip every one, then take their mean."""

import torch
from torch import Tensor

from functional_sgd.pairs import as_real
from functional_sgd.precision import widest
from functional_sgd.randomness import key_of, normal
from functional_sgd.ranges import Range, check_number
from functional_sgd.reduction import root
from functional_sgd.state import working_dtype
from functional_sgd.tree import Tree, flatten, unflatten


def mean_of_clipped(
    grads: Tree,
    max_norm: float | Tensor,
    noise: float | Tensor = 0.0,
    seed: int | Tensor = 0,
    step: int | Tensor = 0,
) -> Tree:
    """The mean over examples of gradients that were each shortened to max_norm, with noise.

    mean(g_i * min(1, max_norm / |g_i|)) + noise * max_norm / examples * normal

    `grads` has one more axis than the parameters, in front, for the examples, as
    torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0)) gives it. |g_i| is the length of all
    leaves of example i together. The result goes to any optimizer: with sgd that is DP-SGD. The
    noise is a function of (seed, step, leaf, element): pass another step every time. Its generator
    is not a cryptographic one.

    Raises ValueError unless max_norm > 0 and noise >= 0, and if the leaves have no examples, or not
    as many. Source: Abadi et al. 2016; optax.contrib.differentially_private_aggregate.

    >>> grads = {"w": torch.tensor([[3.0, 4.0], [0.0, 1.0]])}  # of lengths 5 and 1
    >>> mean_of_clipped(grads, max_norm=2.5)
    {'w': tensor([0.7500, 1.5000])}
    """
    check_number("mean_of_clipped", "max_norm", max_norm, Range(0, open_low=True))
    check_number("mean_of_clipped", "noise", noise, Range(0))
    leaves, spec = flatten(grads)
    counts: set[int] = set()
    for leaf in leaves:
        count = leaf.shape[0] if leaf.dim() else 0
        counts.add(count)
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            f"mean_of_clipped: every gradient needs a first axis, of the examples, and all the "
            f"same; got shapes {', '.join(str(tuple(leaf.shape)) for leaf in leaves)}."
        )
    (examples,) = counts
    factor = _factors(leaves, max_norm)
    spread = noise * max_norm / examples
    means = []
    for number, leaf in enumerate(leaves):
        wide = leaf if leaf.is_complex() else leaf.to(working_dtype(leaf))
        weights = (factor / examples).to(leaf.device, wide.dtype)
        mean = torch.tensordot(weights, wide, dims=1)
        # The value of a tensor may not be known here (on a device, in a transform), so it is not
        # read.
        if isinstance(noise, Tensor) or noise:
            mean = mean + spread * _draw(mean, seed, step, number)
        means.append(mean.to(leaf.dtype))
    return unflatten(spec, means)


def _factors(leaves: list[Tensor], max_norm: float | Tensor) -> Tensor:
    """What each example is multiplied with."""
    squares = []
    for leaf in leaves:
        real = as_real(leaf)
        wide = real.to(widest(leaf.device))  # like all reductions
        squares.append(wide.reshape(len(wide), -1).square().sum(1).to(leaves[0].device))
    size = root(torch.stack(squares).sum(0))
    long = size > max_norm
    # Two `where`, as in `root`: a division by 0 makes the derivative NaN even where it is not
    # chosen.
    return torch.where(long, max_norm / torch.where(long, size, 1.0), 1.0)


def _draw(like: Tensor, seed: int | Tensor, step: int | Tensor, number: int) -> Tensor:
    words = [torch.as_tensor(word, dtype=torch.int64) for word in (seed, step)]
    key = key_of(words[0], words[1], leaf=number, position=0)
    if not like.is_complex():
        return normal(key, like)
    return torch.view_as_complex(normal(key, as_real(like)))
