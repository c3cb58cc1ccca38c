"""Modules that put their parameters together when they run, and drop them afterwards (FSDP)."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
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
    Buffers are changed once: a second run begins with what the first has found, and leaves nothing.

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


class _Place(NamedTuple):
    """Where a param in pieces belongs."""

    layer: nn.Module
    name: str
    piece: Tensor


def _places(layers: Iterable[nn.Module]) -> Iterator[_Place]:
    for layer in layers:
        for name, value in layer._parameters.items():
            if value is not None and distributed(value):
                yield _Place(layer, name, value)


class _Gathered:
    """The forward pass of a block, with whole params in place while it runs."""

    def __init__(self, block: nn.Module, layers: Sequence[nn.Module], again: bool) -> None:
        self.forward, self.layers, self.again = block.forward, layers, again
        self.below = list(block.modules())  # layers of blocks within this one, too

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # In every call, since a run puts other tensors in place for every batch.
        places = list(_places(self.layers))
        tied_once = {id(place.piece): place.piece for place in places}
        pieces = list(tied_once.values())
        if not pieces:
            return self.forward(*args, **kwargs)

        def run(*inputs: Any) -> Any:
            # By their order, since a block within another is given others in a recomputation.
            given = zip(pieces, inputs[: len(pieces)], strict=True)
            whole: dict[int, Any] = {id(piece): gathered(own) for piece, own in given}
            # Within a recomputation, other tensors may be in place than in the first pass.
            before = [place.layer._parameters[place.name] for place in places]
            try:
                for place in places:
                    place.layer._parameters[place.name] = whole[id(place.piece)]
                return self.forward(*inputs[len(pieces) :], **kwargs)
            finally:
                for place, value in zip(places, before, strict=True):
                    place.layer._parameters[place.name] = value

        if self.again and torch.is_grad_enabled():
            return checkpoint(_Repeated(run, self.below), *pieces, *args, use_reentrant=False)
        return run(*pieces, *args)


class _Repeated:
    """A forward pass that changes buffers the first time alone; it begins with the same each time.

    With another vector of spectral_norm the gradient would be another one, too.
    """

    def __init__(self, run: Callable[..., Any], layers: Iterable[nn.Module]) -> None:
        self.run, self.ran = run, False
        self.stores: list[dict[str, Tensor | None]] = []
        self.found: list[dict[str, Tensor | None]] = []
        copies: dict[int, Tensor] = {}  # two layers may share a buffer
        for layer in layers:
            if layer._buffers:
                self.stores.append(layer._buffers)
                # In evaluation, layers write to nothing.
                copied = _copied(layer._buffers, copies) if layer.training else {**layer._buffers}
                self.found.append(copied)

    def __call__(self, *inputs: Any) -> Any:
        if not self.ran:
            self.ran = True
            return self.run(*inputs)
        # Copies of the copies, for a graph that is kept may be gone through once more.
        copies: dict[int, Tensor] = {}
        now = [{**store} for store in self.stores]
        try:
            for store, found in zip(self.stores, self.found, strict=True):
                store.update(_copied(found, copies))
            return self.run(*inputs)
        finally:
            for store, before in zip(self.stores, now, strict=True):
                store.update(before)


def _copied(
    buffers: Mapping[str, Tensor | None], copies: dict[int, Tensor]
) -> dict[str, Tensor | None]:
    """The same tensors anew; each has one copy."""
    found: dict[str, Tensor | None] = {}
    for name, value in buffers.items():
        if value is not None and id(value) not in copies:
            copies[id(value)] = value.clone()
        found[name] = None if value is None else copies[id(value)]
    return found
