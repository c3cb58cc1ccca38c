"""Optimizers that choose the length of each leaf's step by the leaf's own size."""

from functional_sgd.catalogue.descent import sgd
from functional_sgd.catalogue.parts import given, recipe
from functional_sgd.chaining import Chain, chain
from functional_sgd.rules import (
    average_grad,
    average_sqr_grad,
    debias,
    heavy_ball,
    l2_reg,
    larc_ratio,
    lars_grad,
    norm_ratio,
    scale_by_norm_avg,
    scale_by_rms,
    sgd_step,
    shrink,
    trust_ratio,
    weight_decay,
)
from functional_sgd.trial import rename

__all__ = ["fromage", "lamb", "larc", "lars", "novograd"]


@recipe
def larc(
    lr: float = 1e-3,
    mom: float = 0.9,
    trust_coeff: float = 0.02,
    eps: float = 1e-8,
    wd: float = 0.0,
) -> Chain:
    """SGD with momentum in which no layer moves far for its size; decoupled weight decay.

    Source: You et al. 2017; numbers of fastai. Without the ceiling, and with L2: `lars`.

    >>> print(*larc().rules)
    weight_decay heavy_ball larc_ratio sgd_step
    """
    # The decay in front, as in fastai: the ratio is that of params that have been decayed.
    parts = (weight_decay, heavy_ball, larc_ratio, sgd_step)
    return chain(*parts, lr=lr, mom=mom, trust_coeff=trust_coeff, eps=eps, wd=wd)


@recipe
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


@recipe
def lars(
    lr: float = 1e-3,
    mom: float = 0.9,
    trust_coeff: float = 0.001,
    eps: float = 0.0,
    wd: float = 0.0,
    nesterov: bool = False,
) -> Chain:
    """SGD with momentum, for large batches: the gradient of every layer is first brought to a
    length in proportion to the layer.

    grad = trust_coeff * |param| / (|grad| + wd * |param|) * (grad + wd * param), then sgd

    lr acts after momentum, as in torch.optim.SGD; the paper multiplies before, which is the same
    while lr stays. Biases and norms usually get plain sgd: `partition`.

    Source: You et al. 2017 (arXiv), algorithm 1; numbers of pytorch_optimizer.LARS for matrices,
    and without wd of optax.lars, whose divisor is |grad + wd * param|.

    >>> print(*lars().rules)
    lars_grad heavy_ball sgd_step
    """
    inner = sgd(lr, mom, nesterov)
    return chain(lars_grad, inner, trust_coeff=trust_coeff, eps=eps, wd=wd)


@recipe
def novograd(
    lr: float = 1e-3,
    mom: float = 0.95,
    sqr_mom: float = 0.98,
    eps: float = 1e-8,
    wd: float | None = None,
) -> Chain:
    """Momentum of gradients that are divided by how long the gradients of their layer have been;
    half the state of Adam.

    velocity = mom * velocity + grad / (sqrt(average of |grad|**2) + eps) + wd * param

    `wd` is not decoupled: it goes through momentum. The average starts as the first square.
    Defaults of the paper's experiments on images; optax has mom=0.9, sqr_mom=0.25, eps=1e-6.

    Source: Ginsburg et al. 2019 (arXiv), algorithm 1; numbers of optax.novograd.

    >>> print(*novograd().rules)
    scale_by_norm_avg rename(heavy_ball, grad='update') sgd_step
    """
    decay = [] if wd is None else [rename(l2_reg, grad="update")]
    hypers = given(lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)
    ball = rename(heavy_ball, grad="update")
    return chain(scale_by_norm_avg, *decay, ball, sgd_step, **hypers)


@recipe
def fromage(lr: float = 1e-2) -> Chain:
    """Steps that are lr times as long as the layer that they move, which is then shrunk to undo the
    growth.

    param = (param - lr * |param| / |grad| * grad) / sqrt(1 + lr**2)

    The length of the gradient is taken as it is where it is 0, or that of the layer is.

    Source: Bernstein et al. 2020 (NeurIPS); numbers of their code, without its bound.

    >>> print(*fromage().rules)
    norm_ratio sgd_step shrink
    """
    return chain(norm_ratio, sgd_step, shrink, lr=lr)
