"""Optimizers that scale each element by how large its gradients are: RMSProp, Adam and kin."""

from functional_sgd import rules
from functional_sgd.catalogue.parts import given, l2, recipe
from functional_sgd.chaining import Chain, chain
from functional_sgd.optimizer import Optimizer
from functional_sgd.rules import (
    average_grad,
    average_sqr_grad,
    average_sqr_grad_from_one,
    center,
    debias,
    heavy_ball,
    keep_max_grad,
    nesterov_average,
    quasi_hyperbolic,
    rectify,
    rectify_eps_early,
    scale_by,
    scale_by_debiased_rms,
    scale_by_max,
    scale_by_rms,
    scale_by_rms_eps_early,
    scale_by_rms_eps_inside,
    sgd_step,
    take_step,
    weight_decay,
    weight_decay_by_square,
)
from functional_sgd.trial import rename
from functional_sgd.wrappers.lazy_rows import lazy_rows
from functional_sgd.wrappers.lookahead import lookahead

__all__ = [
    "adam",
    "adamax",
    "adamaxw",
    "adamc",
    "adamw",
    "nadam",
    "qhadam",
    "radam",
    "ranger",
    "rmsprop",
    "rmsprop_tf",
    "sparse_adam",
]


@recipe
def rmsprop(
    lr: float = 1e-2,
    sqr_mom: float = 0.99,
    eps: float = 1e-8,
    mom: float | None = None,
    centered: bool = False,
    wd: float | None = None,
) -> Chain:
    """SGD with the speed of every direction made equal. `mom` acts on the scaled update and `wd` is
    L2, as in torch.

    Source: Hinton, lecture 6e; numbers of torch.optim.RMSprop.

    >>> rmsprop(lr=0.1)
    chain(average_sqr_grad, scale_by_rms, sgd_step, lr=0.1, sqr_mom=0.99, eps=1e-08)
    """
    middle = [center] if centered else []
    ball = [] if mom is None else [rename(heavy_ball, grad="update")]
    hypers = given(lr=lr, sqr_mom=sqr_mom, eps=eps, mom=mom, wd=wd)
    return chain(*l2(wd), average_sqr_grad, *middle, scale_by_rms, *ball, sgd_step, **hypers)


@recipe
def rmsprop_tf(
    lr: float = 1e-2,
    sqr_mom: float = 0.9,
    eps: float = 1e-10,
    mom: float = 0.9,
    wd: float | None = None,
) -> Chain:
    """rmsprop as TensorFlow 1 has it, with which EfficientNets were trained. `wd` is L2.

    velocity = mom * velocity + lr * grad / sqrt(sqr_avg + eps);  param = param - velocity

    sqr_avg starts at 1, eps is in the root, and momentum remembers the rates. Source: Hinton,
    lecture 6e; numbers of timm's RMSpropTF, with mom=0.9, and of optax.rmsprop(decay=0.9,
    eps=1e-10, initial_scale=1, momentum=0.9).

    >>> print(*rmsprop_tf().rules[:2])
    average_sqr_grad_from_one scale_by_rms_eps_inside
    >>> print(*rmsprop_tf().rules[2:])
    rename(scale_by, factor='lr') rename(heavy_ball, grad='update') take_step
    """
    scale, ball = rename(scale_by, factor="lr"), rename(heavy_ball, grad="update")
    parts = (average_sqr_grad_from_one, scale_by_rms_eps_inside, scale, ball, take_step)
    return chain(*l2(wd), *parts, **given(lr=lr, sqr_mom=sqr_mom, eps=eps, mom=mom, wd=wd))


