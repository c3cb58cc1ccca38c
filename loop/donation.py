"""States that are given up: a run may overwrite their tensors, and nobody can use them again."""

import optree
from torch import Tensor

from functional_sgd.fusion.spent import give_up, spender_of
from functional_sgd.memory import memory_of
from functional_sgd.sharded import local
from functional_sgd.tree import Tree
from loop.remembered import tensors_in
from loop.state import State


def taken(state: State, who: str) -> State:
    """The same state with tensors of its own; params and optimizer state given are spent.

    No number is copied: the memory of the tensors given goes over to the new ones, and they are
    left with NaN, so that whoever uses them finds out. What the state remembers (the best weights,
    an average) stays as it is, so params that lie in the same memory are copied.
    """
    remembered = {memory_of(tensor) for tensor in tensors_in(state.memory)}
    moved: dict[int, Tensor] = {}

    olds: list[Tensor] = []

    def move(old: object) -> object:
        if not isinstance(old, Tensor):
            return old
        # By identity: leaves that are one tensor stay one.
        if id(old) not in moved:
            moved[id(old)] = old.clone() if memory_of(old) in remembered else old.detach()
            olds.append(old)
        return moved[id(old)]

    trees: Tree = {"params": state.params, "opt_state": state.opt_state}
    new = state.replace(**optree.tree_map(move, trees))
    for old in olds:
        # What is remembered may be these very objects: the best params, say.
        if memory_of(old) not in remembered:
            give_up(local(old), who)
    return new


def check_not_spent(who: str, state: State) -> None:
    """Raise ValueError, on behalf of `who`, for a state that was given up."""
    # Params and slots are given up together, so to ask the params is enough.
    for value in state.params.values():
        spender = spender_of(local(value))
        if spender is not None:
            raise ValueError(
                f"{who}: this state was donated to {spender}, which has used its memory. Go on "
                f"with the state that came back, or leave donate out to keep both."
            )
