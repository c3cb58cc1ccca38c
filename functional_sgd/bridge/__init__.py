"""To torch.optim and back."""

from functional_sgd.bridge.from_torch import from_torch as from_torch
from functional_sgd.bridge.from_torch import into_torch as into_torch
from functional_sgd.bridge.to_torch import to_torch as to_torch
from functional_sgd.bridge.torch_optimizer import torch_optimizer as torch_optimizer