@recipe
def adam(
    lr: float = 1e-3,
    mom: float = 0.9,
    sqr_mom: float = 0.999,
    eps: float = 1e-8,
    wd: float | None = None,
    amsgrad: bool = False,
) -> Chain:
    """Momentum's and RMSProp's rules, and debias. `wd` is L2, as in torch.optim.Adam; adamw has the
    other kind. With `amsgrad`, divisors never become smaller.

    Source: Kingma and Ba 2015; Reddi et al. 2018 (AMSGrad); numbers of torch.optim.Adam.

    >>> print(*adam().rules)
    average_grad average_sqr_grad debias scale_by_rms sgd_step
    """
    largest = [rules.amsgrad] if amsgrad else []
    averages = (average_grad, average_sqr_grad, *largest, debias)
    hypers = given(lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)
    return chain(*l2(wd), *averages, scale_by_rms, sgd_step, **hypers)


@recipe
def adamw(
    lr: float = 1e-3,
    mom: float = 0.9,
    sqr_mom: float = 0.999,
    eps: float = 1e-8,
    wd: float = 1e-2,
    amsgrad: bool = False,
) -> Chain:
    """Adam after decoupled weight decay.

    Source: Loshchilov and Hutter 2019; numbers of torch.optim.AdamW.

    >>> print(*adamw().rules)
    weight_decay average_grad average_sqr_grad debias scale_by_rms sgd_step
    """
    return chain(weight_decay, adam(lr, mom, sqr_mom, eps, amsgrad=amsgrad), wd=wd)


@recipe
def adamc(
    lr: float = 1e-3,
    mom: float = 0.9,
    sqr_mom: float = 0.999,
    eps: float = 1e-8,
    max_lr: float | None = None,
    wd: float = 1e-2,
) -> Chain:
    """AdamW for a scheduled lr, whose decay falls with the square of it: at the end of a schedule,
    gradients do not grow.

    param = (1 - lr**2 / max_lr * wd) * param, and then adam

    `max_lr` is the largest lr of the schedule; if it is not given here, it must be passed at each
    call. For layers that a normalization follows; the others get adamw: `partition`.

    Source: Defazio 2025 (arXiv 2506.02285); numbers of pytorch_optimizer.AdamC for groups that are
    "normalized" and eps=0, which it adds before the bias is corrected.

    >>> print(*adamc(max_lr=1e-3).rules[:3])
    weight_decay_by_square average_grad average_sqr_grad
    >>> adamc().required
    ('max_lr',)
    """
    # Not lr by default: a schedule replaces that, and far above max_lr the decay overshoots.
    hypers = given(max_lr=max_lr, wd=wd)
    return chain(weight_decay_by_square, adam(lr, mom, sqr_mom, eps), **hypers)


@recipe
def adamax(
    lr: float = 2e-3,
    mom: float = 0.9,
    sqr_mom: float = 0.999,
    eps: float = 1e-8,
    wd: float | None = None,
) -> Chain:
    """Adam that divides by the largest gradient instead of the root of a mean square. `wd` is L2,
    as in torch.optim.Adamax.

    Source: Kingma and Ba 2015, section 7.1; numbers of torch.optim.Adamax.

    >>> print(*adamax().rules)
    average_grad keep_max_grad debias scale_by_max sgd_step
    """
    hypers = given(lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)
    return chain(*l2(wd), average_grad, keep_max_grad, debias, scale_by_max, sgd_step, **hypers)


@recipe
def adamaxw(
    lr: float = 2e-3,
    mom: float = 0.9,
    sqr_mom: float = 0.999,
    eps: float = 1e-8,
    wd: float = 1e-4,
) -> Chain:
    """adamax after decoupled weight decay.

    Source: Kingma and Ba 2015; Loshchilov and Hutter 2019; numbers of optax.adamaxw.

    >>> print(*adamaxw().rules)
    weight_decay average_grad keep_max_grad debias scale_by_max sgd_step
    """
    return chain(weight_decay, adamax(lr, mom, sqr_mom, eps), wd=wd)


