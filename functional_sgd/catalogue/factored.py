"""Optimizers whose state is much smaller than the params: squares by row and column."""

from functional_sgd.catalogue.parts import given, recipe
from functional_sgd.chaining import Chain, chain
from functional_sgd.rules import (
    clip_rms,
    relative_step,
    scale_by_factored_rms,
    scale_by_param_rms,
    weight_decay,
)
from functional_sgd.trial import rename

__all__ = ["adafactor"]


@recipe
def adafactor(
    lr: float = 1e-2,
    sqr_mom_decay: float = 0.8,
    eps: float = 2**-23,
    min_rms: float = 1e-3,
    max_rms: float = 1.0,
    wd: float | None = None,
) -> Chain:
    """RMSProp with one mean square for each row and column, and steps relative to the size of the
    leaf. `wd` is decoupled, as in torch.optim.Adafactor.

    sqr_mom at step t is 1 - t**-sqr_mom_decay; the update is cut to a root mean square of
    `max_rms`; the rate is min(lr, 1 / sqrt(t)) * max(root mean square of the leaf, min_rms).

    Source: Shazeer and Stern 2018; numbers of torch.optim.Adafactor: there `beta2_decay` is
    -sqr_mom_decay, `eps` is (eps, min_rms), `d` is max_rms. Its eps is by default that of the first
    param's dtype, ours that of float32: for float64, pass torch.finfo(torch.float64).eps.

    >>> print(*adafactor().rules)
    scale_by_factored_rms rename(clip_rms, grad='update') scale_by_param_rms relative_step
    """
    decay = [] if wd is None else [weight_decay]
    # The size of a leaf is taken before it is decayed, as in torch.optim.Adafactor.
    parts = (scale_by_factored_rms, rename(clip_rms, grad="update"), scale_by_param_rms, *decay)
    hypers = given(
        lr=lr, sqr_mom_decay=sqr_mom_decay, eps=eps, min_rms=min_rms, max_rms=max_rms, wd=wd
    )
    return chain(*parts, relative_step, **hypers)
