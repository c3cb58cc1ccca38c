"""Optimizers that adapt like Adam, and keep less: of squares, no number for each element."""

from functional_sgd.catalogue.parts import recipe
from functional_sgd.chaining import Chain, chain
from functional_sgd.optimizer import Optimizer
from functional_sgd.rules import (
    average_grad,
    average_sqr_grad,
    average_sqr_rows,
    clip_rms,
    debias,
    debias_rate,
    limit_norm_growth,
    scale_by_axes,
    scale_by_confidence,
    scale_by_factors,
    scale_by_rms,
    scale_by_rms_eps_early,
    scale_by_sketch,
    scale_channels_by_sketch,
    sgd_step,
    weight_decay,
)
from functional_sgd.rules.sketching import of_rank
from functional_sgd.trial import rename
from functional_sgd.wrappers import low_rank

__all__ = ["adam_mini", "apollo", "apollo_mini", "came", "galore", "sm3"]


@recipe
def sm3(lr: float = 0.1, mom: float = 0.9, eps: float = 0.0) -> Chain:
    """Adagrad that keeps one number for each entry of each axis, and momentum.

    update = mean of grad / sqrt(bound + eps); bound as in `scale_by_axes`

    Needs a warm-up of lr. The authors have no eps; optax has 1e-8, pytorch_optimizer 1e-30.

    Source: Anil et al. 2019 (NeurIPS), SM3-II; numbers of optax.sm3 with eps=1e-8.

    >>> print(*sm3().rules)
    scale_by_axes rename(average_grad, grad='update') sgd_step
    """
    average = rename(average_grad, grad="update")
    return chain(scale_by_axes, average, sgd_step, lr=lr, mom=mom, eps=eps)


@recipe
def came(
    lr: float = 2e-4,
    mom: float = 0.9,
    sqr_mom: float = 0.999,
    doubt_mom: float = 0.9999,
    max_rms: float = 1.0,
    eps_sqr: float = 1e-30,
    eps_doubt: float = 1e-16,
    wd: float = 0.0,
) -> Chain:
    """Adafactor with momentum, which moves further where the updates agree with their average;
    decoupled weight decay.

    update = clip_rms(grad / root of factored squares);  average = mean of update
    param = param - lr * average / root of factored (update - average)**2

    Vectors move along the average itself. Weight decay comes first here; the authors subtract the
    same number last.

    Source: Luo et al. 2023 (ACL); numbers of their code.

    >>> print(*[rule.name for rule in came().rules])
    weight_decay scale_by_factors clip_rms average_grad scale_by_confidence sgd_step
    """
    clip = rename(clip_rms, grad="update")
    # The update stays what is averaged: scale_by_confidence compares the two.
    average = rename(average_grad, grad="update", update="average")
    return chain(
        *(weight_decay, scale_by_factors, clip, average, scale_by_confidence, sgd_step),
        lr=lr,
        mom=mom,
        sqr_mom=sqr_mom,
        doubt_mom=doubt_mom,
        max_rms=max_rms,
        eps_sqr=eps_sqr,
        eps_doubt=eps_doubt,
        wd=wd,
    )


@recipe
def adam_mini(
    lr: float = 1e-3, mom: float = 0.9, sqr_mom: float = 0.999, eps: float = 1e-8, wd: float = 0.0
) -> Chain:
    """AdamW with one mean square for each output unit, and one for a vector: half of Adam's state.

    adamw, with `average_sqr_rows` in place of `average_sqr_grad`

    The authors choose blocks by the names of parameters; these are theirs for embeddings, output
    layers, values, projections, MLPs and norms. They have one number for each head of queries and
    keys, coarser than ours, and all of Adam for biases: `partition` with `adamw`. Their defaults
    are these.

    Source: Zhang et al. 2025 (ICLR); numbers of their code, version 1.1.1.

    >>> print(*adam_mini().rules)
    weight_decay average_grad average_sqr_rows debias scale_by_rms sgd_step
    """
    parts = (average_grad, average_sqr_rows, debias, scale_by_rms, sgd_step)
    return chain(weight_decay, *parts, lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)


