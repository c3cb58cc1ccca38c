"""To torch.optim and back, and into torch's backward."""

from functional_sgd.bridge.from_torch import from_torch, into_torch
from functional_sgd.bridge.in_backward import step_in_backward
from functional_sgd.bridge.to_torch import to_torch
from functional_sgd.bridge.torch_optimizer import torch_optimizer

__all__ = ["from_torch", "into_torch", "step_in_backward", "to_torch", "torch_optimizer"]
