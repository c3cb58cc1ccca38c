"""Donated trees: refuse those that cannot be overwritten, or have been already."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from functional_sgd.call import Leaves
from functional_sgd.fusion.buffers import LARGE, lies_alone
from functional_sgd.guard import Guard
from functional_sgd.memory import Addresses, addresses_of, memory_of
from functional_sgd.sharded import any_distributed, local
from functional_sgd.tree import Tree, paths, unflatten

Donate: TypeAlias = bool | Literal["grads"]
"""What may be overwritten: nothing, params and state, or the gradients alone."""

Results: TypeAlias = tuple[Tree, ...]
"""What a step returns: new params, perhaps the update, and the state."""

SPENDER = "_spent_by"
"""The attribute of a tensor that was given up."""


def check_donate(who: str, donate: object) -> None:
    """Raise ValueError, on behalf of `who`, for what is none of these."""
    if donate not in (False, True, "grads"):
        raise ValueError(f"{who}: donate must be True, False or 'grads', got {donate!r}.")


def check_apart(
    params: Tree, leaves: Leaves, known: Mapping[str, Addresses] | None
) -> Mapping[str, Addresses]:
    """Where the tensors begin that are to be overwritten, column by column.

    Raises ValueError if two of them share memory; `known` are the beginnings of tensors just like
    these that do not.
    """
    columns = {"param": leaves.params, **leaves.slots}
    found: dict[str, Addresses] = {}
    for name, tensors in columns.items():
        found[name] = leaves.starts[name] if name in leaves.starts else _starts(tensors)
    # As bytes, since numpy takes ten times as long to say whether a few numbers are equal.
    if known is not None and all(found[name].tobytes() == known[name].tobytes() for name in found):
        return known
    written = list(map(local, itertools.chain(*columns.values())))
    meeting = _meeting(written, np.concatenate([*found.values()]).tolist())
    if meeting is not None:
        pairs = itertools.product(columns, paths(params))
        names = [f"{name} {path!r}" for name, path in pairs]
        first, second = names[meeting[0]], names[meeting[1]]
        raise ValueError(
            f"fuse: {first} and {second} share memory, so a donated step would update it "
            f"twice. Keep one leaf for both, give one of them memory of its own (clone), "
            f"or use fuse(opt, donate=False)."
        )
    return found


class _Span(NamedTuple):
    """The memory from the first to the last element of a tensor."""

    start: int
    end: int
    place: int  # of the tensor among all


def _meeting(tensors: Sequence[Tensor], starts: Sequence[int]) -> tuple[int, int] | None:
    """The places of two tensors that share an element, if there are any."""
    spans = []
    for place, (start, tensor) in enumerate(zip(starts, tensors, strict=True)):
        # 0 stands for a tensor that is in no one place, such as a sparse one.
        if start and tensor.numel():
            spans.append(_Span(start, start + _extent(tensor), place))
    # Sorted by start, a span can only overlap spans that have not ended yet.
    begun: list[_Span] = []
    for span in sorted(spans):
        begun = [other for other in begun if other.end > span.start]
        for other in begun:
            if _meet(tensors[other.place], tensors[span.place]):
                return other.place, span.place
        begun.append(span)
    return None


class AliasedReads:
    """Finds what a donated step reads where it writes. What is known of trees that a guard
    recognises serves for later steps.
    """

    def __init__(self) -> None:
        self._guard: Guard | None = None
        self._written: Mapping[str, Addresses] | None = None
        self._spans: tuple[Addresses, Addresses] = _NOWHERE, _NOWHERE
        self._sizes: dict[str, Addresses] = {}  # of the tensors of a column, in bytes
        self._apart: dict[str, bytes] = {}  # where a column began that had nothing in common

    def copy(self, leaves: Leaves, written: Mapping[str, Addresses], guard: Guard | None) -> None:
        """Copy gradients, and columns of the caller, that lie where the step will write: a later
        pass, or the same one at another leaf, would find there what has been written.

        `written` says where the tensors begin that are overwritten.
        """
        if guard is None or guard is not self._guard:
            self._guard, self._written, self._sizes = guard, None, {}
        if written is not self._written:
            self._apart = {}
            columns = {"param": leaves.params, **leaves.slots}
            sizes = np.concatenate([self._sizes_of(columns[name], name) for name in written])
            begins = np.concatenate([*written.values()])
            self._spans = np.sort(begins), np.sort(begins + sizes)
            self._written = written
        read: dict[str, list[Tensor | None]] = {"grad": leaves.grads, **leaves.given}
        for name, column in read.items():
            there = [value for value in column if value is not None]
            starts = leaves.starts[name] if name in leaves.starts else _starts(there)
            # Allocators hand out the same memory at every step, mostly, and comparing bytes takes
            # a tenth of the time.
            if self._apart.get(name) == starts.tobytes():
                continue
            stops = starts + self._sizes_of(there, name)
            # Sorted by themselves, the sums are the same, and found in half the time.
            if not self._crossings(np.sort(starts), np.sort(stops)).sum():
                self._apart[name] = starts.tobytes()
                continue
            crossed = self._crossings(starts, stops)
            shared = {id(there[place]) for place in np.flatnonzero(crossed).tolist()}
            for place, value in enumerate(column):
                if value is not None and id(value) in shared:
                    column[place] = value.clone()
            leaves.starts = {n: begin for n, begin in leaves.starts.items() if n != name}

    def _crossings(self, starts: Addresses, stops: Addresses) -> Addresses:
        """How many of the written spans each of these has something in common with."""
        begins, ends = self._spans
        # All that begin before its end, but for those that end before it begins.
        return np.searchsorted(begins, stops) - np.searchsorted(ends, starts, "right")

    def _sizes_of(self, tensors: Sequence[Tensor], name: str) -> Addresses:
        """How many bytes each tensor of a column spans; 0 for those that have no one place."""
        known = self._sizes.get(name)
        if known is None or len(known) != len(tensors):
            sizes = []
            for tensor in map(local, tensors):
                somewhere = tensor.layout is torch.strided and tensor.numel() > 0
                size = _extent(tensor) if somewhere else 0
                sizes.append(size)
            known = self._sizes[name] = np.array(sizes, dtype=np.int64)
        return known


_NOWHERE: Addresses = np.zeros(0, dtype=np.int64)


def refuse_spent(params: Tree, leaves: Leaves) -> None:
    """Raise ValueError if an earlier step has overwritten one of the tensors."""
    columns: list[Sequence[Tensor | None]] = [leaves.params, leaves.grads, *leaves.slots.values()]
    for index, path in enumerate(paths(params)):
        for column in columns:
            leaf = column[index]
            if leaf is not None and spender_of(local(leaf)) is not None:
                raise ValueError(
                    f"fuse: leaf {path!r} was donated to an earlier step, which has overwritten "
                    f"it. Go on with the params and state that the step returned, or use "
                    f"fuse(opt, donate=False)."
                )


def spend(leaves: Leaves, result: Results, donated: bool) -> Results:
    """New tensors for the results; those passed in whose memory they have are marked, and made
    useless: params and slots if they were donated, else gradients.

    They keep their shapes, so that the error that the next use gets is the one that tells why.
    """
    *trees, state = result
    given: list[Any] = []
    if donated:
        for tree in leaves.trees.values():
            given += leaves.spec.flatten_up_to(tree)
    else:
        taken = set(map(id, leaves.spec.flatten_up_to(trees[0])))
        given += [grad for grad in leaves.grads if id(grad) in taken]
    # A detached tensor keeps the memory when the old one loses it.
    trees = [_moved(leaves, tree) for tree in trees]
    state = dict(state)
    for name in leaves.slots:
        state[name] = _moved(leaves, state[name])
    for one in given:
        give_up(local(one), "fuse")
    return *trees, state


def give_up(tensor: Tensor, spender: str) -> None:
    """Leave a tensor with NaN and without memory of its own, and remember who has that now."""
    # Its shape stays, so that the error that is raised is the one that tells what happened.
    nothing = torch.full((), torch.nan, device="cpu").to(tensor.device, tensor.dtype)
    tensor.data = nothing.expand(tensor.shape)
    setattr(tensor, SPENDER, spender)


def spender_of(tensor: object) -> str | None:
    """Who has the memory of a tensor that was given up; None if it has its own."""
    found: str | None = getattr(tensor, SPENDER, None)
    return found


def spendable(
    grads: Sequence[Tensor], params: Sequence[Tensor], holders: Mapping[int, int]
) -> dict[int, Tensor]:
    """The gradients, by their place, in whose memory new params can be written: large ones that lie
    as their params do, and where no other tensor lies.

    `holders` says how many columns, of all leaves of the step, have a tensor, by its id: autograd
    may give one tensor to two params, and a caller params as their own gradients.
    """
    found = {}
    for place, (grad, param) in enumerate(zip(grads, params, strict=True)):
        fits = grad.numel() >= LARGE and grad.stride() == param.stride()
        if fits and holders[id(grad)] == 1 and lies_alone(grad):
            found[place] = grad
    return found


def only(grads: Sequence[Tensor | None], chosen: set[int]) -> list[Tensor | None]:
    """The gradients of some leaves, None for the others."""
    found: list[Tensor | None] = [None] * len(grads)
    for index in chosen:
        found[index] = grads[index]
    return found


def merged(leaves: Leaves, ours: Results, theirs: Results, others: Sequence[int]) -> Results:
    """Two results of one step as one: `theirs` for these leaves, `ours` for the rest."""
    *our_trees, our_state = ours
    *their_trees, their_state = theirs
    pairs = zip(our_trees, their_trees, strict=True)
    trees = [_mixed(leaves, one, other, others) for one, other in pairs]
    state = dict(our_state)
    for name in leaves.slots:
        state[name] = _mixed(leaves, our_state[name], their_state[name], others)
    return *trees, state


def _mixed(leaves: Leaves, one: Tree, other: Tree, others: Sequence[int]) -> Tree:
    values = leaves.spec.flatten_up_to(one)
    theirs = leaves.spec.flatten_up_to(other)
    for index in others:
        values[index] = theirs[index]
    return unflatten(leaves.spec, values)


@torch.no_grad()
def put_back(leaves: Leaves, result: Results) -> Results:
    """The results of a step that was not donated, in the memory of the arguments."""
    params, *update, state = result
    old = {"param": leaves.params, **leaves.slots}
    new = {"param": params}
    for name in leaves.slots:
        new[name] = state[name]
    given = set(map(memory_of, itertools.chain(*old.values())))
    pairs = []
    for name, tensors in old.items():
        values: list[Any] = leaves.spec.flatten_up_to(new[name])
        if leaves.shards is not None:
            values = leaves.shards.column(values)
        for before, after in zip(tensors, values, strict=True):
            if before is after:
                continue
            # What was handed from one slot to another must not be lost.
            shared = memory_of(after) in given
            pairs.append((before, after.clone() if shared else after))
    # A second loop, so that all clones exist before anything is overwritten.
    for before, after in pairs:
        before.copy_(after)
    kept = dict(state)
    for name in leaves.slots:
        kept[name] = leaves.trees[name]
    return leaves.trees["param"], *update, kept


def _moved(leaves: Leaves, tree: Tree) -> Tree:
    values: list[Any] = leaves.spec.flatten_up_to(tree)
    for place, leaf in enumerate(values):
        if isinstance(leaf, Tensor):
            values[place] = leaf.detach()
    return unflatten(leaves.spec, values)


def _starts(tensors: Sequence[Tensor]) -> Addresses:
    """Where tensors begin; 0 for those that have no one place, such as sparse ones."""
    if any_distributed(tensors):  # slots of a shape of their own
        tensors = list(map(local, tensors))
    try:
        return addresses_of(tensors)
    except RuntimeError:
        starts = np.zeros(len(tensors), dtype=np.int64)
        for place, one in enumerate(tensors):
            if one.layout is torch.strided:
                starts[place] = one.data_ptr()
        return starts


def _meet(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors whose spans cross share an element: views may lie between each other."""
    size = one.element_size()
    # The marks below are one for each element, so different sizes cannot be compared exactly.
    if other.element_size() != size:
        return True
    begin = min(one.data_ptr(), other.data_ptr())
    place, other_place = (one.data_ptr() - begin) // size, (other.data_ptr() - begin) // size
    room = max(place + _extent(one) // size, other_place + _extent(other) // size)
    taken = torch.zeros(room, dtype=torch.bool, device="cpu")
    taken.as_strided(one.shape, one.stride(), place).fill_(True)
    return bool(taken.as_strided(other.shape, other.stride(), other_place).any())


def _extent(tensor: Tensor) -> int:
    """How many bytes lie between its first and its last element, both included."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in pairs)) * tensor.element_size()
