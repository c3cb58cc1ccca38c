"""Optimizers that are told the diagonal of the Hessian."""

from functional_sgd.catalogue.parts import recipe
from functional_sgd.chaining import Chain, chain
from functional_sgd.rules import (
    average_curvature,
    average_grad,
    average_sqr_grad,
    debias,
    scale_by_curvature,
    scale_by_rms,
    sgd_step,
    weight_decay,
)
from functional_sgd.trial import rename

__all__ = ["adahessian", "sophia"]


@recipe
def sophia(
    lr: float = 1e-4,
    mom: float = 0.965,
    sqr_mom: float = 0.99,
    rho: float = 0.04,
    eps: float = 1e-12,
    hessian_every: int = 10,
    wd: float = 0.1,
) -> Chain:
    """Momentum divided by a running mean of the curvature, cut to steps of lr for each element;
    decoupled weight decay.

    update = clip(grad_avg / max(rho * curvature, eps), -1, 1)

    The caller passes an estimate of the Hessian's diagonal, `opt(params, grads, state,
    hessian=tree)`; it is looked at every hessian_every-th step, and may be zeros at the others.
    It is Hutchinson's (z * Hz with random z: Sophia-H), or the batch size times the squared
    gradient for labels that the model has drawn (Gauss-Newton-Bartlett: Sophia-G).
    The authors' code adds 1e-15 to rho * curvature in place of the maximum, which is the paper's.

    Source: Liu et al. 2024 (ICLR), algorithm 3; with hessian_every=1, numbers of
    pytorch_optimizer.SophiaH(lr / rho, p=rho, weight_decay=rho * wd, eps=eps / rho).

    >>> sophia().required
    ('hessian',)
    >>> print(*sophia().rules)
    weight_decay average_grad average_curvature scale_by_curvature sgd_step
    """
    return chain(
        *(weight_decay, average_grad, average_curvature, scale_by_curvature, sgd_step),
        lr=lr,
        mom=mom,
        sqr_mom=sqr_mom,
        rho=rho,
        eps=eps,
        hessian_every=hessian_every,
        wd=wd,
    )


@recipe
def adahessian(
    lr: float = 0.15,
    mom: float = 0.9,
    sqr_mom: float = 0.999,
    eps: float = 1e-4,
    wd: float = 0.0,
) -> Chain:
    """Adam that divides by the curvature of each direction, not by how steep it has been; decoupled
    weight decay.

    sqr_avg = sqr_mom * sqr_avg + (1 - sqr_mom) * hessian**2;  the rest as in adamw

    The caller passes an estimate of the Hessian's diagonal at every step, `opt(params, grads,
    state, hessian=tree)`: Hutchinson's (z * Hz with random z). The authors first average it over
    the kernel of a convolution, and over pairs of a matrix; that is done outside.

    Source: Yao et al. 2021 (AAAI), defaults of its code; numbers of pytorch_optimizer.AdaHessian
    for the same Hessians, which has lr=0.1 and eps=1e-16.

    >>> adahessian().required
    ('hessian',)
    >>> print(*adahessian().rules[:3])
    weight_decay average_grad rename(average_sqr_grad, grad='hessian')
    """
    squares = rename(average_sqr_grad, grad="hessian")
    parts = (weight_decay, average_grad, squares, debias, scale_by_rms, sgd_step)
    return chain(*parts, lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)
