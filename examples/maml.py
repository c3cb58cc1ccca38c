"""Learn to learn (MAML): first weights from which a few steps of SGD are enough for a new task.

A task is a sine of which ten points are seen. The outer step differentiates through the inner ones,
and torch.func.vmap maps all tasks of a batch at once. Source: Finn et al. 2017.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

from functional_sgd import adam, sgd, value_and_grad

Params = dict[str, Tensor]
INNER = sgd(lr=0.03)


def network(generator: torch.Generator, width: int = 40, **like: Any) -> Params:
    """1 number to 1 number, over two layers of tanh."""
    params: Params = {}
    for index, (inputs, outputs) in enumerate(((1, width), (width, width), (width, 1))):
        weight = torch.randn(inputs, outputs, generator=generator, dtype=torch.float64)
        params[f"w{index}"] = (weight / math.sqrt(inputs)).to(**like)
        params[f"b{index}"] = torch.zeros(outputs, **like)
    return params


def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """The mean squared error."""
    return (predicted(params, x) - y).square().mean()


def predicted(params: Params, x: Tensor) -> Tensor:
    """What the network makes of x, (N, 1)."""
    x = torch.tanh(x @ params["w0"] + params["b0"])
    x = torch.tanh(x @ params["w1"] + params["b1"])
    return x @ params["w2"] + params["b2"]


def adapted(params: Params, x: Tensor, y: Tensor, steps: int) -> Params:
    """The params after some steps on these points; differentiable."""
    state = INNER.init(params)
    for _ in range(steps):
        _, grads = value_and_grad(loss)(params, x, y)
        params, state = INNER(params, grads, state)
    return params


def meta_loss(params: Params, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """The mean over tasks (T, 2 N, 1) of the loss on the later points, after steps on the first."""

    def of_task(x: Tensor, y: Tensor) -> Tensor:
        half = len(x) // 2
        return loss(adapted(params, x[:half], y[:half], steps), x[half:], y[half:])

    return torch.func.vmap(of_task)(x, y).mean()


def tasks(
    count: int, points: int, generator: torch.Generator, **like: Any
) -> tuple[Tensor, Tensor]:
    """Sines of amplitude 0.1 to 5 and any phase, at random points of [-5, 5]: x, y (T, N, 1)."""
    draw = partial(torch.rand, generator=generator, dtype=torch.float64)
    amplitude, phase = 0.1 + 4.9 * draw(count, 1, 1), math.pi * draw(count, 1, 1)
    x = 10 * draw(count, points, 1) - 5
    return x.to(**like), (amplitude * torch.sin(x + phase)).to(**like)


def main(
    outer_steps: int = 600,
    inner_steps: int = 3,
    task_count: int = 25,
    lr: float = 3e-3,
    seed: int = 0,
    device: str = "cpu",
    pictures: Path = Path("pictures"),
) -> None:
    """Train, print how new tasks are learned from there and from fresh weights, save a picture.

    Args:
        outer_steps: Steps of the first weights.
        inner_steps: Steps that they are to be good for.
        task_count: Tasks for each outer step.
        lr: The outer learning rate.
        seed: Decides weights and tasks.
        device: Where to compute.
        pictures: The folder for the picture.
    """
    torch.set_num_threads(1)  # faster for so small a network
    like: dict[str, Any] = dict(device=device, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    fresh = params = network(generator, **like)
    outer, compute = adam(lr=lr), value_and_grad(partial(meta_loss, steps=inner_steps))
    state = outer.init(params)
    for step in range(outer_steps):
        value, grads = compute(params, *tasks(task_count, 20, generator, **like))
        params, state = outer(params, grads, state)
        if step % max(outer_steps // 5, 1) == 0:
            print(f"step {step}: loss after {inner_steps} inner steps {value.item():.3f}")
    x, y = tasks(200, 20, generator, **like)
    axes = (figure := Figure(figsize=(6, 4), layout="constrained")).subplots()
    for name, start in {"learned": params, "fresh": fresh}.items():
        losses = [meta_loss(start, x, y, steps).item() for steps in range(6)]
        print(f"new tasks from {name} weights: {', '.join(f'{value:.2f}' for value in losses)}")
        axes.plot(losses, "o-", label=f"{name} first weights")
    axes.set(xlabel="inner steps", ylabel="loss on new points of new tasks")
    axes.legend(frameon=False)
    pictures.mkdir(parents=True, exist_ok=True)
    figure.savefig(pictures / "maml.png", dpi=120)
    print(f"saved {pictures}/maml.png")


if __name__ == "__main__":
    tyro.cli(main)
