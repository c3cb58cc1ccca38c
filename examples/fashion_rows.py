"""What lesson 18 trains on Fashion-MNIST, what it got, and the rows of the question that it leaves
open.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

import functional_sgd as fs
from functional_sgd.schedules import Constant, Cosine, Join, one_cycle, three_cosines
from loop import AnnealOnGradRatio, ParamScheduler, TorchScheduler


@fs.elementwise(sqr_avg=torch.zeros_like)
def average_sqr_grad_from_first(
    grad: Tensor, sqr_avg: Tensor, *, step: Tensor, sqr_mom: float
) -> dict[str, Tensor]:
    """The library's average_sqr_grad, but it starts at the first gradient's square, as there."""
    before = torch.where(step <= 1, grad.square(), sqr_avg)
    return dict(sqr_avg=sqr_mom * before + (1 - sqr_mom) * grad.square())


rms_rules = (average_sqr_grad_from_first, fs.scale_by_rms, fs.sgd_step)
rmsprop = fs.chain(*rms_rules, lr=3e-3, sqr_mom=0.99, eps=1e-5)
averages = (fs.average_grad, fs.average_sqr_grad, fs.debias)
adam_rules = (*averages, fs.scale_by_rms_eps_inside, fs.sgd_step)
adam = fs.chain(*adam_rules, lr=6e-3, mom=0.9, sqr_mom=0.99, eps=1e-5)

cosine = Cosine(2e-2, 0.0)
stairs = Join((1 / 3,) * 3, tuple(Constant(cosine(epoch / 3)) for epoch in range(3)))
peak = one_cycle(6e-2, div_final=25e4, pct_start=0.3)
cycle = dict(lr=peak, mom=three_cosines(0.3, 0.95, 0.85, 0.95))
cycled = (0.822, 0.856, 0.879, 0.901, 0.906), (0.546, 0.413, 0.333, 0.279, 0.267)


@dataclass(frozen=True)
class Row:
    """How a row trains, and what the lesson got on the validation data, by epoch."""

    opt: fs.Optimizer
    callbacks: Callable[[int], list[Any]]  # of how many batches the run has
    accuracies: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()

    @property
    def epochs(self) -> int:
        """As many as in the lesson; 5 in the rows that it has not."""
        return len(self.losses) or 5


def plain(steps: int) -> list[Any]:
    """Nothing moves lr."""
    return []


def scheduled(**schedules: Any) -> Callable[[int], list[Any]]:
    """Schedules of our own."""
    return lambda steps: [ParamScheduler(schedules)]


def torchs(steps: int) -> list[Any]:
    """torch's own scheduler, which moves lr and momentum; it has to know the number of steps."""
    return [TorchScheduler(partial(OneCycleLR, max_lr=6e-2, total_steps=steps))]


def annealed(steps: int) -> list[Any]:
    """lr is divided by 4 after an epoch whose gradients are 1.2 times the smallest so far."""
    return [AnnealOnGradRatio("rise", threshold=1.2)]


ROWS = {
    "sgd": Row(fs.sgd(lr=0.4), plain, (0.825, 0.844, 0.852), (0.485, 0.429, 0.406)),
    "momentum": Row(fs.momentum(lr=1.5), plain, (0.845, 0.868, 0.876), (0.423, 0.361, 0.343)),
    "rmsprop": Row(rmsprop, plain, (0.818, 0.844, 0.853), (0.489, 0.430, 0.407)),
    "adam": Row(adam, plain, (0.841, 0.863, 0.871), (0.431, 0.376, 0.349)),
    "cosine": Row(fs.adamw(), scheduled(lr=cosine), (0.858, 0.874, 0.883), (0.383, 0.339, 0.317)),
    "stairs": Row(fs.adamw(), scheduled(lr=stairs), (0.857, 0.875, 0.887), (0.382, 0.339, 0.307)),
    "one_cycle": Row(fs.adamw(), scheduled(**cycle), *cycled),
    "one_cycle_torch": Row(fs.adamw(), torchs, *cycled),
    "constant_5": Row(fs.adamw(lr=2e-2), plain),
    "cosine_5": Row(fs.adamw(), scheduled(lr=cosine)),
    "annealed_5": Row(fs.adamw(lr=2e-2), annealed),
}
"""The last three, and one_cycle, are the open question: does an automatic annealer help?"""
