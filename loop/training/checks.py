"""States that do not go with a learner: found out before a run takes its first step."""

from functional_sgd.placing import is_at_work
from functional_sgd.sharded import any_distributed, distributed
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
    """Raise ValueError for params in pieces without batches in as many.

    The derivative of what gathers them is a sum over their processes. Of gradients of whole batches
    it would be so many times too long, and of some of the parts it would be nothing.
    """
    cut = [value for value in state.params.values() if distributed(value)]
    if not cut or any_distributed(learner.model.parameters()):  # torch has cut the layers too
        return
    pieces = max(len(processes(value)) for value in cut)
    parts = getattr(learner.data, "parts", 1)
    if pieces not in (1, parts):
        raise ValueError(
            f"fit: the params are cut over {pieces} processes, and batches over {parts}. Fit "
            f"parallel(learner) of all of these processes, or unshard(state)."
        )
