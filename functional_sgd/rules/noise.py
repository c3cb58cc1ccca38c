"""Rules that add random numbers."""

from torch import Tensor

from functional_sgd.randomness import Key, normal
from functional_sgd.ranges import NonNegative
from functional_sgd.reduction import root
from functional_sgd.rule import elementwise

__all__ = ["add_noise", "langevin_noise"]


@elementwise
def add_noise(
    grad: Tensor,
    *,
    key: Key,
    step: Tensor,
    noise: NonNegative = 0.01,
    noise_decay: NonNegative = 0.55,
) -> dict[str, Tensor]:
    """Add normal noise to the gradient, less with every step.

    grad = grad + sqrt(noise / step**noise_decay) * normal

    Reads grad, step, noise >= 0 (the variance at step 1) and noise_decay >= 0. Source: Neelakantan
    et al. 2015; the variance of optax.add_noise, with random numbers of our own.

    >>> import torch
    >>> from functional_sgd import chain, sgd_step
    >>> opt, zeros = chain(add_noise, sgd_step, lr=1.0), torch.zeros(10_000)
    >>> after, _ = opt(zeros, zeros, opt.init(zeros), dict(noise=4.0))
    >>> bool(1.95 < after.std() < 2.05)
    True
    """
    return dict(grad=grad + root(noise / step**noise_decay) * normal(key, grad))


@elementwise
def langevin_noise(
    param: Tensor, *, key: Key, lr: NonNegative, temperature: NonNegative = 1e-4
) -> dict[str, Tensor]:
    """Shake the parameters so much that they come to rest nowhere, but go round the minima.

    param = param + sqrt(2 * lr * temperature) * normal

    Reads param, lr and temperature >= 0. After a gradient step, and for small lr, the params are
    samples of the distribution exp(-loss / temperature). Source: Welling and Teh 2011.

    >>> import torch
    >>> from functional_sgd import chain
    >>> opt, zeros = chain(langevin_noise, lr=2.0, temperature=1.0), torch.zeros(10_000)
    >>> after, _ = opt(zeros, zeros, opt.init(zeros))
    >>> bool(1.95 < after.std() < 2.05)
    True
    """
    return dict(param=param + (2 * lr * temperature) ** 0.5 * normal(key, param))
