"""Optimizers that take of the gradient its direction only: signs, and gradients of length 1."""

from functional_sgd.catalogue.parts import given, recipe
from functional_sgd.chaining import Chain, chain
from functional_sgd.rules import (
    average_grad,
    l2_reg,
    normalize,
    scale_by_param_rms,
    sgd_step,
    take_sign,
    weight_decay,
)
from functional_sgd.trial import rename

__all__ = ["normalized_sgd", "sign_sgd", "signum", "tiger"]


@recipe
def sign_sgd(lr: float = 1e-3, wd: float = 0.0) -> Chain:
    """Steps of equal size against the sign of the gradient; decoupled weight decay.

    Source: Bernstein et al. 2018 (ICML); numbers of optax.sign_sgd.

    >>> print(*sign_sgd().rules)
    weight_decay take_sign sgd_step
    """
    return chain(weight_decay, take_sign, sgd_step, lr=lr, wd=wd)


@recipe
def signum(lr: float = 1e-3, mom: float = 0.9, wd: float = 0.0) -> Chain:
    """Steps of equal size against the sign of the running mean of the gradients; decoupled weight
    decay.

    Source: Bernstein et al. 2018 (ICML); numbers of optax.signum.

    >>> print(*signum().rules)
    weight_decay average_grad take_sign sgd_step
    """
    return chain(weight_decay, average_grad, take_sign, sgd_step, lr=lr, mom=mom, wd=wd)


@recipe
def tiger(lr: float = 1e-3, mom: float = 0.965, wd: float = 0.01, min_rms: float = 0.0) -> Chain:
    """Signum in which a leaf moves in proportion to its own size; so does its weight decay.

    param = param - lr * max(rms(param), min_rms) * (sign(grad_avg) + wd * param)

    A leaf of zeros stays, unless min_rms is above 0, which the author does not have. For biases
    and norms he takes half of lr, no size and no decay: `partition` with
    `signum(lr=5e-4, mom=0.965)`. pytorch_optimizer.Tiger leaves the size out everywhere, so it is
    `signum(mom=0.965, wd=0.01)`.

    Source: Su 2023 (kexue.fm/archives/9512); numbers of the author's code.

    >>> print(*tiger().rules)
    average_grad take_sign rename(l2_reg, grad='update') scale_by_param_rms sgd_step
    """
    # l2_reg of the update is decoupled decay, which is scaled by the size of the leaf like the
    # rest.
    decay = rename(l2_reg, grad="update")
    parts = (average_grad, take_sign, decay, scale_by_param_rms, sgd_step)
    return chain(*parts, lr=lr, mom=mom, wd=wd, min_rms=min_rms)


@recipe
def normalized_sgd(lr: float = 1e-2, mom: float | None = None, eps: float = 1e-6) -> Chain:
    """Steps whose length is lr, all leaves together; with `mom`, along the running mean of the
    gradients.

    param = param - lr * update / (|update| + eps), of all leaves

    Source: Hazan et al. 2015 (NeurIPS), with momentum Cutkosky and Mehta 2020 (ICML); numbers of
    optax.normalize_by_update_norm.

    >>> print(*normalized_sgd(mom=0.9).rules)
    average_grad rename(normalize, grad='update') sgd_step
    """
    average = [] if mom is None else [average_grad]
    last = rename(normalize, grad="update")
    return chain(*average, last, sgd_step, **given(lr=lr, mom=mom, eps=eps))
