"""Momentum on points instead of gradients: running averages of a noisy parabola."""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from functional_sgd import average_grad, debias

BETAS = (0.5, 0.7, 0.9, 0.99)


def points(seed: int) -> tuple[Tensor, Tensor]:
    """A hundred noisy points of y = 1 - (x / 3)^2, from left to right."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.linspace(-4, 4, 100, dtype=torch.float64)
    noise = 0.1 * torch.randn(2, 100, generator=generator, dtype=torch.float64)
    order = (x + noise[0]).argsort()
    return (x + noise[0])[order], (1 - (x / 3) ** 2 + noise[1])[order]


def averages(values: Tensor, beta: float, debiased: bool) -> Tensor:
    """The running averages: momentum, on points instead of gradients. Debiasing goes by how many
    were averaged.
    """
    average, seen = torch.zeros((), dtype=values.dtype), []
    for count, value in enumerate(values, start=1):
        average = average_grad(value, average, mom=beta)["grad_avg"]
        step = torch.tensor(count, dtype=values.dtype)
        corrected = debias(average, average, step=step, mom=beta)["update"]
        seen.append(corrected if debiased else average)
    return torch.stack(seen)


def curves(x: Tensor, y: Tensor, betas: Sequence[float], debiased: bool) -> Figure:
    """The points with their averages, side by side for each beta."""
    figure = Figure(figsize=(4.5 * len(betas), 3.6), layout="constrained")
    for axes, beta in zip(figure.subplots(1, len(betas), squeeze=False)[0], betas, strict=True):
        axes.plot(x, y, "o", color="0.8", markersize=3)
        axes.plot(x, averages(y, beta, debiased), color="C3")
        axes.set_title(f"beta = {beta}")
    return figure
