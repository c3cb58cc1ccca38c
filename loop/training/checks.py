"""States that do not go with a learner: found out before a run takes its first step."""

from collections.abc import Sequence

from functional_sgd.placing import is_at_work
from functional_sgd.sharded import any_distributed, distributed
from loop.callbacks.saving import SaveModel
from loop.layout import processes
from loop.learner import Learner
from loop.state import State


def check_frozen(learner: Learner, state: State) -> None:
    """Raise ValueError if requires_grad of a parameter has changed since the state was made.

    What is trained stands in the state: its params are, its buffers are not.
    """
    if is_at_work(learner.model):
        return  # it has the tensors of a batch, which say nothing of its own
    for name, own in learner.model.named_parameters():
        if own.requires_grad and name in state.buffers:
            happened, cure = "is False in the state, and True in the model", "unfreeze"
        elif not own.requires_grad and name in state.params:
            happened, cure = "is True in the state, and False in the model", "freeze"
        else:
            continue
        raise ValueError(
            f"fit: requires_grad of {name!r} {happened}, which would change nothing: the state "
            f"says what is trained. To {cure} it, make a state after the change "
            f"(learner.load(state), learner.init()); or leave requires_grad alone, and pass the "
            f"callback Freeze."
        )


def check_cut(learner: Learner, state: State) -> None:
    """Raise ValueError for params in pieces without batches that are cut over the same processes.

    The derivative of what gathers them is a sum over their processes. Of gradients of whole batches
    it would be so many times too long, and of some of the parts it would be nothing. As many other
    processes read the same part of a batch, and leave out the rest.
    """
    cut = {name: value for name, value in state.params.items() if distributed(value)}
    if not cut or any_distributed(learner.model.parameters()):  # torch has cut the layers too
        return
    readers: frozenset[int] = getattr(learner.data, "members", frozenset())
    for name, value in cut.items():
        holders = processes(value)
        if len(holders) == 1 or holders == readers:
            continue
        others = ""
        if len(holders) == len(readers):
            others = f" others: process {min(readers - holders)} has none of {name!r}"
        raise ValueError(
            f"fit: the params are cut over {len(holders)} processes, and batches over "
            f"{len(readers) or 1}{others}. Fit parallel(learner) of all of these processes (the "
            f"mesh of shard, if it has one dimension), or unshard(state)."
        )


def check_written(state: State, callbacks: Sequence[object]) -> None:
    """Raise ValueError for a SaveModel that is to write params in pieces.

    All ranks ask, before callbacks that only one has are left out elsewhere: what joins pieces, or
    looks whether they are finite, needs all of them.
    """
    if not any_distributed(state.params.values()):
        return
    for callback in callbacks:
        if isinstance(callback, SaveModel) and callback.path is not None:
            raise ValueError(
                f"SaveModel: expected whole params to write, got some in pieces (DTensors), of "
                f"which this process has one; path is {str(callback.path)!r}. Use SaveModel(None), "
                f"which ends with the best, and save(unshard(end), path) after the run; or "
                f"Checkpoint, which writes pieces."
            )
