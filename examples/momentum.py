"""What momentum does, in three pictures: it follows noise less, rolls along a canyon, and over a
bump.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure
from parabola import BETAS, curves, points
from torch import Tensor

from functional_sgd import Optimizer, momentum, sgd, value_and_grad


def canyon(at: Tensor) -> Tensor:
    """A valley that is 100 times as steep across as along."""
    return (at[0].square() + 100 * at[1].square()) / 2


def bumpy(at: Tensor) -> Tensor:
    """A slope down to 2, with a bump at -1."""
    return (at - 2).square() / 10 + torch.exp(-((at + 1) / 0.3).square()) / 2


def path(
    loss: Callable[[Tensor], Tensor], opt: Optimizer, at: Tensor, steps: int
) -> tuple[Tensor, list[float]]:
    """Where a ball has been, (steps + 1, ...), and the loss there."""
    state, places, losses = opt.init(at), [at], [loss(at).item()]
    for _ in range(steps):
        _, grad = value_and_grad(loss)(at)
        at, state = opt(at, grad, state)
        places.append(at)
        losses.append(loss(at).item())
    return torch.stack(places), losses


def tracks(paths: dict[str, Tensor]) -> Figure:
    """The canyon from above, with the ways through it."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    x, y = torch.meshgrid(torch.linspace(-1, 11, 80), torch.linspace(-1.6, 1.6, 80), indexing="xy")
    axes.contour(x, y, canyon(torch.stack([x, y])), levels=12, colors="0.85")
    for name, places in paths.items():
        axes.plot(places[:, 0].cpu(), places[:, 1].cpu(), ".-", label=name)
    axes.legend(frameon=False)
    return figure


def hill(balls: dict[str, Tensor]) -> Figure:
    """The bumpy slope, with where each ball has been."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes, x = figure.subplots(), torch.linspace(-4.5, 4, 300)
    axes.plot(x, bumpy(x), color="0.7")
    for name, places in balls.items():
        axes.plot(places.cpu(), bumpy(places).cpu(), ".-", alpha=0.7, label=name)
    axes.legend(frameon=False)
    return figure


def main(seed: int = 0, device: str = "cpu", pictures: Path = Path("pictures")) -> None:
    """Save three pictures, and print what the balls do.

    Args:
        seed: Decides the noise.
        device: Where the balls roll.
        pictures: The folder for the pictures.
    """
    x, y = points(seed)
    edge, top = torch.tensor([10.0, 1.5], device=device), torch.tensor(-4.0, device=device)
    ways = {"SGD": path(canyon, sgd(lr=0.019), edge, 600)}
    ways["momentum 0.9"] = path(canyon, momentum(lr=0.1), edge, 600)
    for name, (_, losses) in ways.items():
        steps = next(step for step, loss in enumerate(losses) if loss < 1e-3)
        print(f"canyon, {name}: a loss below 0.001 after {steps} steps")
    balls = {"beta 0": path(bumpy, sgd(lr=0.05), top, 200)[0]}
    balls["beta 0.9"] = path(bumpy, sgd(lr=0.05, mom=0.9), top, 200)[0]
    for name, places in balls.items():
        print(f"bump, {name}: ends at {places[-1].item():.2f}")
    made = {"parabola": curves(x, y, BETAS, debiased=True), "bump": hill(balls)}
    made["canyon"] = tracks({name: places[:40] for name, (places, _) in ways.items()})
    pictures.mkdir(parents=True, exist_ok=True)
    for name, figure in made.items():
        figure.savefig(pictures / f"momentum_{name}.png", dpi=120)
        print(f"saved {pictures}/momentum_{name}.png")


if __name__ == "__main__":
    tyro.cli(main)
