"""Run a chain leaf by leaf, with plain torch operators.

This is what a chain means; every faster executor must give the same numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from functional_sgd.call import Leaves, Plan, here, take_apart
from functional_sgd.hyper import Hyper
from functional_sgd.randomness import LeafKey
from functional_sgd.sharded import distributed, full
from functional_sgd.signature import DTYPE
from functional_sgd.state import State, gradient_for, owned, stored, working
from functional_sgd.tracing import followed
from functional_sgd.tree import Tree, unflatten
from functional_sgd.wiring import Call, Reduced

Columns = dict[str, Tensor]
"""What one leaf has under each name."""


def leaf_by_leaf(
    plan: Plan,
    params: Tree,
    grads: Tree,
    state: State,
    hyper: Mapping[str, Hyper] | None,
    extras: Mapping[str, Any],
) -> tuple[Tree, ...]:
    """One step of the chain: its results, then the new state.

    Leaves without a gradient come back as they are.
    """
    leaves = take_apart(plan, params, grads, state, hyper, extras)
    # A step that is tracked or recorded must go through DTensor's own operators.
    if leaves.distributed and not followed(leaves.tensors):
        leaves = leaves.on_pieces()
    return run_leaves(plan, leaves)


def run_leaves(plan: Plan, leaves: Leaves) -> tuple[Tree, ...]:
    """`leaf_by_leaf`, for a call that has been taken apart."""
    columns = {index: columns_of(leaves, index) for index in leaves.active}
    kept: dict[int, Columns] = {index: {} for index in columns}
    # What is read of a leaf once its last rule has run; its gradient is the update if no rule has
    # written one.
    results = (*plan.results, "grad") if "update" in plan.results else plan.results
    stretches = _stretches(plan.calls, leaves.shards is not None)
    for calls in stretches:
        if calls[0].treewise:
            _run_treewise(plan, calls[0], leaves, columns, kept)
            continue
        # A call that needs or writes numbers of the tree is alone in its stretch, so the first is
        # asked.
        reduced = reduce_columns(plan, calls[0], leaves, columns)
        for index in columns:
            scalars = {**leaves.scalars(index), **reduced[index]}
            for call in calls:
                run_on_leaf(call, leaves, index, columns[index], scalars, kept[index])
            if calls is stretches[-1]:  # temporaries of this leaf go before the next makes its own
                columns[index] = {n: v for n, v in columns[index].items() if n in results}
        for _, name in calls[0].numbers:
            values = [own.pop(name) for own in kept.values()]  # the same on every leaf
            if values:
                leaves.set_number(name, values[0])
    return _results(plan, leaves, columns, kept)


def _stretches(calls: Sequence[Call], on_pieces: bool) -> list[list[Call]]:
    """Calls in a row that can be done one leaf after the other.

    One that needs numbers of the whole tree stands alone; on pieces of leaves, so does one that
    needs any number made of columns, since those of all leaves take one collective.
    """
    stretches: list[list[Call]] = []
    before = True
    for call in calls:
        alone = call.rule.needs_tree or (on_pieces and bool(call.reductions))
        if alone or before:
            stretches.append([call])
        else:
            stretches[-1].append(call)
        before = alone
    return stretches


def columns_of(leaves: Leaves, index: int) -> Columns:
    """What one leaf has in every column before the first rule, as rules see it."""
    param, grad = leaves.params[index], leaves.grads[index]
    assert grad is not None
    columns = {"param": working(param), "grad": gradient_for(param, grad)}
    for name, slots in leaves.slots.items():
        columns[name] = working(slots[index])
    for name, values in leaves.given.items():
        value = values[index]
        assert value is not None
        columns[name] = gradient_for(param, value)
    return columns


def reduce_columns(
    plan: Plan, call: Call, leaves: Leaves, columns: Mapping[int, Columns]
) -> dict[int, dict[str, Tensor]]:
    """The reductions of a rule that must be known before it runs, for each leaf.

    These are the numbers of the whole tree; on pieces of leaves, those of each leaf too.
    """
    check_tree_scalars(plan, call, leaves)
    values: dict[int, dict[str, Tensor]] = {index: {} for index in columns}
    needed = [one for one in call.reductions if leaves.shards or one.reduction.over == "tree"]
    if not needed or not columns:
        return values
    for reduced, own in zip(needed, _parts(needed, leaves, columns), strict=True):
        if reduced.reduction.over == "leaf":
            for index, part, size in zip(columns, own.parts, own.sizes, strict=True):
                values[index][reduced.name] = reduced.reduction.finished(part, size)
            continue
        total = reduced.reduction.together(own.parts)
        number = reduced.reduction.finished(total, sum(own.sizes))
        for index in columns:
            values[index][reduced.name] = number
    return values


class _Parts(NamedTuple):
    """What a reduction is made of, leaf by leaf."""

    parts: list[Tensor]
    sizes: list[int]  # of how many elements, on all processes


def _parts(
    needed: Sequence[Reduced], leaves: Leaves, columns: Mapping[int, Columns]
) -> list[_Parts]:
    """For each reduction, the parts of the leaves."""
    found = [_Parts([], []) for _ in needed]
    shards = leaves.shards
    rows: list[int | None] = []  # the leaves, None where the parts are those of all pieces
    for index, own in columns.items():
        cut = shards is not None and shards.cut[index]
        # `of_leaf` combines the pieces of DTensors itself.
        apart = cut and _reads_distributed(needed, own)
        row = None if apart else index
        rows.append(row)
        for parts, one in zip(found, needed, strict=True):
            read = {inner: own[outer] for inner, outer in one.columns}
            if apart and shards is not None:
                read = {name: shards.whole(index, value) for name, value in read.items()}
            size = next(iter(read.values())).numel()
            if cut and not apart and shards is not None:
                # A mean divides by the number of elements on all processes.
                size = shards.size(index)
            parts.parts.append(one.reduction.of_leaf(read))
            parts.sizes.append(size)
    if shards is None or not shards.any_cut:
        return found
    device = found[0].parts[0].device
    # In one table, so that all leaves and all reductions of a kind share one collective.
    table = torch.stack([torch.stack(own.parts).to(device) for own in found], dim=1)
    shards.combine([table], [rows], [one.reduction.combine for one in needed])
    together = zip(found, table.unbind(1), strict=True)
    return [own._replace(parts=list(column.unbind())) for own, column in together]


def _reads_distributed(needed: Sequence[Reduced], columns: Columns) -> bool:
    """Whether one of the columns that these are made of is a DTensor."""
    names: set[str] = set()
    for one in needed:
        names.update(outer for _, outer in one.columns)
    return any(distributed(columns[name]) for name in names)


def check_tree_scalars(plan: Plan, call: Call, leaves: Leaves) -> None:
    """Raise ValueError if a rule on the whole tree would read a hyper that differs by leaf."""
    if leaves.separate and (call.treewise or call.numbers):
        for _, name in call.scalars:
            if name in leaves.separate:
                why = "sees whole trees" if call.treewise else "keeps a number of the whole tree"
                raise ValueError(
                    f"{plan.who}: rule {call.rule.name} {why}, so {name!r} must be one number."
                )


def run_on_leaf(
    call: Call,
    leaves: Leaves,
    index: int,
    columns: Columns,
    scalars: Mapping[str, Any],
    kept: Columns,
) -> None:
    """Call a rule on the columns of one leaf.

    What it writes goes among them; its slots, and numbers of the tree, among what is kept. A
    leafwise rule sees a complex leaf as it is, since it looks at shapes; elementwise rules see
    pairs of reals.
    """
    leaf = leaves.params[index]
    own = dict(scalars)
    for reduced in call.reductions:
        reduction = reduced.reduction
        if reduction.over == "leaf" and leaves.shards is None:
            own[reduced.name] = reduction.of({i: columns[o] for i, o in reduced.columns})
        else:
            # Known already: one of the tree, or brought together for the pieces of all leaves.
            own[reduced.name] = here(own[reduced.name], leaf.device)
    if call.rule.signature.random:
        own[call.key] = leaves.key(call, index)
    own[DTYPE] = leaf.dtype
    whole = leaf.is_complex() and call.rule.scope == "leafwise"
    seen: Mapping[str, Tensor] = columns
    shards = leaves.shards if leaves.shards is not None and leaves.shards.cut[index] else None
    if whole:
        seen = _as_complex(columns, leaf)
    if shards is not None:
        # What looks at other elements sees the whole leaf, as does what reads a column of another
        # shape, which is there for all pieces.
        read = [seen[outer] for _, outer in call.reads]
        if call.rule.scope in ("blockwise", "leafwise") or any(map(distributed, read)):
            seen = {outer: shards.whole(index, seen[outer]) for _, outer in call.reads}
    tree_numbers = [name for _, name in call.numbers]
    written = run_on_pieces(call, seen, own) if leaves.distributed else call.run(seen, own)
    for name, value in written.items():
        if name in tree_numbers:
            # The state holds plain numbers, also if they were computed from DTensors.
            kept[name] = full(value)
            continue
        if shards is not None and (seen is not columns):
            # A rule that was given whole leaves returns whole leaves.
            value = shards.piece(index, value)
        columns[name] = torch.view_as_real(value) if whole and value.is_complex() else value
        if name in call.rule.slots:
            kept[name] = columns[name]


def _as_complex(columns: Columns, leaf: Tensor) -> Columns:
    """The columns of a complex leaf, with pairs of reals as complex numbers."""
    pairs = (*leaf.shape, 2)
    seen = dict(columns)
    for name, value in columns.items():
        # Others have a shape of their own, and codes of 8 bits are no pairs of numbers.
        if value.shape == pairs and value.is_floating_point():
            seen[name] = torch.view_as_complex(value)
    return seen


def run_on_pieces(call: Call, columns: Tree, scalars: Mapping[str, Any]) -> dict[str, Any]:
    """Call a rule. If it cannot work on columns that are DTensors, as torch has not every operator
    for them, it is called on all of each column, on every process.

    Where pieces differ in size, operators may fail on one process and not on another, which would
    then wait for ever; so DTensors are not tried there.
    """
    uneven = any(map(_is_uneven, optree.tree_leaves(columns)))
    if not uneven:
        try:
            return call.run(columns, scalars)
        except Exception:
            if not any(map(distributed, optree.tree_leaves(columns))):
                raise
    own = {}
    for name, value in scalars.items():
        if isinstance(value, LeafKey):
            # So random numbers are drawn for all elements, not for the local piece.
            own[name] = replace(value, leaf=None)
        else:
            own[name] = full(value)
    whole: Any = optree.tree_map(full, columns)
    return call.run(whole, own)


def _is_uneven(value: object) -> bool:
    """Whether this is a DTensor of which processes have pieces of other sizes."""
    if not distributed(value):
        return False
    sizes = list(value.shape)
    for dim, placement in enumerate(value.placements):
        axis = getattr(placement, "dim", None)  # also of a _StridedShard
        if axis is not None:
            count = value.device_mesh.size(dim)
            if sizes[axis] % count:
                return True
            sizes[axis] //= count
    return False


def _run_treewise(
    plan: Plan,
    call: Call,
    leaves: Leaves,
    columns: Mapping[int, Columns],
    kept: Mapping[int, Columns],
) -> None:
    if not columns:
        return
    by_name: dict[str, dict[int, Tensor]] = {}
    for _, name in call.reads:
        by_name[name] = {index: own[name] for index, own in columns.items()}
    results = run_on_tree(plan, call, leaves, by_name, leaves.scalars(next(iter(columns))))
    put_on_leaves(call, results, columns, kept)


def put_on_leaves(
    call: Call,
    results: Mapping[str, Sequence[Any]],
    columns: Mapping[int, Columns],
    kept: Mapping[int, Columns],
) -> None:
    """Put what a treewise rule writes among the columns of each leaf, its slots among the kept."""
    for name, values in results.items():
        for index in columns:
            columns[index][name] = values[index]
            if name in call.rule.slots:
                kept[index][name] = values[index]


def run_on_tree(
    plan: Plan,
    call: Call,
    leaves: Leaves,
    columns: Mapping[str, Mapping[int, Any]],
    scalars: Mapping[str, Any],
) -> dict[str, list[Any]]:
    """Call a treewise rule: column -> its value for every leaf (None where there was none)."""
    check_tree_scalars(plan, call, leaves)
    count = range(len(leaves.params))
    shards = leaves.shards if leaves.shards is not None and leaves.shards.any_cut else None
    trees: dict[str, Tree] = {}
    for name, own in columns.items():
        values = [own.get(index) for index in count]
        if shards is not None:
            # A rule on the tree may look at any element of it.
            values = list(map(shards.whole, count, values))
        trees[name] = unflatten(leaves.spec, values)
    if leaves.distributed:
        written = run_on_pieces(call, trees, scalars)
    else:
        written = call.run(trees, scalars)
    for _, name in call.numbers:
        leaves.set_number(name, full(written.pop(name)))
    results = {name: leaves.spec.flatten_up_to(tree) for name, tree in written.items()}
    if shards is not None:
        return {name: shards.column(values) for name, values in results.items()}
    return results


def _results(
    plan: Plan,
    leaves: Leaves,
    columns: Mapping[int, Columns],
    kept: Mapping[int, Columns],
) -> tuple[Tree, ...]:
    results: dict[str, list[Any]] = {"param": list(leaves.params)}
    if "update" in plan.results:
        results["update"] = [None] * len(leaves.params)
    slots = {name: list(values) for name, values in leaves.slots.items()}
    for index, own in columns.items():
        leaf = leaves.params[index]
        results["param"][index] = stored(own["param"], leaf)
        if "update" in results:
            update = own.get("update", own["grad"])
            results["update"][index] = as_gradient(update, leaf)
        for name, value in kept[index].items():
            value = stored(value, slots[name][index])
            # A rule may hand on what it was given; a slot in that memory would change with it.
            others = (leaf, leaves.grads[index], results["param"][index])
            slots[name][index] = owned(value, *others)
    return leaves.rebuild(results, slots)


def as_gradient(update: Tensor, leaf: Tensor) -> Tensor:
    """An update in the shape that a gradient of the leaf has, in the precision of the rules."""
    # Not rounded to the leaf's dtype, since the optimizer that gets it rounds the params once.
    value = torch.view_as_complex(update) if leaf.is_complex() else update
    return value.reshape(leaf.shape)
