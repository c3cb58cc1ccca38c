"""Write a callback: read the state, return the next one, or raise a signal that ends a part of the
run.
"""

from dataclasses import dataclass

import torch
import tyro
from torch import nn

from functional_sgd import adamw
from loop import (
    Batches,
    Callback,
    CancelFit,
    DataLoaders,
    Learner,
    Progress,
    Recorder,
    State,
    fit,
    show_loop,
    trace,
)


@dataclass(frozen=True)
class StopWhenGood(Callback):
    """End the run as soon as the validation loss is low enough."""

    target: float
    run_after = (Recorder,)

    def after_epoch(self, state: State) -> State | None:
        """Look at the row that the Recorder has just written."""
        if state.history.rows[-1]["valid_loss"] < self.target:
            raise CancelFit(state)
        return None


@dataclass(frozen=True)
class NoisyGradients(Callback):
    """Add noise to the gradients; what it remembers is in the state, so a fork remembers it too."""

    scale: float = 0.01

    def before_step(self, state: State) -> State:
        """Return a state with other gradients, and count."""
        grads = dict(state.grads or {})
        for name, grad in grads.items():
            if grad is not None:
                grads[name] = grad + self.scale * torch.randn_like(grad)
        return state.replace(grads=grads).remember(self.name, state.memory.get(self.name, 0) + 1)


def main(epochs: int = 20, target: float = 0.12, seed: int = 0, device: str = "cpu") -> None:
    """Train with both callbacks, look into one batch, and go back to where we came from.

    Args:
        epochs: The most epochs to train for.
        target: The validation loss that is good enough.
        seed: Decides the data, the first weights and the noise.
        device: Where to train.
    """
    torch.manual_seed(seed)
    x = torch.rand(512, 2) * 2 - 1
    y = (x[:, :1] * x[:, 1:]).sign()
    data = DataLoaders(
        Batches((x[:384], y[:384]), 32, shuffle=True), Batches((x[384:], y[384:]), 128)
    )
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 1), nn.Tanh())
    learner = Learner(
        model,
        data,
        nn.functional.mse_loss,
        adamw(lr=1e-2),
        callbacks=[Progress(), NoisyGradients()],
    )
    show_loop(learner)

    start = learner.init(seed, device)
    end = fit(learner, start, epochs, callbacks=[StopWhenGood(target)])
    print(
        f"\nstopped after epoch {end.epoch}, {end.memory['noisy_gradients']} noisy steps; the "
        f"start is still {start}\n"
    )
    for event, state in trace(learner, end):
        loss = "" if state.loss is None else f"loss {state.loss.item():.4f}"
        print(f"{event:>16} {loss}")
        if event == "after_batch":
            break


if __name__ == "__main__":
    tyro.cli(main)