@recipe
def galore(
    lr: float = 1e-2,
    mom: float = 0.9,
    sqr_mom: float = 0.999,
    eps: float = 1e-6,
    wd: float = 0.0,
    rank: int = 128,
    basis_every: float = 200,
    update_scale: float = 0.25,
) -> Optimizer:
    """Adam on gradients of low rank, so that a matrix has rank numbers for each row in place of
    all; decoupled weight decay, after the step.

    param = param + update_scale * (Adam's step for grad B) B';  param = param * (1 - lr * wd)

    B is made of singular vectors of the gradient: see `low_rank`. Leaves of more than two axes are
    matrices too, which the authors leave to Adam.

    Source: Zhao et al. 2024 (ICML); numbers of their code.

    >>> galore().hyper["basis_every"]
    200
    """
    rules = (average_grad, average_sqr_grad, debias, scale_by_rms_eps_early, sgd_step)
    inner = chain(*rules, lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps)
    return chain(low_rank(inner, rank, basis_every, update_scale), weight_decay, lr=lr, wd=wd)


@recipe
def apollo(
    lr: float = 1e-2,
    mom: float = 0.9,
    sqr_mom: float = 0.999,
    eps: float = 1e-6,
    wd: float = 0.0,
    rank: int = 256,
    sketch_every: float = 200,
    growth: float = 1.01,
) -> Chain:
    """The gradient, with every row (or column) as long as Adam would make it, which a random sketch
    of low rank tells; decoupled weight decay, after the step.

    update = grad * |row of Adam on the sketch| / |row of the sketch|, at most `growth` times as
    long as the last one

    See `scale_channels_by_sketch`. The state of a matrix is rank numbers for each row, twice, and
    its shorter side times rank. A matrix whose shorter side is at most `rank` is its own sketch;
    the authors project it all the same. Leaves of more than two axes are matrices too, and vectors
    get Adam. After a gradient of zeros growth is free, where the authors let it begin at 1e-8; LoRA
    has such gradients in its first step.

    Source: Zhu et al. 2024 (MLSys 2025); numbers of their code.

    >>> print(*apollo().rules)
    scale_channels_by_sketch limit_norm_growth debias_rate sgd_step weight_decay
    """
    # The authors have the bias correction in their step size, so growth is limited without it.
    hypers = dict(lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)
    parts = (of_rank(scale_channels_by_sketch, rank), limit_norm_growth, debias_rate, sgd_step)
    return chain(*parts, weight_decay, **hypers, sketch_every=sketch_every, growth=growth)


@recipe
def apollo_mini(
    lr: float = 1e-2,
    mom: float = 0.9,
    sqr_mom: float = 0.999,
    eps: float = 1e-6,
    wd: float = 0.0,
    sketch_every: float = 200,
    sketch_scale: float = 128**0.5,
    growth: float = 1.01,
) -> Chain:
    """`apollo` with one length for a whole matrix, and a sketch of one row or column: hardly more
    state than sgd.

    update = sketch_scale * grad * |Adam on the sketch| / |sketch|, at most `growth` times as long
    as the last one

    The authors multiply by the root of a `scale` of 128 after growth is limited, or before it with
    `scale_front=True`, as here.

    Source: Zhu et al. 2024 (MLSys 2025); numbers of their code.

    >>> print(*apollo_mini().rules)
    scale_by_sketch limit_norm_growth debias_rate sgd_step weight_decay
    """
    hypers = dict(lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd, growth=growth)
    parts = (scale_by_sketch, limit_norm_growth, debias_rate, sgd_step, weight_decay)
    return chain(*parts, **hypers, sketch_every=sketch_every, sketch_scale=sketch_scale)
