"""Lower lr when the gradients say so: the automatic annealer of lesson 18."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, SupportsFloat

import torch
from torch import Tensor

from functional_sgd.errors import did_you_mean
from functional_sgd.reduction import global_norm
from loop.callback import Callback, Order, Wish
from loop.callbacks.gradient import GradientClip
from loop.callbacks.tracking import check_lowerable, check_reduction, lower_lr
from loop.disk.encoding import storable
from loop.state import State


def cut_on_rise(size: float, reference: float, threshold: float = 2.0) -> tuple[bool, float]:
    """(whether to cut lr, the next reference): cut when gradients are more than `threshold` times
    the smallest so far.

    A large lr throws the parameters about in a valley, which shows in gradients that grow again.
    The reference is the smallest size so far, without this one. Source: the macro of lesson 18's
    workbook.

    >>> cut_on_rise(5.0, 2.0), cut_on_rise(1.0, 2.0)
    ((True, 2.0), (False, 1.0))
    """
    return size > threshold * reference, min(reference, size)


def cut_on_fall(size: float, reference: float, threshold: float = 2.0) -> tuple[bool, float]:
    """(whether to cut lr, the next reference): cut when gradients have fallen to 1 / `threshold` of
    what they were.

    The theory is that flatter regions ask for smaller steps. The reference is the size at the last
    cut. Source: the text of lesson 18, which says so; its workbook does the opposite, and learns
    faster by it.

    >>> cut_on_fall(1.0, 2.0), cut_on_fall(1.5, 2.0)
    ((True, 1.0), (False, 2.0))
    """
    if size <= reference / threshold:
        return True, size
    return False, reference


@storable
@dataclass(frozen=True, eq=False)
class Sizes:
    """What AnnealOnGradRatio remembers: of earlier epochs, and of the steps of this one."""

    reference: float | None = None
    ratios: tuple[float, ...] = ()
    squares: Tensor | float = 0.0  # the sum of the squared lengths of this epoch's gradients
    steps: int = 0


class Comparison(NamedTuple):
    """What an epoch's size says."""

    cut: bool  # whether to cut lr
    reference: float | None  # for the next epoch
    ratio: float  # of the size to the reference before


RULES: dict[str, Callable[[float, float, float], tuple[bool, float]]] = {
    "rise": cut_on_rise,
    "fall": cut_on_fall,
}


def sqr_avg_size(state: State) -> Tensor:
    """The workbook's measure: the sum of the roots of the optimizer's running mean squared gradient
    (0-d).

    Raises ValueError if the optimizer keeps no `sqr_avg`; rmsprop, adam and their kin do.
    """
    if "sqr_avg" not in state.opt_state:
        raise ValueError(
            f"sqr_avg_size: the optimizer keeps no 'sqr_avg'. "
            f"{did_you_mean('sqr_avg', state.opt_state)} "
            f"Leave measure out to measure the gradients themselves."
        )
    averages: dict[str, Tensor] = state.opt_state["sqr_avg"]
    return torch.stack([average.sqrt().sum() for average in averages.values()]).sum()


@dataclass(frozen=True)
class AnnealOnGradRatio(Callback):
    """Divide lr by `factor` when the gradients of an epoch are out of proportion to those of
    earlier ones.

    After every epoch its size is set against a reference. With `rule="rise"` (the workbook of
    lesson 18) lr is cut when the size is more than `threshold` times the smallest so far: see
    cut_on_rise. With `rule="fall"` (the text of lesson 18) when it has fallen to 1 / `threshold` of
    the size at the last cut: see cut_on_fall. The first epoch is compared with nothing.

    size = sqrt(mean over the epoch's steps of |g|**2), |g| being the length of the whole gradient
    that the step gets, before clipping. Or `measure(state)` after the epoch, a number or 0-d
    tensor: with `sqr_avg_size`, the workbook's.

    No part of lr falls below `min_lr`, and lr stays cut in the state after the run. `state.memory`
    has Sizes: the reference, and the ratios size / reference of every epoch. Every run starts anew;
    with `reset_on_fit=False` it goes on from where the last one was, so that five runs of one epoch
    are one run of five. It waits for the device once an epoch.

    Raises ValueError for an unknown rule, a threshold or factor that is not above 1, and when the
    run starts if lr is scheduled in it. Source: fast.ai's lesson 18, sheet "adam_ann".

    >>> AnnealOnGradRatio(rule="fall").threshold
    2.0
    """

    rule: str = "rise"
    threshold: float = 2.0
    factor: float = 4.0
    min_lr: float = 0.0
    measure: Callable[[State], SupportsFloat] | None = None
    reset_on_fit: bool = True
    order: ClassVar[int] = Order.UNSCALE
    run_before: ClassVar[tuple[Wish, ...]] = (GradientClip,)
    run_after: ClassVar[tuple[Wish, ...]] = ("mixed_precision",)  # which unscales the gradients

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(
                f"AnnealOnGradRatio: there is no rule {self.rule!r}. "
                f"{did_you_mean(self.rule, RULES)}"
            )
        if not self.threshold > 1:
            raise ValueError(f"AnnealOnGradRatio: threshold must be above 1, got {self.threshold}.")
        check_reduction("AnnealOnGradRatio", self.factor, self.min_lr)

    def before_fit(self, state: State) -> State:
        """Check lr, and start over; of an epoch that was not finished, nothing goes on."""
        check_lowerable("AnnealOnGradRatio", state)
        kept = Sizes() if self.reset_on_fit else self._sizes(state)
        return state.remember(self.name, Sizes(kept.reference, kept.ratios))

    def before_step(self, state: State) -> State | None:
        """Measure the gradient of a step."""
        if self.measure is not None:
            return None
        assert state.grads is not None
        grads = [grad for grad in state.grads.values() if grad is not None]
        kept = self._sizes(state)
        square = global_norm(grads).square()
        seen = replace(kept, squares=kept.squares + square, steps=kept.steps + 1)
        return state.remember(self.name, seen)

    def after_epoch(self, state: State) -> State | None:
        """Compare, and perhaps cut."""
        kept = self._sizes(state)
        if self.measure is not None:
            size = float(self.measure(state))
        elif kept.steps:
            size = math.sqrt(kept.squares / kept.steps)
        else:  # no step was taken
            return None
        found = self._compare(size, kept.reference)
        state = state.remember(self.name, Sizes(found.reference, (*kept.ratios, found.ratio)))
        return lower_lr(state, self.factor, self.min_lr) if found.cut else state

    def _compare(self, size: float, reference: float | None) -> Comparison:
        if reference is None:
            # Every comparison with NaN is false, so a reference of NaN would never be replaced.
            first = None if math.isnan(size) else size
            return Comparison(False, first, 1.0)
        cut, following = RULES[self.rule](size, reference, self.threshold)
        ratio = size / reference if reference else math.inf
        return Comparison(cut, following, ratio)

    def _sizes(self, state: State) -> Sizes:
        found: Sizes = state.memory.get(self.name, Sizes())
        return found
