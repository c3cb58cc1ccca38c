"""Adam's and Lion's kin that ask this gradient once more before they move, or move only as far as
gradients can be believed.
"""

from functional_sgd.catalogue.parts import given, recipe
from functional_sgd.chaining import Chain, chain
from functional_sgd.rules import (
    average_grad,
    average_sqr_grad,
    cautious,
    debias,
    follow_sign,
    limit_by_past_rates,
    scale_by_rms,
    scale_by_signal,
    sgd_step,
    sign_of_average,
    take_step,
    weight_decay,
)
from functional_sgd.trial import rename

__all__ = [
    "adamod",
    "cautious_adamw",
    "cautious_lion",
    "grams",
    "msvag",
]


@recipe
def cautious_adamw(
    lr: float = 1e-3, mom: float = 0.9, sqr_mom: float = 0.999, eps: float = 1e-8, wd: float = 0.0
) -> Chain:
    """AdamW that moves no element against its gradient of this step.

    Any other optimizer becomes cautious the same way: put `cautious` in front of its step.
    Source: Liang et al. 2024; the mask of its authors' code, and torch's AdamW (their class has
    eps = 1e-6).

    >>> print(*cautious_adamw().rules)
    weight_decay average_grad average_sqr_grad debias scale_by_rms cautious sgd_step
    """
    moments = (average_grad, average_sqr_grad, debias, scale_by_rms)
    return chain(
        weight_decay, *moments, cautious, sgd_step, lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd
    )


@recipe
def cautious_lion(
    lr: float = 1e-4, mom: float = 0.9, slow_mom: float = 0.99, wd: float = 0.0
) -> Chain:
    """Lion that moves no element against its gradient of this step.

    Source: Liang et al. 2024; numbers of its authors' code. pytorch_optimizer.Lion(cautious=True)
    divides by (count + 1) / size, as the paper does, in place of the mean of the mask.

    >>> print(*cautious_lion().rules)
    weight_decay sign_of_average cautious sgd_step
    """
    parts = (weight_decay, sign_of_average, cautious, sgd_step)
    return chain(*parts, lr=lr, mom=mom, slow_mom=slow_mom, wd=wd)


@recipe
def grams(
    lr: float = 1e-3, mom: float = 0.9, sqr_mom: float = 0.999, eps: float = 1e-6, wd: float = 0.0
) -> Chain:
    """AdamW that goes as far as its averages say, in the direction of this gradient.

    update = |Adam's| * sign(grad)

    Source: Cao et al. 2024 (arXiv 2412.17107); numbers of pytorch_optimizer.Grams.

    >>> print(*grams().rules)
    weight_decay average_grad average_sqr_grad debias scale_by_rms follow_sign sgd_step
    """
    moments = (average_grad, average_sqr_grad, debias, scale_by_rms)
    parts = (weight_decay, *moments, follow_sign, sgd_step)
    return chain(*parts, lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)


@recipe
def adamod(
    lr: float = 1e-3,
    mom: float = 0.9,
    sqr_mom: float = 0.99,
    rate_mom: float = 0.9999,
    eps: float = 1e-8,
    wd: float = 0.0,
) -> Chain:
    """Adam whose rate for each element is at most the running mean of its rates, which begins at 0;
    decoupled weight decay.

    rate = lr * Adam's scale;  update = min(rate, average of rate) * grad_avg

    Source: Ding et al. 2019 (arXiv 1910.12249), whose betas are mom=0.9, sqr_mom=0.999 and
    rate_mom=0.999; numbers and defaults of pytorch_optimizer.AdaMod.

    >>> print(*adamod().rules)
    weight_decay average_grad average_sqr_grad limit_by_past_rates take_step
    """
    parts = (weight_decay, average_grad, average_sqr_grad, limit_by_past_rates, take_step)
    return chain(*parts, lr=lr, mom=mom, sqr_mom=sqr_mom, rate_mom=rate_mom, eps=eps, wd=wd)


@recipe
def msvag(lr: float = 1e-2, mom: float = 0.9, wd: float | None = None) -> Chain:
    """Momentum in which each element goes as far as its average can be told from noise. `wd` is
    decoupled.

    update = grad_avg**3 / (grad_avg**2 + variance of grad_avg), both averages of one momentum and
    debiased

    Source: Balles and Hennig 2018 (ICML), M-SVAG; numbers of pytorch_optimizer.MSVAG.

    >>> print(*msvag().rules)
    average_grad rename(average_sqr_grad, sqr_mom='mom') scale_by_signal sgd_step
    """
    decay = [] if wd is None else [weight_decay]
    squares = rename(average_sqr_grad, sqr_mom="mom")
    parts = (average_grad, squares, scale_by_signal, sgd_step)
    return chain(*decay, *parts, **given(lr=lr, mom=mom, wd=wd))
