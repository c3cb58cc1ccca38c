"""Optimizers that survive gradients that are suddenly far too large."""

from functional_sgd.catalogue.parts import recipe
from functional_sgd.chaining import Chain, chain
from functional_sgd.rules import (
    average_without_spikes,
    debias,
    scale_by_rms_eps_early,
    sgd_step,
    warm_up_again,
    weight_decay,
)

__all__ = ["spam"]


@recipe
def spam(
    lr: float = 1e-3,
    mom: float = 0.9,
    sqr_mom: float = 0.999,
    eps: float = 1e-6,
    spike: float = 5000.0,
    restart_every: int = 500,
    patience: int = 20,
    warmup: int = 150,
    wd: float = 0.0,
) -> Chain:
    """Adam that cuts spikes of the gradient, forgets its averages every restart_every steps, and
    warms up after that; decoupled weight decay, after the step.

    As in the authors' code, the bias correction goes on through restarts, and eps is added before
    it. Their random masks of the parameters (density) are left out: a mask of 1 is all of them. An
    element that has had no gradient yet is not cut; they cut its first gradient to 0 after the
    first `patience` steps, and so all later ones.

    Source: Huang et al. 2025 (ICLR); numbers of their code. pytorch_optimizer.SPAM warms up along
    another curve, and has warmup=50.

    >>> print(*spam().rules)
    average_without_spikes debias scale_by_rms_eps_early warm_up_again sgd_step weight_decay
    """
    parts = (average_without_spikes, debias, scale_by_rms_eps_early, warm_up_again, sgd_step)
    return chain(
        *parts,
        weight_decay,
        lr=lr,
        mom=mom,
        sqr_mom=sqr_mom,
        eps=eps,
        spike=spike,
        restart_every=restart_every,
        patience=patience,
        warmup=warmup,
        wd=wd,
    )
