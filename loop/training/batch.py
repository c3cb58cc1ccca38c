"""Look at the data as a run sees it."""

from contextlib import closing
from dataclasses import replace

from functional_sgd.tree import Tree
from loop.learner import Learner
from loop.run.chance import global_generators_kept
from loop.run.entering import batches_of_a_pass
from loop.run.stages import device_of
from loop.state import State
from loop.training.fit import trace


def first_batch(learner: Learner, state: State) -> tuple[tuple[Tree, ...], tuple[Tree, ...]]:
    """(inputs, targets) of the batch that `fit(epochs=...)` would train on first, on the state's
    device, before any callback.

    That is the first of a pass; `fit(steps=...)` may go on in the middle of one, with another. Of a
    `parallel` learner it is this rank's part. The caller's random numbers are left alone. Raises
    ValueError if there is no training data.

    >>> import torch
    >>> from functional_sgd import sgd
    >>> from loop import DataLoaders
    >>> data = DataLoaders([(torch.ones(2, 1), torch.zeros(2, 1))])
    >>> learner = Learner(torch.nn.Linear(1, 1), data, torch.nn.functional.mse_loss, sgd())
    >>> first_batch(learner, learner.init())
    ((tensor([[1.],
            [1.]]),), (tensor([[0.],
            [0.]]),))
    """
    # A run, since it seeds loader and generators as `fit` does, and puts the generators back.
    with closing(trace(replace(learner, callbacks=()), state, epochs=1)) as running:
        found = next(seen for event, seen in running if event == "before_batch")
    return found.xb or (), found.yb or ()


def first_whole_batch(learner: Learner, state: State) -> tuple[Tree, ...]:
    """(inputs..., targets...) of the same batch; of a parallel learner, those of all ranks."""
    whole = replace(learner, data=learner.data.whole())
    now = state.at_rest().replace(learner=whole, training=True)
    # No run: on one of several processes, a learner of whole batches may have none.
    with global_generators_kept(device_of(state)):
        enter = next(iter(batches_of_a_pass(now, 0)))
        now = enter(now)
    return (*(now.xb or ()), *(now.yb or ()))
