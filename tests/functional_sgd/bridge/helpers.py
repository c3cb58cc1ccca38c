"""A small network and its training, for the tests of the bridges."""

from typing import Any

import torch
from torch import Tensor, nn


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def batch(seed: int) -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def train(
    model: nn.Module, optimizer: Any, steps: int, start: int = 0, scheduler: Any = None
) -> dict[str, Tensor]:
    """Steps of plain PyTorch; returns copies of the params."""
    for seed in range(start, start + steps):
        optimizer.zero_grad()
        model(batch(seed)).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return values_of(model)


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}
