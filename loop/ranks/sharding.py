"""States of which every rank holds its pieces."""

from typing import Any

import optree
from torch import Tensor

from functional_sgd.sharded import distributed, full
from functional_sgd.state import seeded
from loop.learner import Learner
from loop.state import State


def shard(learner: Learner, state: State, mesh: Any) -> State:
    """The same state, in pieces: every rank holds its rows of each param and of each slot.

    Params and slots become DTensors on `mesh` (a DeviceMesh of any number of dimensions): their
    first axis is cut over the last dimension of the mesh, and replicated over the others. Numbers
    and buffers stay as they are; so does what callbacks remember, except trees of tensors by the
    names of params, such as averages. The learner's model must be `gathering`. Call it on all ranks
    with equal states; no rank needs the others for it.

    >>> start = shard(learner, learner.init(), mesh)  # doctest: +SKIP
    """
    params = {name: _cut(value, mesh) for name, value in state.params.items()}
    template: Any = seeded(learner.opt.init(params), state.seed)
    slots: Any = state.opt_state
    opt_state = optree.tree_map(_like, template, slots)
    memory = {name: _by_name(value, params) for name, value in state.memory.items()}
    return state.replace(params=params, opt_state=opt_state, memory=memory)


def unshard(state: State) -> State:
    """The same state with whole tensors on every rank. Call it on all ranks: they exchange pieces.

    For `learner.load`, `save`, or a run on one process.
    """
    trees: Any = (dict(state.params), dict(state.opt_state), dict(state.memory))
    params, opt_state, memory = optree.tree_map(full, trees)
    return state.replace(params=params, opt_state=opt_state, memory=memory)


def _cut(value: Tensor, mesh: Any) -> Tensor:
    from torch.distributed.tensor import Replicate, Shard

    last = Shard(0) if value.dim() else Replicate()
    return _placed(value, mesh, [*[Replicate()] * (mesh.ndim - 1), last])


def _placed(value: Tensor, mesh: Any, placements: Any) -> Tensor:
    """A tensor that all ranks have, cut without a word to the others."""
    from torch.distributed.tensor import distribute_tensor

    if distributed(value):
        return value
    cut: Tensor = distribute_tensor(value.detach(), mesh, placements, src_data_rank=None)
    return cut


def _like(template: Any, value: Any) -> Any:
    """A slot, as that of a fresh state lies."""
    if not distributed(template):
        return value
    return _placed(value, template.device_mesh, template.placements)


def _by_name(value: Any, params: dict[str, Tensor]) -> Any:
    """What a callback remembers, with trees like params cut like them."""
    if not isinstance(value, dict):
        return value
    return {
        name: _like(params[name], one)
        if name in params and isinstance(one, Tensor) and one.shape == params[name].shape
        else _by_name(one, params)
        for name, one in value.items()
    }
