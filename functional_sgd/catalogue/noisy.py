"""Optimizers that add random numbers: to find their way, or to draw samples."""

from functional_sgd.catalogue.parts import recipe
from functional_sgd.chaining import Chain, chain
from functional_sgd.rules import add_noise, langevin_noise, sgd_step

__all__ = ["noisy_sgd", "sgld"]


@recipe
def noisy_sgd(lr: float = 1e-3, noise: float = 0.01, noise_decay: float = 0.55) -> Chain:
    """Gradient descent with normal noise on the gradient, less with every step.

    param = param - lr * (grad + sqrt(noise / step**noise_decay) * normal)

    Source: Neelakantan et al. 2015 (arXiv); the variance of optax.noisy_sgd, with random numbers of
    our own.

    >>> print(*noisy_sgd().rules)
    add_noise sgd_step
    """
    return chain(add_noise, sgd_step, lr=lr, noise=noise, noise_decay=noise_decay)


@recipe
def sgld(lr: float = 1e-3, temperature: float = 1e-4) -> Chain:
    """Gradient descent that draws samples: with noise that keeps it at a temperature (stochastic
    gradient Langevin dynamics).

    param = param - lr * grad + sqrt(2 * lr * temperature) * normal

    For a mean loss over n samples, temperature=1/n gives samples of the posterior. The paper's step
    is epsilon = 2 * lr / n.

    Source: Welling and Teh 2011 (ICML), equation 4.

    >>> print(*sgld().rules)
    sgd_step langevin_noise
    """
    return chain(sgd_step, langevin_noise, lr=lr, temperature=temperature)
