"""What gpt.py adds to the loop: a schedule that counts steps, and a callback that shows samples."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from library_text import Characters
from torch import Tensor

from functional_sgd import apply
from loop import Callback, State

CHARACTERS = Characters()


@dataclass(frozen=True)
class WarmUp:
    """lr of a step: up in a line for `warm` steps, then down along a cosine to a tenth."""

    top: float
    warm: int
    steps: int

    def __call__(self, step: Tensor) -> Tensor:
        done = ((step - self.warm) / (self.steps - self.warm)).clamp(0, 1)
        falling = 0.55 + 0.45 * torch.cos(math.pi * done)
        return self.top * torch.minimum((step + 1) / self.warm, falling)


@dataclass(frozen=True)
class Sample(Callback):
    """Show what the model writes after every epoch."""

    begin: str
    length: int = 200
    reports: ClassVar[bool] = True

    @torch.no_grad()
    def after_epoch(self, state: State) -> None:
        """Draw one character after the other."""
        model: Any = state.learner.model.eval() if state.learner else None
        numbers = CHARACTERS.encode(self.begin)[None].to(state.params["head.weight"].device)
        for _ in range(self.length):
            scores, _ = apply(model, state.params, state.buffers, numbers[:, -model.window :])
            drawn = torch.multinomial((scores[:, -1] / 0.7).softmax(-1), 1)
            numbers = torch.cat([numbers, drawn], 1)
        print(f"---\n{CHARACTERS.decode(numbers[0])}\n---")
