"""What ActivationStats has measured in a run, as tensors."""

from typing import NamedTuple

import torch
from torch import Tensor

from loop.state import State

NEAR_ZERO = 0.05
"""An output up to this counts as near zero: behind a ReLU, such a unit hardly does anything."""


class LayerStats(NamedTuple):
    """A row for each batch that was looked at, a column for each layer."""

    layers: tuple[str, ...]  # names, in the order of the model
    kinds: tuple[str, ...]  # their classes
    train_iter: tuple[int, ...]  # the batches
    mean: Tensor  # (batches, layers), as the others
    std: Tensor
    near_zero: Tensor  # the share of outputs up to 0.05
    histograms: Tensor | None  # counts (batches, layers, bins)
    range: tuple[float, float]  # of the histograms


def activation_stats(state: State, name: str = "activation_stats") -> LayerStats:
    """What an ActivationStats of this name has measured, on the CPU. Raises ValueError if there is
    nothing.
    """
    memory = state.memory.get(name)
    if memory is None or not memory["stats"]:
        raise ValueError(
            f"activation_stats: the state has no measurements called {name!r}. "
            f"Fit with ActivationStats() among the callbacks first."
        )
    mean, std, near_zero = torch.stack([values.cpu() for values in memory["stats"]]).unbind(dim=-1)
    histograms = None
    if memory["bins"]:
        histograms = torch.stack([counts.cpu() for counts in memory["histograms"]])
    return LayerStats(
        tuple(memory["layers"]),
        tuple(memory["kinds"]),
        tuple(memory["train_iter"]),
        mean,
        std,
        near_zero,
        histograms,
        (memory["range"][0], memory["range"][1]),
    )
