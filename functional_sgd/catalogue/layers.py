"""Optimizers that choose the length of each leaf's step by the leaf's own size."""

from functional_sgd.chaining import Chain, chain
from functional_sgd.rules import (
    average_grad,
    average_sqr_grad,
    debias,
    heavy_ball,
    larc_ratio,
    scale_by_rms,
    sgd_step,
    trust_ratio,
    weight_decay,
)

__all__ = ["lamb", "larc"]


def larc(
    lr: float = 1e-3,
    mom: float = 0.9,
    trust_coeff: float = 0.02,
    eps: float = 1e-8,
    wd: float = 0.0,
) -> Chain:
    """SGD with momentum in which no layer moves far for its size; decoupled weight decay.

    Source: You et al. 2017; numbers of fastai. With `lars_ratio` in place of `larc_ratio`, LARS.

    >>> print(*larc().rules)
    weight_decay heavy_ball larc_ratio sgd_step
    """
    parts = (weight_decay, heavy_ball, larc_ratio, sgd_step)
    return chain(*parts, lr=lr, mom=mom, trust_coeff=trust_coeff, eps=eps, wd=wd)


def lamb(
    lr: float = 1e-3,
    mom: float = 0.9,
    sqr_mom: float = 0.99,
    eps: float = 1e-5,
    max_trust: float = 10.0,
    wd: float = 0.0,
) -> Chain:
    """Adam in which every layer moves in proportion to its size; decoupled weight decay, outside
    the ratio.

    Source: You et al. 2020; numbers of fastai.

    >>> print(*lamb().rules)
    weight_decay average_grad average_sqr_grad debias scale_by_rms trust_ratio sgd_step
    """
    parts = (average_grad, average_sqr_grad, debias, scale_by_rms, trust_ratio, sgd_step)
    return chain(
        weight_decay,
        *parts,
        lr=lr,
        mom=mom,
        sqr_mom=sqr_mom,
        eps=eps,
        max_trust=max_trust,
        wd=wd,
    )
