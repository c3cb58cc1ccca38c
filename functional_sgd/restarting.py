"""Go on from other params: those of another step, or of a file."""

import optree
import torch
from torch import Tensor

from functional_sgd.chained import Planned
from functional_sgd.fusion.fused import Fused
from functional_sgd.optimizer import Optimizer
from functional_sgd.sharded import local
from functional_sgd.signature import STEP, Initializer
from functional_sgd.state import State
from functional_sgd.tree import Tree, flatten, unflatten
from functional_sgd.wiring import CALLS


@torch.no_grad()
def restarted(opt: Optimizer, params: Tree, state: State) -> State:
    """The state of an optimizer whose params were replaced by these.

    What it keeps of the old ones (an average, the point that it began at, or looks back to) begins
    again with these, as in `opt.init`. Everything else, such as averages of gradients, and all
    counts, stays.

    >>> from functional_sgd import average_params, sgd
    >>> opt = average_params(sgd(lr=1.0), decay=0.5)
    >>> params = {"w": torch.tensor([1.0])}
    >>> _, state = opt(params, params, opt.init(params))
    >>> opt.evaluated(params, restarted(opt, params, state))
    {'w': tensor([1.])}
    """
    if isinstance(opt, Fused):
        opt = opt.opt
    if isinstance(opt, Planned) and not _keeps_params(opt, params):
        return state  # as most do, which saves two states that would only be compared
    leaves, spec = flatten(state)
    fresh, _ = flatten(opt.init(params))
    if all(map(_same, leaves, fresh)):
        return state  # as that of a run which begins
    depends = _depend_on_params(opt, params)
    for place, made_of_params in enumerate(depends):
        if made_of_params:
            leaves[place] = fresh[place]
    result: State = unflatten(spec, leaves)
    return result


def _depend_on_params(opt: Optimizer, params: Tree) -> list[bool]:
    """Which leaves of a fresh state depend on the values of the params: copies, and what is made
    of them.
    """
    zeros, _ = flatten(opt.init(optree.tree_map(torch.zeros_like, params)))
    ones, _ = flatten(opt.init(optree.tree_map(torch.ones_like, params)))
    return [not _same(zero, one) for zero, one in zip(zeros, ones, strict=True)]


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(local(one), local(other))


def is_untouched(state: object) -> bool:
    """Whether an optimizer has taken no step with this state; of meta tensors nobody can tell."""
    if not isinstance(state, dict):
        return True
    for name, value in state.items():
        if name in (STEP, CALLS):
            if value.is_meta or bool(value.any()):
                return False
        elif not isinstance(value, Tensor) and not is_untouched(value):
            return False
    return True


def _keeps_params(opt: Planned, params: Tree) -> bool:
    """Whether a slot of some rule begins with a value that depends on those of its param."""
    # One element tells: the numbers of axes are those of the param, for shapes of their own.
    small = {(leaf.dim(), leaf.dtype, leaf.device): leaf for leaf in flatten(params)[0]}
    for rule in opt.rules:
        for initializer in rule.initializers.values():
            if any(_depends(initializer, leaf) for leaf in small.values()):
                return True
    return False


def _depends(initializer: Initializer, leaf: Tensor) -> bool:
    shape = (1,) * leaf.dim()
    zero = torch.zeros(shape, dtype=leaf.dtype, device=leaf.device)
    one, other = initializer(zero), initializer(torch.ones_like(zero))
    return not torch.equal(one, other)
