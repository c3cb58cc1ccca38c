"""The sheets of lesson 18's workbook: what they compute, and cells of them to compare with."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

import functional_sgd as fs
from loop import Callback, State

X: tuple[int, ...] = (
    14,
    86,
    28,
    51,
    28,
    29,
    72,
    62,
    84,
    15,
    42,
    62,
    47,
    35,
    9,
    38,
    44,
    99,
    13,
    21,
    28,
    20,
    8,
)
X += (64, 99, 70, 27, 17, 8)
Pair = tuple[float, float]  # (of the intercept, of the slope)


@fs.elementwise(sqr_avg=torch.ones_like)
def scale_by_the_last_average(
    grad: Tensor, sqr_avg: Tensor, *, sqr_mom: float
) -> dict[str, Tensor]:
    """The sheet "rmsprop" divides by the average of before this row."""
    after = sqr_mom * sqr_avg + (1 - sqr_mom) * grad.square()
    return dict(update=grad / sqr_avg.sqrt(), sqr_avg=after)


@dataclass(frozen=True)
class LastRowStays(Callback):
    """The workbook copies the line from before its last row; the averages take that row in."""

    def before_step(self, state: State) -> State:
        """Keep the line."""
        return state.remember(self.name, state.params)

    def after_step(self, state: State) -> State | None:
        """Go back to it."""
        last = state.iter + 1 == state.n_iter
        return state.replace(params=state.memory[self.name]) if last else None


@dataclass(frozen=True)
class Sheet:
    """A sheet: its optimizer, and cells of it: epoch -> (intercept, slope)."""

    opt: fs.Optimizer
    slots: Mapping[str, Pair]
    cells: Mapping[int, Pair]
    lrs: Mapping[int, float] = field(default_factory=dict)  # set by hand, before these epochs
    anneals: bool = False


def adam(sqr_mom: float) -> fs.Optimizer:
    """As in the workbook: averages that are not debiased, and no eps."""
    rules = (fs.average_grad, fs.average_sqr_grad, fs.scale_by_rms, fs.sgd_step)
    return fs.chain(*rules, lr=1.0, mom=0.9, sqr_mom=sqr_mom, eps=0.0)


RMS = fs.chain(scale_by_the_last_average, fs.sgd_step, lr=0.02, sqr_mom=0.9)
PRIMED = {
    "grad_avg": (-11.530434582454214, 568.2632536601652),
    "sqr_avg": (2222.044423391361, 8436962.873860385),
}
LATER = {
    "grad_avg": (-29.14129355150132, -919.4085359523834),
    "sqr_avg": (7481.715874165458, 40148488.714414425),
}
FIRST = {1: (9.210579, 2.972606), 5: (24.960098, 1.703742), 10: (29.259299, 2.308277)}
HAND = {20: (29.828775, 1.942322), 30: (29.996535, 2.003075), 40: (29.999881, 2.000572)}
SHEETS = {
    "basic": Sheet(
        fs.sgd(lr=1e-4),
        {},
        {1: (1.066648, 2.574140), 5: (1.275463, 2.569996), 100: (5.815199, 2.479912)},
    ),
    "momentum": Sheet(
        fs.momentum(lr=1e-4),
        {"grad_avg": (-18.333926690207889, 98.245830392128539)},
        {1: (1.063228, 2.133840), 5: (1.261078, 2.358035), 100: (5.544056, 2.304723)},
    ),
    "rmsprop": Sheet(
        RMS,
        {"sqr_avg": (9309.63147497951, 38847505.04948409)},
        {1: (1.567888, 1.471344), 5: (3.189068, 2.403620), 100: (30.096744, 1.990809)},
    ),
    "adam": Sheet(adam(0.9), PRIMED, {**FIRST, 40: (30.586542, 2.306818)}),
    "adam by hand": Sheet(adam(0.9), PRIMED, {**FIRST, **HAND}, {11: 0.1, 21: 0.01, 31: 0.001}),
    "adam_ann": Sheet(
        adam(0.95),
        LATER,
        {7: (29.164871, 2.824767), 17: (29.886079, 2.001165), 60: (30.000001, 2.0)},
        anneals=True,
    ),
}
CUTS = (7, 8, 16, 17, 29, 34, 35, 43, 44, 50, 58)
"""The epochs after which the macro of "adam_ann" divides lr by 4."""
