"""Find a learning rate: train on a fork of the state while lr rises, and read the curve of the
losses.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import optree

from functional_sgd.hyper import Hyper, with_hypers
from functional_sgd.schedules import Exponential
from loop.callback import Callback, Order, without_reports
from loop.callbacks.schedule import put_all_back
from loop.callbacks.tracking import Tracker
from loop.disk.encoding import storable
from loop.history import History
from loop.learner import Learner, hyper_names
from loop.plots.picture import png
from loop.plots.runs import plot_lr_find
from loop.run.signals import CancelFit
from loop.state import State
from loop.tools import lr_suggestions
from loop.training.fit import check_arguments, fit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SKIP_END = 5


class Suggestions(NamedTuple):
    """A learning rate by each rule."""

    valley: float
    slide: float
    minimum: float
    steep: float


@dataclass(frozen=True, repr=False)
class LRFind:
    """The curve that `lr_find` recorded: the lr and the smoothed loss of every batch, and what they
    suggest.

    The suggestions look at `curve`. Each raises ValueError if that has too few points (`slide`
    wants 16).
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]  # averaged exponentially and debiased
    iterations: int

    @property
    def curve(self) -> tuple[list[float], list[float]]:
        """(lrs, losses) without the first iterations // 10 and the last 5, up to the first loss
        that is not finite.
        """
        used = slice(self.iterations // 10, -_SKIP_END)
        losses = list(takewhile(math.isfinite, self.losses[used]))
        return list(self.lrs[used])[: len(losses)], losses

    @property
    def valley(self) -> float:
        """The learning rate half-way down the longest valley: a good first choice."""
        return lr_suggestions.valley(*self.curve)

    @property
    def slide(self) -> float:
        """The learning rate where the slope has settled, seen from the right."""
        return lr_suggestions.slide(*self.curve)

    @property
    def minimum(self) -> float:
        """A tenth of the learning rate with the smallest loss."""
        return lr_suggestions.minimum(*self.curve)

    @property
    def steep(self) -> float:
        """The learning rate where the loss falls the most steeply."""
        return lr_suggestions.steep(*self.curve)

    @property
    def suggestions(self) -> Suggestions:
        """All four."""
        return Suggestions(self.valley, self.slide, self.minimum, self.steep)

    def plot(self) -> "Figure":
        """The curve, with the suggestions marked on it."""
        return plot_lr_find(self)

    def __repr__(self) -> str:
        suggested = []
        for name in Suggestions._fields:
            with suppress(ValueError):  # too few points for this one
                suggested.append(f"{name} {getattr(self, name):.2e}")
        span = f", lr {self.lrs[0]:.2e} to {self.lrs[-1]:.2e}" if self.lrs else ""
        return f"LRFind({len(self.lrs)} batches{span}: {', '.join(suggested) or 'too few points'})"

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        """The curve, as a notebook shows it."""
        return png(self.plot())


def lr_find(
    learner: Learner,
    state: State,
    start: float = 1e-7,
    end: float = 10.0,
    iterations: int = 100,
    stop_factor: float | None = 4.0,
    beta: float = 0.98,
    callbacks: Sequence[object] = (),
) -> LRFind:
    """Train while lr rises by equal factors, and return the losses on the way. Nothing is changed
    by it.

    Batch k trains with lr = start * (end / start)**(k / iterations). The loss is averaged
    exponentially with `beta` and debiased; the search ends after `iterations` batches, or once that
    loss is above `stop_factor` times its smallest value so far (never, if None: choose this for
    losses below 0). Epochs are repeated as needed; nothing is validated. If lr is a tree, its
    largest leaf follows the schedule, and the others keep their ratio to it. The learner's
    callbacks take part, except those that watch epochs (Tracker) and those that only show or write
    down what happens. The loss of every batch is read, so it waits for the device.

    This is fastai's rule. The course's miniai begins at the given lr, multiplies it by 1.3 after
    every batch, and stops when the raw loss is above 3 times its minimum: fewer batches, a rougher
    curve, and no suggestions.

    Raises ValueError for numbers that make no sense, and for an optimizer without lr; and what
    `fit` raises if Ctrl-C or SIGTERM ends the search. Source: Smith 2015 (cyclical learning
    rates).

    >>> import torch
    >>> from functional_sgd import sgd
    >>> from loop import DataLoaders
    >>> x = torch.linspace(-1, 1, 8)[:, None]
    >>> model, data = torch.nn.Linear(1, 1), DataLoaders([(x, 3 * x + 1)])
    >>> learner = Learner(model, data, torch.nn.functional.mse_loss, sgd())
    >>> found = lr_find(learner, learner.init())
    >>> len(found.lrs), found.lrs[50], found.minimum > found.valley
    (100, 0.001, True)
    """
    check_arguments("lr_find", learner, state, callbacks)
    state = put_all_back(state)  # a schedule of a run that was stopped
    if "lr" not in hyper_names(learner):
        raise ValueError("lr_find: the optimizer reads no 'lr'. Use one that does, such as sgd().")
    _check_numbers(start, end, iterations, stop_factor, beta)
    like = state.hyper.get("lr")
    _check_ratio(like)
    schedule = Exponential(float(start), float(end))
    finder = RaiseLR(schedule, iterations, stop_factor, beta, like, state.train_iter)
    others = without_reports((*learner.callbacks, *callbacks))
    others = [one for one in others if not isinstance(one, Tracker)]
    alone = replace(learner, data=replace(learner.data, valid=None), callbacks=tuple(others))
    # RaiseLR counts the losses in the history, so it must begin with none.
    fork = state.replace(history=History()).forget(finder.name)
    after = fit(alone, fork, epochs=iterations, callbacks=[finder])  # an epoch has >= 1 batch
    seen: LRSearch = after.memory.get(finder.name, LRSearch())
    return LRFind(seen.lrs, seen.losses, iterations)


@storable
@dataclass(frozen=True)
class LRSearch:
    """What RaiseLR remembers."""

    lrs: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()  # smoothed
    average: float = 0.0  # of the losses, not debiased
    best: float = math.inf  # the smallest smoothed loss


@dataclass(frozen=True)
class RaiseLR(Callback):
    """Let lr rise with every training batch, remember lr and smoothed loss, and end the run when
    the loss explodes.
    """

    schedule: Callable[[float], float]
    iterations: int
    stop_factor: float | None
    beta: float
    like: Hyper  # the lr of before
    first: int  # train_iter before the run
    order: ClassVar[int] = Order.SEARCH

    def before_batch(self, state: State) -> State:
        """Set lr."""
        # By train_iter, which also counts cancelled batches: such a batch takes its lr with it.
        lr = scaled(self.like, self.schedule((state.train_iter - self.first) / self.iterations))
        return state.replace(hyper=with_hypers(state.hyper, {"lr": lr}))

    def after_batch(self, state: State) -> State:
        """Remember the batch, if it has a loss, and end the run if that is enough."""
        done = state.train_iter - self.first  # counts this batch already
        seen: LRSearch = state.memory.get(self.name, LRSearch())
        exploded = False
        # The Recorder adds nothing for a batch that was cancelled before its loss.
        if len(state.history.losses) > len(seen.losses):
            lr = self.schedule((done - 1) / self.iterations)
            seen = with_loss(seen, lr, float(state.history.losses[-1]), self.beta)
            state = state.remember(self.name, seen)
            # A NaN is above nothing, so it does not end the search; the curve stops before it.
            if self.stop_factor is not None:
                exploded = seen.losses[-1] > self.stop_factor * seen.best
        if exploded or done >= self.iterations:
            raise CancelFit(state)
        return state


def with_loss(seen: LRSearch, lr: float, loss: float, beta: float) -> LRSearch:
    """What is remembered after one more batch."""
    average = beta * seen.average + (1 - beta) * loss
    smooth = average / (1 - beta ** (len(seen.losses) + 1))
    best = min(seen.best, smooth)
    return LRSearch((*seen.lrs, lr), (*seen.losses, smooth), average, best)


def scaled(like: Hyper, lr: float) -> Hyper:
    """A learning rate for every leaf of a tree: lr for the largest, the others in the ratio that
    they had.

    >>> scaled({"body": 0.25, "head": 0.5}, 4.0), scaled(0.1, 4.0)
    ({'body': 2.0, 'head': 4.0}, 4.0)
    """
    leaves = optree.tree_leaves(like)
    if len(leaves) < 2:
        return lr
    largest = max(float(leaf) for leaf in leaves)
    return optree.tree_map(lambda leaf: lr * (float(leaf) / largest), like)


def _check_numbers(
    start: float, end: float, iterations: int, stop_factor: float | None, beta: float
) -> None:
    if not 0 < start < end < math.inf:
        raise ValueError(f"lr_find: start and end must be 0 < start < end, got {start} and {end}.")
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(
            f"lr_find: iterations must be a whole number, 1 or more, got {iterations!r}."
        )
    if stop_factor is not None and not stop_factor >= 1:
        raise ValueError(
            f"lr_find: stop_factor must be at least 1, or None to go on to the end, got "
            f"{stop_factor}."
        )
    if not 0 <= beta < 1:
        raise ValueError(f"lr_find: beta must be in [0, 1), got {beta}.")


def _check_ratio(like: Hyper) -> None:
    leaves = optree.tree_leaves(like)
    if len(leaves) > 1 and not max(float(leaf) for leaf in leaves) > 0:
        raise ValueError(
            "lr_find: the tree of learning rates has only zeros, so their ratio is not known."
        )
