"""The parts of a network from scratch: the loss, the first weights, and a module that knows its
parameters.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def logsumexp(x: Tensor) -> Tensor:
    """log(exp(x_1) + ... + exp(x_n)) over the last axis, of numbers that would overflow exp, too: m
    is the largest.
    """
    m = x.amax(-1, keepdim=True).detach()
    m = m.where(m.isfinite(), 0.0)
    return m.squeeze(-1) + (x - m).exp().sum(-1).log()


def log_softmax(x: Tensor) -> Tensor:
    """log(exp(x) / sum(exp(x))): the log of a quotient is a difference."""
    return x - logsumexp(x)[..., None]


def nll(log_probs: Tensor, target: Tensor) -> Tensor:
    """Minus the log probability of the right class, by indexing with two arrays of integers; the
    mean.
    """
    return -log_probs[torch.arange(len(target)), target].mean()


def cross_entropy(pred: Tensor, target: Tensor) -> Tensor:
    """The loss of scores that are no probabilities yet."""
    return nll(log_softmax(pred), target)


def stats(x: Tensor) -> tuple[float, float]:
    """Mean and deviation."""
    return x.mean().item(), x.std().item()


def fan_in_out(weight: Tensor) -> tuple[int, int]:
    """How many inputs an output sees, and the other way round. A weight is (out, in) or (out, in,
    height, width).
    """
    receptive_field = weight[0, 0].numel()
    return weight.shape[1] * receptive_field, weight.shape[0] * receptive_field


def gain(a: float) -> float:
    """What a leaky ReLU with this slope below 0 has to be made up for; torch's layers take sqrt(5)
    here.
    """
    return math.sqrt(2.0 / (1 + a**2))


def kaiming_uniform(weight: Tensor, a: float = 0.0, use_fan_out: bool = False) -> Tensor:
    """New values for a weight that keep deviations at 1: uniform, of deviation gain / sqrt(fan), so
    sqrt(3) as wide.
    """
    bound = math.sqrt(3.0) * gain(a) / math.sqrt(fan_in_out(weight)[use_fan_out])
    return torch.empty_like(weight).uniform_(-bound, bound)


class DummyModule:
    """A module that knows its layers because it watches what is assigned. It skips `_modules`
    itself, or never ends.
    """

    def __init__(self, *layers: Callable[[Tensor], Tensor]) -> None:
        self._modules: dict[str, Any] = {}
        for index, layer in enumerate(layers):
            setattr(self, f"layer_{index}", layer)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            self._modules[name] = value
        super().__setattr__(name, value)

    def parameters(self) -> Iterator[nn.Parameter]:
        for layer in self._modules.values():
            yield from layer.parameters()

    def __call__(self, x: Tensor) -> Tensor:
        for layer in self._modules.values():
            x = layer(x)
        return x


class Listed(nn.Module):
    """The same with torch's bookkeeping: by add_module, layer by layer, or all at once by
    nn.ModuleList.
    """

    def __init__(self, *layers: nn.Module, at_once: bool) -> None:
        super().__init__()  # what replaces `self._modules = {}`
        if at_once:
            self.layers = nn.ModuleList(layers)
        for index, layer in enumerate(layers if not at_once else ()):
            self.add_module(f"layer_{index}", layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers if "layers" in self._modules else self.children():
            x = layer(x)
        return x


def four_versions(*layers: nn.Module) -> list[Any]:
    """One network four times."""
    return [
        DummyModule(*layers),
        Listed(*layers, at_once=False),
        Listed(*layers, at_once=True),
        nn.Sequential(*layers),
    ]