@recipe
def nadam(
    lr: float = 2e-3,
    mom: float = 0.9,
    sqr_mom: float = 0.999,
    eps: float = 1e-8,
    mom_decay: float = 4e-3,
    wd: float | None = None,
) -> Chain:
    """Adam with Nesterov momentum, which begins at half its value. `wd` is L2, as in
    torch.optim.NAdam.

    Source: Dozat 2016; numbers of torch.optim.NAdam, which keeps the product of its momenta in
    torch's default dtype: to all digits only if that is the dtype of the params.

    >>> print(*nadam().rules)
    average_grad nesterov_average average_sqr_grad scale_by_debiased_rms sgd_step
    """
    # nesterov_average corrects the average by momenta of its own, so debias has only the squares
    # left.
    parts = (average_grad, nesterov_average, average_sqr_grad, scale_by_debiased_rms, sgd_step)
    hypers = given(lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, mom_decay=mom_decay, wd=wd)
    return chain(*l2(wd), *parts, **hypers)


@recipe
def sparse_adam(
    lr: float = 1e-3, mom: float = 0.9, sqr_mom: float = 0.999, eps: float = 1e-8
) -> Optimizer:
    """Adam for embeddings: rows without a gradient stay where they are, and so do their averages.

    Gradients may be sparse (torch.nn.Embedding(sparse=True)) or dense, with rows of zeros.

    Source: Kingma and Ba 2015; numbers of torch.optim.SparseAdam, with eps added before the bias is
    corrected.

    >>> print(*sparse_adam().inner[0].rules)
    average_grad average_sqr_grad debias scale_by_rms_eps_early sgd_step
    """
    parts = (average_grad, average_sqr_grad, debias, scale_by_rms_eps_early, sgd_step)
    return lazy_rows(chain(*parts, lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps))


@recipe
def radam(
    lr: float = 1e-3,
    mom: float = 0.9,
    sqr_mom: float = 0.999,
    eps: float = 1e-8,
    wd: float | None = None,
) -> Chain:
    """Adam that does not trust its averages until it has seen enough gradients. `wd` is L2, as in
    torch.optim.RAdam.

    Source: Liu et al. 2020; numbers of torch.optim.RAdam. With `rectify` in place of
    `rectify_eps_early`, fastai's.

    >>> print(*radam().rules)
    average_grad average_sqr_grad debias rectify_eps_early sgd_step
    """
    hypers = given(lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)
    return chain(
        *l2(wd), average_grad, average_sqr_grad, debias, rectify_eps_early, sgd_step, **hypers
    )


@recipe
def qhadam(
    lr: float = 1e-3,
    mom: float = 0.999,
    sqr_mom: float = 0.999,
    nu_1: float = 0.7,
    nu_2: float = 1.0,
    eps: float = 1e-8,
    wd: float = 0.0,
) -> Chain:
    """Adam that mixes its averages with the gradient of the moment; decoupled weight decay.

    Source: Ma and Yarats 2019; numbers of fastai.

    >>> print(*qhadam().rules)
    weight_decay average_grad average_sqr_grad debias quasi_hyperbolic scale_by_rms sgd_step
    """
    parts = (average_grad, average_sqr_grad, debias, quasi_hyperbolic, scale_by_rms, sgd_step)
    return chain(
        weight_decay,
        *parts,
        lr=lr,
        mom=mom,
        sqr_mom=sqr_mom,
        nu_1=nu_1,
        nu_2=nu_2,
        eps=eps,
        wd=wd,
    )


@recipe
def ranger(
    lr: float = 1e-3,
    mom: float = 0.95,
    sqr_mom: float = 0.99,
    eps: float = 1e-6,
    wd: float = 0.01,
    sync_every: int = 6,
    slow_step: float = 0.5,
) -> Chain:
    """RAdam with decoupled weight decay, inside Lookahead.

    Source: Wright 2019; numbers of fastai.

    >>> print(*ranger().rules)
    weight_decay average_grad average_sqr_grad debias rectify sgd_step sync_slow_params
    """
    parts = (weight_decay, average_grad, average_sqr_grad, debias, rectify, sgd_step)
    inner = chain(*parts, lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)
    return lookahead(inner, sync_every=sync_every, slow_step=slow_step)
