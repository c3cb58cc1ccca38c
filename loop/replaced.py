"""Params that were put into a state by hand: the best, an average, those of a file.

An optimizer may keep copies of params: an average to be evaluated, or the point that it looks back
to. They are of the params that were there before, so nobody asks for them until the next training
batch, with which they begin again.
"""

from collections.abc import Mapping

from torch import Tensor

from functional_sgd import Optimizer
from functional_sgd.restarting import is_untouched, restarted
from functional_sgd.tracing import recorded
from loop.state import State, Tensors

REPLACED = "replaced_params"
"""What a state remembers as long as its params are those that were put in."""

TRAINED = "trained_params"
"""Where the trained tensors are kept while a validation batch sees the average of AverageParams."""


def with_weights(state: State, params: Tensors, buffers: Tensors) -> State:
    """The state with other params and buffers: they are what is evaluated, and what a training goes
    on from.
    """
    return state.replace(params=params, buffers=buffers).remember(REPLACED, True)


def is_replaced(state: State) -> bool:
    """Whether its params were put in, and nothing has been trained since."""
    return REPLACED in state.memory


def evaluated(state: State, opt: Optimizer) -> Mapping[str, Tensor]:
    """The params to evaluate: an average, if the optimizer keeps one for that."""
    if not opt.averages or is_replaced(state) or TRAINED in state.memory:
        return state.params
    # Whoever makes a state may put params into it that the optimizer has never seen.
    if state.train_iter == 0 and is_untouched(state.opt_state):
        return state.params
    params: Mapping[str, Tensor] = opt.evaluated(state.params, state.opt_state)
    return params


def to_be_trained(state: State, opt: Optimizer) -> State:
    """The state for a training batch: if its params were put in, the optimizer begins again with
    them.
    """
    if is_replaced(state):
        state = state.forget(REPLACED)
    elif state.train_iter or recorded() or not is_untouched(state.opt_state):
        return state  # a graph has no values to look at: its batch has been here before
    return state.replace(opt_state=restarted(opt, state.params, state.opt_state))
