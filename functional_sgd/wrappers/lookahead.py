"""Lookahead: k steps forward, one step back."""

from typing import overload

from functional_sgd.chained import Chained
from functional_sgd.chaining import Chain, chain
from functional_sgd.optimizer import Optimizer
from functional_sgd.rules.stepping import sync_slow_params


@overload
def lookahead(opt: Chain, sync_every: int = 6, slow_step: float = 0.5) -> Chain: ...
@overload
def lookahead(opt: Optimizer, sync_every: int = 6, slow_step: float = 0.5) -> Chain | Chained: ...
def lookahead(opt: Optimizer, sync_every: int = 6, slow_step: float = 0.5) -> Chain | Chained:
    """The optimizer, with slow weights that follow every `sync_every` steps, where it goes on from.

    One more rule, `sync_slow_params`, at the end of the chain; the averages inside are kept across
    a sync. Evaluate with the slow weights, `state["slow_param"]`, or right after a sync, where both
    are equal. Source: Zhang et al. 2019.

    >>> from functional_sgd import sgd
    >>> lookahead(sgd(lr=0.1))
    chain(sgd_step, sync_slow_params, lr=0.1, sync_every=6, slow_step=0.5)
    """
    return chain(opt, sync_slow_params, sync_every=sync_every, slow_step=slow_step)
