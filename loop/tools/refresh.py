"""Measure BatchNorm's statistics again, for parameters that no batch has been normalised with."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TypeGuard

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from functional_sgd.placing import Placed
from loop.learner import Learner
from loop.ranks.batch_norm import GlobalBatchNorm
from loop.run.chance import global_generators_kept
from loop.run.entering import batches_of_a_pass
from loop.run.forward import Unharmed, called
from loop.run.running import running
from loop.run.stages import device_of
from loop.state import State, Tensors


def refresh_buffers(learner: Learner, state: State, data: Iterable[object] | None = None) -> State:
    """The state with BatchNorm statistics that belong to its params, as `refresh_buffers(learner,
    at_average(state))`.

    One pass over the training data (or other data) in training mode, without any callback;
    running_mean and running_var are the plain means over its batches. Other buffers that layers
    write to in training mode are written too. The state comes back as it is if the model has no
    BatchNorm layer with such statistics. With a `parallel` learner, call it on all ranks: each
    reads the whole batches, so the numbers are those of one process.

    Raises ValueError if there is no data. Source: Izmailov et al. 2018; the numbers are those of
    torch.optim.swa_utils.update_bn.
    """
    model = learner.model
    layers = {name: layer for name, layer in model.named_modules() if _keeps_statistics(layer)}
    if not layers:
        return state
    # Whole, since without callbacks nobody would make means of what ranks find in their parts.
    loaders = learner.data.whole()
    if data is not None:
        loaders = replace(loaders, train=data)
    learner = replace(learner, data=loaders)
    calls = Unharmed("model")
    now = state.at_rest().replace(learner=learner, training=True)
    buffers = {**state.buffers, **_unmeasured(layers, state.buffers)}
    # As in a run: no other thread has the model, and the caller's generators are put back.
    with (
        running(model),
        global_generators_kept(device_of(state)),
        _plain_means(layers.values()),
        _of_whole_batches(layers.values()),
        torch.no_grad(),
    ):
        model.train()
        for enter in batches_of_a_pass(now, 0):
            placed = Placed(model, {**state.params, **buffers})
            try:
                calls.call(partial(called, placed), enter(now).xb or (), training=True)
                buffers = placed.after(buffers)
            finally:
                placed.put_back()
    return state.replace(buffers=buffers)


def _keeps_statistics(layer: nn.Module) -> TypeGuard[_BatchNorm]:
    """Whether this is a BatchNorm layer that does not run with track_running_stats=False."""
    return isinstance(layer, _BatchNorm) and layer.running_mean is not None


def _unmeasured(names: Iterable[str], buffers: Tensors) -> Tensors:
    """The statistics of BatchNorm layers that have seen nothing."""
    fresh = {}
    for name in names:
        prefix = f"{name}." if name else ""
        mean, var = f"{prefix}running_mean", f"{prefix}running_var"
        seen = f"{prefix}num_batches_tracked"
        # The first batch multiplies the old values by 0, which leaves a NaN in them. With momentum
        # None, torch weighs each batch by 1 / num_batches_tracked, so that must start at 0.
        fresh[mean] = torch.zeros_like(buffers[mean])
        fresh[var] = torch.ones_like(buffers[var])
        fresh[seen] = torch.zeros_like(buffers[seen])
    return fresh


@contextmanager
def _plain_means(layers: Iterable[_BatchNorm]) -> Iterator[None]:
    """Let BatchNorm layers weigh all batches the same; their momenta are put back."""
    momenta = [(layer, layer.momentum) for layer in layers]
    try:
        for layer, _ in momenta:
            layer.momentum = None
        yield
    finally:
        for layer, momentum in momenta:
            layer.momentum = momentum


@contextmanager
def _of_whole_batches(layers: Iterable[_BatchNorm]) -> Iterator[None]:
    """Let layers that see the batches of all ranks see those of this one, which are whole."""
    shared = [layer for layer in layers if isinstance(layer, GlobalBatchNorm)]
    try:
        for layer in shared:
            layer.alone = True
        yield
    finally:
        for layer in shared:
            layer.alone = False
