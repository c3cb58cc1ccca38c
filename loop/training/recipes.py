"""Whole runs by name: flat then cosine, warm restarts, one batch over and over."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import optree

from functional_sgd.schedules import flat_cosine, warm_restarts
from functional_sgd.tree import Tree
from loop.callbacks import ParamScheduler
from loop.learner import Learner
from loop.state import State
from loop.training.batch import first_whole_batch
from loop.training.fit import check_arguments, fit, highest_lr


def fit_flat_cos(
    learner: Learner,
    state: State,
    epochs: int | None = None,
    lr: Tree = None,
    div_final: float = 1e5,
    pct_start: float = 0.75,
    callbacks: Sequence[object] = (),
    **options: Any,
) -> State:
    """Train with lr for `pct_start` of the run, and then along a cosine down to lr / div_final.

    `lr` is a number or a tree prefix of params; the state's own if None. The momentum is left
    alone. The other arguments are those of `flat_cosine`, and those of `fit` (`steps=1000` instead
    of epochs). Source: fastai, for optimizers such as Ranger that need no warm-up.
    """
    top = highest_lr("fit_flat_cos", learner, state, lr)
    schedule = optree.tree_map(lambda top: flat_cosine(float(top), div_final, pct_start), top)
    return fit(learner, state, epochs, [*callbacks, ParamScheduler({"lr": schedule})], **options)


def fit_sgdr(
    learner: Learner,
    state: State,
    cycles: int,
    cycle_length: int | None = None,
    lr: Tree = None,
    cycle_mult: int = 2,
    callbacks: Sequence[object] = (),
    cycle_steps: int | None = None,
    **options: Any,
) -> State:
    """Train in cycles: in each, lr falls along a cosine from its maximum to 0, and starts again at
    the maximum.

    The first cycle has `cycle_length` epochs, each other `cycle_mult` times as many as the one
    before: 1, 2 and 4 make 7 epochs. With `cycle_steps` in its place it has so many training
    batches. `lr` is the maximum, a number or a tree prefix of params; the state's own if None. The
    other arguments are those of `fit`. Raises ValueError unless there is one of cycle_length and
    cycle_steps, and these, cycles and cycle_mult are whole numbers, 1 or more. Source: SGDR
    (Loshchilov and Hutter 2017).
    """
    if (cycle_length is None) == (cycle_steps is None):
        raise ValueError(
            f"fit_sgdr: expected one of cycle_length (epochs) and cycle_steps, got "
            f"{cycle_length!r} and {cycle_steps!r}. Pass one, such as cycle_length=1."
        )
    in_epochs = cycle_steps is None
    named = "cycle_length" if in_epochs else "cycle_steps"
    first: Any = cycle_length if in_epochs else cycle_steps
    for name, value in (("cycles", cycles), (named, first), ("cycle_mult", cycle_mult)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"fit_sgdr: {name} must be a whole number, 1 or more, got {value!r}.")
    top = highest_lr("fit_sgdr", learner, state, lr)
    schedule = optree.tree_map(lambda top: warm_restarts(float(top), cycles, cycle_mult), top)
    whole = sum(first * cycle_mult**cycle for cycle in range(cycles))
    epochs = whole if in_epochs else None
    steps = None if in_epochs else whole
    callbacks = [*callbacks, ParamScheduler({"lr": schedule})]
    return fit(learner, state, epochs, callbacks, steps=steps, **options)


def overfit_one_batch(
    learner: Learner,
    state: State,
    steps: int = 100,
    callbacks: Sequence[object] = (),
    **options: Any,
) -> State:
    """Train on one batch over and over: a model that can learn at all brings this loss down.
    Nothing is validated.

    The batch is that of `first_batch(learner, state)`, of a `parallel` learner the whole one. The
    run is one epoch of so many steps, so schedules work as ever; the losses are in the history of
    the state returned. The other arguments are those of `fit`. Raises ValueError if steps is
    below 1.

    >>> import torch
    >>> from functional_sgd import sgd
    >>> from loop import DataLoaders
    >>> x = torch.linspace(-1, 1, 8)[:, None]
    >>> data = DataLoaders([(x, 3 * x + 1), (x, 5 * x)])
    >>> learner = Learner(torch.nn.Linear(1, 1), data, torch.nn.functional.mse_loss, sgd(lr=0.3))
    >>> round(overfit_one_batch(learner, learner.init()).params["weight"].item(), 3)
    3.0
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(
            f"overfit_one_batch: steps must be a whole number, 1 or more, got {steps!r}."
        )
    check_arguments("overfit_one_batch", learner, state, callbacks)
    # Whole, since the data of a parallel learner cut what takes the place of their loader.
    batch = first_whole_batch(learner, state)
    # The list has the same tensors `steps` times; nothing is copied.
    data = replace(learner.data, train=[batch] * steps, valid=None)
    alone = replace(learner, data=data)
    return fit(alone, state, 1, callbacks, **options)
