"""Modules that put their parameters together when they run, and drop them afterwards (FSDP)."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from functional_sgd.sharded import distributed
from loop.layout import gathered


def gathering(model: nn.Module, blocks: Iterable[str] = (), again: bool = True) -> nn.Module:
    """A copy of the model for params in pieces (`shard`): each of `blocks`, the names of
    submodules, gathers its own params just before it runs, and drops them after it; what is in no
    block is gathered for the whole forward pass.

    With `again`, a block is run a second time in the backward pass, on params that are gathered a
    second time, so that at no time more than one block is whole; without it, all of them are from
    the forward pass to the backward pass. The derivative of a gather is a reduce-scatter: gradients
    are summed over the ranks, and cut as their params are. Plain params are left as they are.

    Every rank must run every block in every batch, since all ranks take part in each gather. Raises
    AttributeError for a block that is not there. Source: ZeRO-3 (Rajbhandari et al. 2020), FSDP
    (Zhao et al. 2023).

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    >>> gathering(model, ["0", "1"])(torch.ones(1, 2)).equal(model(torch.ones(1, 2)))
    True
    """
    model = copy.deepcopy(model)
    taken: set[nn.Module] = set()
    for name in (*blocks, ""):
        block = model.get_submodule(name)
        own = [layer for layer in block.modules() if layer not in taken]
        taken |= set(own)
        if own:
            # Not for what is in no block: to run that again would be the whole forward pass.
            block.forward = _Gathered(block, own, again and name != "")
    return model


class _Gathered:
    """The forward pass of a block, with whole params in place while it runs."""

    def __init__(self, block: nn.Module, layers: Sequence[nn.Module], again: bool) -> None:
        self.forward, self.layers, self.again = block.forward, layers, again

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # In every call, since a run puts other tensors in place for every batch.
        places = [
            (layer, name, value)
            for layer in self.layers
            for name, value in layer._parameters.items()
            if distributed(value)
        ]
        pieces = list({id(value): value for _, _, value in places}.values())  # tied ones once
        if not pieces:
            return self.forward(*args, **kwargs)

        def run(*inputs: Any) -> Any:
            whole: dict[int, Any] = {id(piece): gathered(piece) for piece in inputs[: len(pieces)]}
            # Within a recomputation, other tensors may be in place than in the first pass.
            before = [layer._parameters[name] for layer, name, _ in places]
            try:
                for layer, name, value in places:
                    layer._parameters[name] = whole[id(value)]
                return self.forward(*inputs[len(pieces) :], **kwargs)
            finally:
                for (layer, name, _), value in zip(places, before, strict=True):
                    layer._parameters[name] = value

        if self.again and torch.is_grad_enabled():
            return checkpoint(run, *pieces, *args, use_reentrant=False)
        return run(*pieces, *args)
