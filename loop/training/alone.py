"""A run on one of several processes that knows nothing of the others."""

import warnings

from functional_sgd.sharded import any_distributed, n_processes
from loop.learner import Learner
from loop.state import State


def warn_if_alone(learner: Learner, state: State) -> None:
    """Say that each of several processes would train on all data by itself, as they do where
    `parallel` was forgotten.
    """
    count = n_processes()
    if count == 1 or hasattr(learner.data, "parts"):  # which parallel has cut
        return
    # Of params in pieces, all processes have one run in any case (tensor parallel).
    if any_distributed(state.params.values()) or any_distributed(learner.model.parameters()):
        return
    warnings.warn(
        f"fit: this is one of {count} processes, and the learner knows nothing of the others: each "
        f"trains on all data by itself, reports, and writes its own files. For one run on all of "
        f"them, fit parallel(learner, ...); for runs of their own, leave the processes without a "
        f"group, or ignore this warning.",
        stacklevel=4,
    )
