"""Rules that decide how params of half precision are rounded when they are stored."""

import torch
from torch import Tensor

from functional_sgd.randomness import Key
from functional_sgd.rounding import rounded, rounded_randomly
from functional_sgd.rule import elementwise

__all__ = ["compensate_rounding", "round_stochastically"]


@elementwise
def round_stochastically(param: Tensor, *, key: Key, dtype: torch.dtype) -> dict[str, Tensor]:
    """Round the new parameters up or down by chance, so that steps too small to be stored are not
    lost: their mean arrives.

    param = the neighbour above with probability (param - below) / (above - below), else below

    The neighbours are those that the leaf's dtype has, bfloat16 or float16; leaves of other dtypes
    stay as they are. It is the last rule of a chain: what comes after it is rounded to nearest
    again. Reads param, key and dtype. Source: Gupta et al. 2015, "Deep learning with limited
    numerical precision"; for bfloat16 Zamirai et al. 2020.

    >>> from functional_sgd import chain, sgd
    >>> small = dict(params=torch.ones(10_000).bfloat16(), grads=torch.ones(10_000).bfloat16())
    >>> nearest, random = sgd(lr=1e-3), chain(sgd(lr=1e-3), round_stochastically)
    >>> for opt in (nearest, random):
    ...     after, _ = opt(**small, state=opt.init(small["params"]))
    ...     print(f"{after.float().mean():.4f}")
    1.0000
    0.9990
    """
    return dict(param=rounded_randomly(param, dtype, key))


def nothing_lost(param: Tensor) -> Tensor:
    """Zeros in bfloat16: what is lost in rounding is small, so few digits of it do."""
    dtype = torch.float64 if param.dtype == torch.float64 else torch.bfloat16
    return torch.zeros_like(param, dtype=dtype)


@elementwise(lost=nothing_lost)
def compensate_rounding(param: Tensor, lost: Tensor, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """Round the new parameters to nearest, keep what that took away, and add it at the next step:
    16 digits for 4 bytes, without chance.

    whole = param + lost;  param = nearest(whole);  lost = whole - param

    nearest is that of the leaf's dtype, bfloat16 or float16; leaves of other dtypes stay as they
    are, and lose nothing. It is the last rule of a chain. Reads param and dtype. Keeps lost, in
    bfloat16, which starts at 0. Source: Kahan 1965; for bfloat16 Zamirai et al. 2020, "Revisiting
    BFloat16 training".

    >>> compensate_rounding(torch.tensor([1.003]), torch.tensor([0.002]), dtype=torch.bfloat16)
    {'param': tensor([1.0078]), 'lost': tensor([-0.0028])}
    """
    whole = param + lost
    kept = rounded(whole, dtype)
    return dict(param=kept, lost=whole - kept)
