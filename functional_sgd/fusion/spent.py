"""Donated trees: refuse those that cannot be overwritten, or have been already."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from functional_sgd.call import Leaves
from functional_sgd.fusion.buffers import LARGE, lies_alone
from functional_sgd.memory import Addresses, addresses_of, memory_of
from functional_sgd.sharded import any_distributed, local
from functional_sgd.tree import Tree, paths, unflatten

Donate: TypeAlias = bool | Literal["grads"]
"""What may be overwritten: nothing, params and state, or the gradients alone."""

SPENDER = "_spent_by"
"""The attribute of a tensor that was given up."""


def check_donate(who: str, donate: object) -> None:
    """Raise ValueError, on behalf of `who`, for what is none of these."""
    if donate not in (False, True, "grads"):
        raise ValueError(f"{who}: donate must be True, False or 'grads', got {donate!r}.")


def check_apart(
    params: Tree, leaves: Leaves, known: Mapping[str, Addresses] | None
) -> dict[str, Addresses]:
    """Where the tensors begin that are to be overwritten, column by column.

    Raises ValueError if two of them share memory; `known` are the beginnings of tensors just like
    these that do not.
    """
    columns = {"param": leaves.params, **leaves.slots}
    found = {
        name: leaves.starts[name] if name in leaves.starts else _starts(tensors)
        for name, tensors in columns.items()
    }
    # As bytes, since numpy takes ten times as long to say whether a few numbers are equal.
    if known is not None and all(found[name].tobytes() == known[name].tobytes() for name in found):
        return found
    written = [local(tensor) for column in columns.values() for tensor in column]
    starts = np.concatenate([*found.values()]).tolist()
    spans = sorted(
        (start, start + _extent(tensor), place)
        for place, (start, tensor) in enumerate(zip(starts, written, strict=True))
        # 0 stands for a tensor that is in no one place, such as a sparse one.
        if start and tensor.numel()
    )
    # Sorted by start, a span can only overlap spans that have not ended yet.
    crossed: list[tuple[int, int]] = []  # (end, place) of the spans that are not over
    for start, end, place in spans:
        crossed = [span for span in crossed if span[0] > start]
        for _, other in crossed:
            if _meet(written[other], written[place]):
                names = [name for name in columns for _ in leaves.params]
                every = paths(params) * len(columns)
                first, second = (f"{names[one]} {every[one]!r}" for one in (other, place))
                raise ValueError(
                    f"fuse: {first} and {second} share memory, so a donated step would update it "
                    f"twice. Keep one leaf for both, give one of them memory of its own (clone), "
                    f"or use fuse(opt, donate=False)."
                )
        crossed.append((end, place))
    return found


def refuse_spent(params: Tree, leaves: Leaves) -> None:
    """Raise ValueError if an earlier step has overwritten one of the tensors."""
    for index, path in enumerate(paths(params)):
        for leaf in (leaves.params[index], *(column[index] for column in leaves.slots.values())):
            if spender_of(local(leaf)) is not None:
                raise ValueError(
                    f"fuse: leaf {path!r} was donated to an earlier step, which has overwritten "
                    f"it. Go on with the params and state that the step returned, or use "
                    f"fuse(opt, donate=False)."
                )


def spend(
    leaves: Leaves, results: Mapping[str, list[Any]], slots: Mapping[str, list[Tensor]]
) -> tuple[dict[str, list[Any]], dict[str, list[Tensor]]]:
    """New tensors for the results; those passed in are marked, and made useless.

    They keep their shapes, so that the error that the next use gets is the one that tells why.
    """
    # A detached tensor keeps the memory when the old one loses it.
    new_results = {name: list(map(_moved, values)) for name, values in results.items()}
    new_slots = {name: list(map(_moved, values)) for name, values in slots.items()}
    for one in (*leaves.params, *(leaf for column in leaves.slots.values() for leaf in column)):
        give_up(local(one), "fuse")
    return new_results, new_slots


def give_up(tensor: Tensor, spender: str) -> None:
    """Leave a tensor with NaN and without memory of its own, and remember who has that now."""
    # Its shape stays, so that the error that is raised is the one that tells what happened.
    nothing = torch.full((), torch.nan, device="cpu").to(tensor.device, tensor.dtype)
    tensor.data = nothing.expand(tensor.shape)
    setattr(tensor, SPENDER, spender)


def spender_of(tensor: Any) -> str | None:
    """Who has the memory of a tensor that was given up; None if it has its own."""
    found: str | None = getattr(tensor, SPENDER, None)
    return found


def spendable(
    grads: Sequence[Tensor], params: Sequence[Tensor], others: Sequence[Sequence[Tensor]]
) -> dict[int, Tensor]:
    """The gradients, by their place, in whose memory new params can be written: large ones that lie
    as their params do, and where no other tensor lies.
    """
    # Autograd may give one tensor to two params, and a caller params as their own gradients.
    seen = Counter(map(id, itertools.chain(grads, *others)))
    return {
        place: grad
        for place, (grad, param) in enumerate(zip(grads, params, strict=True))
        if grad.numel() >= LARGE
        and grad.stride() == param.stride()
        and seen[id(grad)] == 1
        and lies_alone(grad)
    }


def only(grads: Sequence[Tensor | None], chosen: set[int]) -> list[Tensor | None]:
    """The gradients of some leaves, None for the others."""
    return [grad if index in chosen else None for index, grad in enumerate(grads)]


def merged(leaves: Leaves, ours: Any, theirs: Any, others: Sequence[int]) -> Any:
    """Two results of one step as one: `theirs` for these leaves, `ours` for the rest."""
    *our_trees, our_state = ours
    *their_trees, their_state = theirs
    trees = [
        _mixed(leaves, one, other, others)
        for one, other in zip(our_trees, their_trees, strict=True)
    ]
    slots = {
        name: _mixed(leaves, our_state[name], their_state[name], others) for name in leaves.slots
    }
    return (*trees, {**our_state, **slots})


def _mixed(leaves: Leaves, one: Tree, other: Tree, others: Sequence[int]) -> Tree:
    values = leaves.spec.flatten_up_to(one)
    for index in others:
        values[index] = leaves.spec.flatten_up_to(other)[index]
    return unflatten(leaves.spec, values)


@torch.no_grad()
def put_back(leaves: Leaves, result: Any) -> Any:
    """The results of a step that was not donated, in the memory of the arguments."""
    params, *update, state = result
    old = {"param": leaves.params, **leaves.slots}
    new = {"param": params, **{name: state[name] for name in leaves.slots}}
    given = {memory_of(tensor) for tensors in old.values() for tensor in tensors}
    pairs = []
    for name, tensors in old.items():
        values: list[Any] = leaves.spec.flatten_up_to(new[name])
        if leaves.shards is not None:
            values = leaves.shards.column(values)
        for before, after in zip(tensors, values, strict=True):
            if before is not after:  # what was handed from one slot to another must not be lost
                pairs.append((before, after.clone() if memory_of(after) in given else after))
    # A second loop, so that all clones exist before anything is overwritten.
    for before, after in pairs:
        before.copy_(after)
    kept = {name: leaves.trees[name] for name in leaves.slots}
    return leaves.trees["param"], *update, {**state, **kept}


def _moved(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _starts(tensors: Sequence[Tensor]) -> Addresses:
    """Where tensors begin; 0 for those that have no one place, such as sparse ones."""
    if any_distributed(tensors):  # slots of a shape of their own
        tensors = list(map(local, tensors))
    try:
        return addresses_of(tensors)
    except RuntimeError:
        places = [one.data_ptr() if one.layout is torch.strided else 0 for one in tensors]
        return np.array(places, dtype=np.int64)


def _meet(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors whose spans cross share an element: views may lie between each other."""
    size = one.element_size()
    # The marks below are one for each element, so different sizes cannot be compared exactly.
    if other.element_size() != size:
        return True
    begin = min(one.data_ptr(), other.data_ptr())
    places = [(tensor.data_ptr() - begin) // size for tensor in (one, other)]
    room = max(p + _extent(t) // size for p, t in zip(places, (one, other), strict=True))
    taken = torch.zeros(room, dtype=torch.bool, device="cpu")
    taken.as_strided(one.shape, one.stride(), places[0]).fill_(True)
    return bool(taken.as_strided(other.shape, other.stride(), places[1]).any())


def _extent(tensor: Tensor) -> int:
    """How many bytes lie between its first and its last element, both included."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in pairs)) * tensor.element_size()
