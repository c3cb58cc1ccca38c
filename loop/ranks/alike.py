"""What all ranks must hold alike, and how it is found out that they do not."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

import optree
import torch
from torch import Tensor

from functional_sgd.sharded import local
from functional_sgd.tree import Tree
from loop.ranks.cut import Cuts
from loop.ranks.group import Group
from loop.run.passes import length
from loop.run.stages import learner_of
from loop.state import State


@dataclass
class Watch:
    """Looks after what forward passes change besides float buffers, which become means.

    A rank's forward pass has seen its part of a batch. What it makes of params, and of buffers
    that are no floats, is nobody else's: ranks that differ in it have another state each.
    """

    group: Group
    own: frozenset[str]  # the names of the model's parameters, frozen ones too
    frozen: Mapping[str, Tensor]  # those among the buffers, as the run began with them
    params: Mapping[str, Tensor] | None = None  # from before the forward pass of a batch
    shapes: Sequence[torch.Size] = ()  # of the float buffers, after the last batch
    writes: bool | None = None  # whether a forward pass changes params; None: not known yet
    late: frozenset[str] = frozenset()  # params that were changed when it was known not to

    @classmethod
    def begun(cls, group: Group, state: State) -> "Watch":
        """That of a run which begins, or goes on, with this state."""
        own = frozenset(dict(learner_of(state).model.named_parameters()))
        frozen = {name: value for name, value in state.buffers.items() if name in own}
        return cls(group, own, frozen)

    def before_sums(self, state: State, floats: Mapping[str, Tensor]) -> None:
        """Look at what the forward pass of a batch has changed, given its float buffers, before
        they are added up over ranks.

        Raises ValueError, on all ranks, if params are changed and not alike any more, or if the
        float buffers of ranks have several shapes; and for one whose shape changes later on.
        """
        changed = self._changed(state)
        shapes = [*map(_SHAPE, floats.values())]
        if self.writes is False:
            # A look at the others would be one more collective in every batch.
            self.late |= changed
            if shapes != self.shapes and self.group.size > 1:
                _check_shapes(dict(zip(floats, self.shapes, strict=False)), floats)
        else:
            every = self.group.gathered(_Changed(changed, dict(zip(floats, shapes, strict=True))))
            _check_same_shapes([one.shapes for one in every])
            names: set[str] = set()  # changed on any rank: all of them must ask for the same
            for one in every:
                names |= one.params
            self._compare(state, names)
            if state.grads is not None:
                self.writes = bool(names)
        self.shapes = shapes

    def after_phase(self, state: State) -> None:
        """Look at what no batch has made alike, once the training of an epoch is over.

        Raises ValueError, on all ranks, if it is not alike.
        """
        kept = [name for name, value in state.buffers.items() if not averages(value)]
        # Ranks have the same buffers, so all go on, or none does.
        if kept or self.frozen:
            self._look(state, kept)

    def after_run(self, state: State) -> None:
        """Look at params that a forward pass has begun to change in the middle of the run.

        Raises ValueError, on all ranks, if they are not alike.
        """
        self._look(state, ())

    def _look(self, state: State, kept: Iterable[str]) -> None:
        """Compare the buffers `kept`, and params that were changed on some rank."""
        moved = {*self.late, *kept}
        for name, value in state.buffers.items():
            # Every batch has new tensors, but a frozen parameter lies where it has been.
            before = self.frozen.get(name, value)
            if local(value).data_ptr() != local(before).data_ptr():
                moved.add(name)
        self._compare(state, frozenset().union(*self.group.gathered(moved)))
        self.late = frozenset()

    def _changed(self, state: State) -> frozenset[str]:
        """The params that are others than before the forward pass."""
        now, before = state.params, self.params
        if now is before or before is None or state.grads is None:
            return frozenset()
        return frozenset(name for name in now if now[name] is not before.get(name))

    def _compare(self, state: State, names: Set[str]) -> None:
        """Raise ValueError for a tensor that is not alike on all ranks. They all ask for the
        same ones.
        """
        if not names:
            return
        tensors = {**state.params, **state.buffers}
        common = sorted(names & tensors.keys())
        mine = {name: digest([tensors[name]], self.group) for name in common}
        every = self.group.gathered(mine)
        for name, own in mine.items():
            if any(one[name] != own for one in every):
                message = _changed_param(name) if name in self.own else _counted(name)
                raise ValueError(message)


def averages(buffer: Tensor) -> bool:
    """Whether a buffer becomes a mean over ranks, if it is no parameter."""
    return buffer.is_floating_point() or buffer.is_complex()


def check_begun_alike(group: Group, everyone: Group, state: State, data: Cuts) -> None:
    """Raise ValueError unless all ranks begin, or go on, with the same state and as much data."""
    facts = _facts(state, data)
    # The counters must agree on all processes. The tensors differ where torch has cut the layers,
    # so their digest is compared within the group only.
    if everyone != group:
        _check_begun(everyone.gathered(facts))
    trees: Tree = (state.params, state.buffers, state.opt_state)
    tensors = digest(optree.tree_leaves(trees), group)
    _check_begun(group.gathered(facts | {_TENSORS: tensors}))


def digest(tensors: Iterable[Tensor], group: Group) -> str:
    """Of all tensors of which the ranks of a group should have the same, whole or in pieces."""
    found = hashlib.sha256()
    for tensor in tensors:
        if group.adds(tensor):
            own = local(tensor).detach().cpu().contiguous()
            found.update(own.view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


_SHAPE = attrgetter("shape")


class _Changed(NamedTuple):
    """What a rank says of a forward pass."""

    params: frozenset[str]  # those that it has changed
    shapes: Mapping[str, torch.Size]  # of float buffers


def _facts(state: State, data: Cuts) -> dict[str, object]:
    """What must be equal on all ranks, in a few bytes."""
    place = (state.done, state.train_iter, state.epochs_seen, state.n_epoch, state.n_step)
    lengths = []
    for loader in (data.train, data.valid):
        if loader is not None:
            lengths.append(length(loader))
    # The place comes first, since it says most: ranks at different places differ in the rest too.
    return {"place in the run": place, "seed": state.seed, "number of batches": lengths}


_TENSORS = "params, buffers or optimizer state (digest)"


def _check_begun(every: Sequence[Mapping[str, object]]) -> None:
    """Raise ValueError unless all ranks have said the same."""
    for what in every[0]:
        values = [one[what] for one in every]
        if any(value != values[0] for value in values):
            raise ValueError(
                f"parallel: the ranks begin with another {what} each: {values}. Build model "
                f"and data alike on all ranks: torch.manual_seed(0) before the model, one seed "
                f"for learner.init, the same files, one folder for all to resume from."
            )


def _check_same_shapes(every: Sequence[Mapping[str, torch.Size]]) -> None:
    """Raise ValueError for a buffer that has another shape elsewhere."""
    for name in every[0]:
        shapes = [tuple(one[name]) for one in every if name in one]
        if len(set(shapes)) > 1:
            raise ValueError(
                f"parallel: after a forward pass, the buffer {name!r} has another shape on each "
                f"rank: {shapes}. {_ONE_SHAPE}"
            )


def _check_shapes(before: Mapping[str, torch.Size], now: Mapping[str, Tensor]) -> None:
    """Raise ValueError for a buffer that had another shape after the last batch."""
    for name, value in now.items():
        shape = before.get(name, value.shape)
        if shape != value.shape:
            raise ValueError(
                f"parallel: this forward pass has made the buffer {name!r}, of shape "
                f"{tuple(shape)}, one of shape {tuple(value.shape)}. {_ONE_SHAPE}"
            )


_ONE_SHAPE = (
    "Float buffers become means over ranks, so expected is one shape, whatever a rank's part of "
    "the batch is. Give it its final shape in __init__."
)


def _changed_param(name: str) -> str:
    return (
        f"parallel: a forward pass has changed the parameter {name!r}, which is another one on "
        f"each rank now: a rank sees its part of the batch. Expected are changes that do not "
        f"depend on the data. Initialise it from data before the learner is made, with the same "
        f"batch on all ranks; or keep what follows the data in a float buffer, which becomes the "
        f"mean over ranks."
    )


def _counted(name: str) -> str:
    return (
        f"parallel: the buffer {name!r} is another one on each rank after this epoch: a rank sees "
        f"its part of the data, and only buffers of floats become means over ranks. Add up over "
        f"ranks what goes into it (torch.distributed.all_reduce, in training), or count in a "
        f"metric, whose tallies are added up."
    )
