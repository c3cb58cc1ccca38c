"""States of which every rank holds its pieces."""

from typing import Any

import optree
from torch import Tensor

from functional_sgd.sharded import distributed, full
from functional_sgd.state import seeded
from functional_sgd.tree import Tree
from loop.layout import cut_like, in_rows
from loop.learner import Learner
from loop.remembered import with_tensors
from loop.state import State


def shard(learner: Learner, state: State, mesh: Any) -> State:
    """The same state, in pieces: every rank holds its rows of each param and of each slot.

    Params and slots become DTensors on `mesh` (a DeviceMesh of any number of dimensions): their
    first axis is cut over the last dimension of the mesh, and replicated over the others. Numbers
    and buffers stay as they are; so does what callbacks remember, except tensors by the names and
    in the shapes of params, such as averages. The learner's model must be `gathering`. Call it on
    all ranks with equal states; no rank needs the others for it.

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
    template: Tree = seeded(learner.opt.init(params), state.seed)
    slots: Tree = state.opt_state
    opt_state = optree.tree_map(_like, template, slots)

    def cut(tensor: Tensor, name: Any) -> Tensor:
        if name in params and tensor.shape == params[name].shape:
            tensor = _like(params[name], tensor)
        return tensor

    memory = {who: with_tensors(value, cut) for who, value in state.memory.items()}
    return state.replace(params=params, opt_state=opt_state, memory=memory)


def unshard(state: State) -> State:
    """The same state with whole tensors on every rank. Call it on all ranks: they exchange pieces.

    For `learner.load`, `save`, or a run on one process.
    """
    trees: Tree = (dict(state.params), dict(state.opt_state))
    params, opt_state = optree.tree_map(full, trees)

    memory: dict[str, Tree] = {}
    for who, value in state.memory.items():
        memory[who] = with_tensors(value, lambda tensor, name: full(tensor))
    return state.replace(params=params, opt_state=opt_state, memory=memory)


def _like(template: Tree, value: Tree) -> Tree:
    """A slot, as that of a fresh state lies."""
    if not distributed(template) or distributed(value):
        return value
    return cut_like(value, template)
