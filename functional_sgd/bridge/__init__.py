"""To torch.optim and back."""

from functional_sgd.bridge.from_torch import from_torch, into_torch
from functional_sgd.bridge.to_torch import to_torch
from functional_sgd.bridge.torch_optimizer import torch_optimizer

__all__ = ["from_torch", "into_torch", "to_torch", "torch_optimizer"]
