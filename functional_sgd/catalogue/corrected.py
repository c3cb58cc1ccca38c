"""AdamW on gradients that are corrected by those before: by how they change, or by what stays."""

from functional_sgd.catalogue.adaptive import adamw
from functional_sgd.catalogue.parts import recipe
from functional_sgd.chaining import Chain, chain
from functional_sgd.rules import (
    average_grad,
    average_sqr_grad,
    clip_leaf_norm,
    debias,
    grokfast,
    reduce_variance,
    scale_by_rms,
    sgd_step,
    weight_decay,
)

__all__ = ["grokfast_adamw", "mars"]


@recipe
def mars(
    lr: float = 3e-3,
    mom: float = 0.95,
    sqr_mom: float = 0.99,
    gamma: float = 0.025,
    max_norm: float = 1.0,
    eps: float = 1e-8,
    wd: float = 0.0,
) -> Chain:
    """AdamW on gradients that are corrected by how they have changed, and clipped leaf by leaf.

    grad = grad + gamma * mom / (1 - mom) * (grad - last_grad), shortened to max_norm

    Its authors give vectors to AdamW: `partition` does that here. Source: Yuan et al. 2024; numbers
    of its authors' MARS-AdamW with optimize_1d=True.

    >>> print(*mars().rules[:3])
    weight_decay reduce_variance clip_leaf_norm
    >>> print(*mars().rules[3:])
    average_grad average_sqr_grad debias scale_by_rms sgd_step
    """
    front = (weight_decay, reduce_variance, clip_leaf_norm)
    parts = (*front, average_grad, average_sqr_grad, debias, scale_by_rms, sgd_step)
    hypers = dict(mom=mom, sqr_mom=sqr_mom, gamma=gamma, max_norm=max_norm, eps=eps)
    return chain(*parts, lr=lr, **hypers, wd=wd)


@recipe
def grokfast_adamw(
    lr: float = 1e-4,
    mom: float = 0.9,
    sqr_mom: float = 0.99,
    eps: float = 1e-8,
    slow_mom: float = 0.98,
    amplify: float = 2.0,
    wd: float = 0.0,
) -> Chain:
    """AdamW on gradients whose slow part is amplified, which makes networks grok sooner.

    grad = grad + amplify * slow average of grad, and then adamw

    Source: Lee et al. 2024 (arXiv), its filter Grokfast-EMA; numbers of
    pytorch_optimizer.GrokFastAdamW without normalize_lr, which divides lr by 1 + amplify, and with
    eps=0: its divisor is max(root, eps).

    >>> print(*grokfast_adamw().rules[:3])
    grokfast weight_decay average_grad
    """
    inner = adamw(lr, mom, sqr_mom, eps, wd)
    return chain(grokfast, inner, slow_mom=slow_mom, amplify=amplify)
