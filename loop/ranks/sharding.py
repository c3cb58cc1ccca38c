"""States of which every rank holds its pieces."""

from typing import Any

import optree
from torch import Tensor

from functional_sgd.sharded import distributed, full
from functional_sgd.state import seeded
from loop.layout import cut_like, in_rows
from loop.learner import Learner
from loop.state import State


def shard(learner: Learner, state: State, mesh: Any) -> State:
    """The same state, in pieces: every rank holds its rows of each param and of each slot.

    Params and slots become DTensors on `mesh` (a DeviceMesh of any number of dimensions): their
    first axis is cut over the last dimension of the mesh, and replicated over the others. Numbers
    and buffers stay as they are; so does what callbacks remember, except trees of tensors by the
    names of params, such as averages. The learner's model must be `gathering`. Call it on all ranks
    with equal states; no rank needs the others for it.

    A process alone has all of them:

    >>> import torch.distributed as dist
    >>> from functional_sgd import sgd
    >>> from loop import Batches, DataLoaders, gathering, parallel
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> mesh = dist.init_device_mesh("cpu", (1,))
    >>> x, model = torch.ones(4, 1), gathering(torch.nn.Linear(1, 1))
    >>> one = Learner(model, DataLoaders(Batches((x, x))), torch.nn.functional.mse_loss, sgd())
    >>> learner = parallel(one, mesh)
    >>> start = shard(learner, learner.init(), mesh)
    >>> start.params["weight"].placements
    (Shard(dim=0),)
    >>> dist.destroy_process_group()
    """
    params = {name: in_rows(value, mesh) for name, value in state.params.items()}
    # A fresh state of these params tells which slots are cut, and how.
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


def _like(template: Any, value: Any) -> Any:
    """A slot, as that of a fresh state lies."""
    if not distributed(template) or distributed(value):
        return value
    return cut_like(value, template)


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
