"""Draw the pictures of the book's chapter: what each optimizer reaches, averages of noise, and the
loop itself.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import tyro
from digits import digits, network
from loop_picture import loop_picture
from matplotlib.figure import Figure
from parabola import BETAS, curves, points
from torch import nn

from functional_sgd import Optimizer, adam, momentum, rmsprop, sgd
from loop import Learner, accuracy, fit_one_cycle

OPTIMIZERS: dict[str, tuple[Optimizer, float]] = {
    "plain SGD": (sgd(), 0.03),
    "momentum": (momentum(), 0.03),
    "RMSProp": (rmsprop(), 0.003),
    "Adam": (adam(sqr_mom=0.99, eps=1e-5), 0.003),
}
"""Name -> the optimizer, and the highest lr of the cycle, as in the book."""


def results(epochs: int, seed: int, device: str) -> dict[str, list[float]]:
    """The validation accuracy after every epoch, for each optimizer, from the same weights."""
    found = {}
    data, _, _ = digits()
    for name, (opt, lr) in OPTIMIZERS.items():
        torch.manual_seed(seed)
        learner = Learner(network(), data, nn.functional.cross_entropy, opt, [accuracy])
        end = fit_one_cycle(
            learner, learner.init(seed, device), epochs, lr, moms=(0.95, 0.85, 0.95)
        )
        found[name] = end.history.column("accuracy")
        print(f"{name:>10}: {'  '.join(f'{value:.3f}' for value in found[name])}")
    return found


def lines(named: Mapping[str, Sequence[float]], xlabel: str, ylabel: str) -> Figure:
    """A line for each name."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in named.items():
        axes.plot(range(1, len(values) + 1), values, "o-", label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.locator_params(axis="x", integer=True)
    axes.legend(frameon=False)
    return figure


def main(
    epochs: int = 3, seed: int = 0, device: str = "cpu", pictures: Path = Path("pictures")
) -> None:
    """Save four pictures, and print the accuracies of the first.

    Args:
        epochs: Passes over the training images for each optimizer.
        seed: Decides first weights, orders and noise.
        device: Where to train.
        pictures: The folder for the pictures.
    """
    torch.set_num_threads(1)  # faster for so small a network
    x, y = points(seed)
    made = {
        "optimizers": lines(results(epochs, seed, device), "epoch", "validation accuracy"),
        "momentum": curves(x, y, [0.7], debiased=True),
        "betas": curves(x, y, BETAS, debiased=False),
        "loop": loop_picture(),
    }
    pictures.mkdir(parents=True, exist_ok=True)
    for name, figure in made.items():
        figure.savefig(pictures / f"{name}.png", dpi=120)
        print(f"saved {pictures / name}.png")


if __name__ == "__main__":
    tyro.cli(main)
