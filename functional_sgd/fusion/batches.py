"""Run a rule with torch: leaves of one shape as one batch, so that 100 matrices are one call."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from functional_sgd.call import Leaves
from functional_sgd.fusion.group import Group
from functional_sgd.randomness import LeafKey
from functional_sgd.rule import STEP
from functional_sgd.signature import DTYPE
from functional_sgd.step import run_on_leaf
from functional_sgd.wiring import Call

Written = dict[str, list[Any]]
"""What a rule writes for every leaf of a group: name -> values, in order."""


def run_in_batches(
    call: Call,
    leaves: Leaves,
    group: Group,
    columns: Mapping[str, Sequence[Tensor]],
    of_tree: Mapping[str, Tensor],
    unbatched: set[int],
) -> Written:
    """What a rule writes for every leaf of a group.

    A rule that torch.vmap cannot map over (it branches on values, say) is among the `unbatched`
    from then on, by its position in the chain, and runs leaf by leaf.
    """
    made: Written = {name: [None] * len(group.indices) for _, name in (*call.writes, *call.numbers)}
    for places in _batches(call, columns, len(group.indices)):
        written = None
        # A number of the tree is set by each leaf in turn, so those rules see one leaf at a time.
        if len(places) > 1 and call.position not in unbatched and not call.numbers:
            try:
                written = _batch(call, leaves, group, columns, of_tree, places)
            except torch.OutOfMemoryError:
                pass  # one leaf at a time needs less; another tree may fit
            except Exception:  # whatever vmap says of a rule that it cannot map over
                # If the rule itself is wrong, it raises again below, without vmap in between.
                unbatched.add(call.position)
        if written is None:
            written = _one_by_one(call, leaves, group, columns, of_tree, places)
        for name, values in written.items():
            for place, value in zip(places, values, strict=True):
                made[name][place] = value
    return made


def _batches(call: Call, columns: Mapping[str, Sequence[Tensor]], count: int) -> list[list[int]]:
    """The leaves by the shapes of all columns that the rule reads."""
    alike: dict[tuple[torch.Size, ...], list[int]] = {}
    for place in range(count):
        # Slots too: two leaves of one shape may have factors of different ranks.
        shapes = tuple(columns[name][place].shape for _, name in call.reads)
        alike.setdefault(shapes, []).append(place)
    return list(alike.values())


def _batch(
    call: Call,
    leaves: Leaves,
    group: Group,
    columns: Mapping[str, Sequence[Tensor]],
    of_tree: Mapping[str, Tensor],
    places: Sequence[int],
) -> Written:
    """One call for leaves of one shape, by torch.vmap over a stack of them."""
    stacks = {}
    for name, own in columns.items():
        stacks[name] = torch.stack([own[place] for place in places])
    numbers = _by_leaf(call, leaves, group, places)
    shared = {**leaves.tree_scalars(group.device), **of_tree, DTYPE: group.dtypes["param"]}

    def run(own: Mapping[str, Tensor], differing: Mapping[str, Tensor]) -> dict[str, Any]:
        scalars: dict[str, Any] = {**shared, **differing}
        for reduced in call.reductions:
            if reduced.reduction.over == "leaf":
                read = {inner: own[outer] for inner, outer in reduced.columns}
                scalars[reduced.name] = reduced.reduction.of(read)
        if call.rule.signature.random:
            pair = (differing[f"{call.key}_0"], differing[f"{call.key}_1"])
            scalars[call.key] = LeafKey(pair, call.position)
        return call.run(own, scalars)

    written = torch.vmap(run)(stacks, numbers)
    return {name: list(stack.unbind()) for name, stack in written.items()}


def _by_leaf(call: Call, leaves: Leaves, group: Group, places: Sequence[int]) -> dict[str, Tensor]:
    """The scalars that differ by leaf, each as a vector with an entry for each of these leaves."""
    indices = [group.indices[place] for place in places]
    numbers: dict[str, Tensor] = {}
    if any(name == STEP for _, name in call.scalars):
        numbers[STEP] = torch.stack([leaves.scalars(index)[STEP] for index in indices])
    for _, name in call.scalars:
        if name in leaves.separate:
            values = []
            for index in indices:
                value = leaves.separate[name][index]
                values.append(torch.as_tensor(value, dtype=torch.float64, device=group.device))
            numbers[name] = torch.stack(values)
    if call.rule.signature.random:
        # vmap maps over tensors and not over keys: the words go in, and the key is made inside.
        words = [leaves.key(call, index).common for index in indices]
        for word in (0, 1):
            numbers[f"{call.key}_{word}"] = torch.stack([pair[word] for pair in words])
    return numbers


def _one_by_one(
    call: Call,
    leaves: Leaves,
    group: Group,
    columns: Mapping[str, Sequence[Tensor]],
    of_tree: Mapping[str, Tensor],
    places: Sequence[int],
) -> Written:
    written: Written = {name: [] for _, name in (*call.writes, *call.numbers)}
    for place in places:
        index = group.indices[place]
        own = {name: values[place] for name, values in columns.items()}
        kept: dict[str, Tensor] = {}
        scalars = {**leaves.scalars(index), **of_tree}
        run_on_leaf(call, leaves, index, own, scalars, kept)
        for _, name in call.writes:
            written[name].append(own[name])
        for _, name in call.numbers:
            written[name].append(kept[name])
    return written
