"""Run a chain leaf by leaf, with plain torch operators: the meaning that every faster executor must
reproduce.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from functional_sgd.call import Leaves, Plan, take_apart
from functional_sgd.state import State, gradient_for, owned, stored, working
from functional_sgd.tree import Tree, unflatten
from functional_sgd.wiring import Call


def leaf_by_leaf(
    plan: Plan, params: Tree, grads: Tree, state: Any, hyper: Any, extras: Mapping[str, Any]
) -> tuple[Tree, State]:
    """One step of the chain: (new params, new state). Leaves without a gradient come back as they
    are.
    """
    return run_leaves(plan, take_apart(plan, params, grads, state, hyper, extras))


def run_leaves(plan: Plan, leaves: Leaves) -> tuple[Tree, State]:
    """`leaf_by_leaf`, for a call that has been taken apart."""
    columns = {index: columns_of(leaves, index) for index in leaves.active}
    kept: dict[int, dict[str, Tensor]] = {index: {} for index in columns}
    scalars = {index: leaves.scalars(index) for index in columns}
    for last, calls in _segments(plan.calls):
        if calls[0].treewise:
            _run_treewise(plan, calls[0], leaves, columns, scalars, kept)
        else:
            for index in columns:
                for call in calls:
                    run_on_leaf(
                        call, leaves.params[index], columns[index], scalars[index], kept[index]
                    )
                if last:  # let go of temporaries before the next leaf makes its own
                    columns[index] = {"param": columns[index]["param"]}
    return _results(leaves, columns, kept)


def _segments(calls: Sequence[Call]) -> Iterator[tuple[bool, list[Call]]]:
    """Runs of calls that can be done one leaf after the other, with treewise calls alone between
    them.
    """
    left = len(calls)
    for treewise, group in groupby(calls, key=lambda call: call.treewise):
        members = list(group)
        for segment in [[call] for call in members] if treewise else [members]:
            left -= len(segment)
            yield left == 0, segment


def columns_of(leaves: Leaves, index: int) -> dict[str, Tensor]:
    """What one leaf has in every column before the first rule, as rules see it."""
    param, grad = leaves.params[index], leaves.grads[index]
    assert grad is not None
    own = {name: working(values[index]) for name, values in leaves.slots.items()}
    return {"param": working(param), "grad": gradient_for(param, grad), **own}


def run_on_leaf(
    call: Call,
    leaf: Tensor,
    columns: dict[str, Tensor],
    scalars: Mapping[str, Any],
    kept: dict[str, Tensor],
) -> None:
    """Call a rule on the columns of one leaf; put what it writes among them, and its slots among
    what is kept.

    A leafwise rule sees a complex leaf as it is, since it looks at shapes; elementwise rules see
    pairs of reals.
    """
    whole = leaf.is_complex() and call.rule.scope == "leafwise"
    seen: Mapping[str, Tensor] = columns
    if whole:
        pairs = (*leaf.shape, 2)
        seen = {
            name: torch.view_as_complex(v) if v.shape == pairs else v for name, v in columns.items()
        }
    for name, value in call.run(seen, scalars).items():
        columns[name] = torch.view_as_real(value) if whole and value.is_complex() else value
        if name in call.rule.slots:
            kept[name] = columns[name]


def _run_treewise(
    plan: Plan,
    call: Call,
    leaves: Leaves,
    columns: Mapping[int, dict[str, Tensor]],
    scalars: Mapping[int, Mapping[str, Any]],
    kept: Mapping[int, dict[str, Tensor]],
) -> None:
    if not columns:
        return
    common = next(iter(scalars.values()))
    names = {outer for _, outer in call.reads}
    results = run_on_tree(
        plan, call, leaves, {n: {i: columns[i][n] for i in columns} for n in names}, common
    )
    put_on_leaves(call, results, columns, kept)


def put_on_leaves(
    call: Call,
    results: Mapping[str, Sequence[Any]],
    columns: Mapping[int, dict[str, Tensor]],
    kept: Mapping[int, dict[str, Tensor]],
) -> None:
    """Put what a treewise rule writes among the columns of each leaf, and its slots among what is
    kept.
    """
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
    for _, name in call.scalars:
        if name in leaves.separate:
            raise ValueError(
                f"{plan.who}: rule {call.rule.name} sees whole trees, so {name!r} must be one "
                f"number."
            )
    count = range(len(leaves.params))
    trees = {
        name: unflatten(leaves.spec, [own.get(index) for index in count])
        for name, own in columns.items()
    }
    return {
        name: leaves.spec.flatten_up_to(tree) for name, tree in call.run(trees, scalars).items()
    }


def _results(
    leaves: Leaves,
    columns: Mapping[int, Mapping[str, Tensor]],
    kept: Mapping[int, Mapping[str, Tensor]],
) -> tuple[Tree, State]:
    params, slots = (
        list(leaves.params),
        {name: list(values) for name, values in leaves.slots.items()},
    )
    for index in columns:
        params[index] = stored(columns[index]["param"], params[index])
        for name, value in kept[index].items():
            kept_value = stored(value, slots[name][index])
            slots[name][index] = owned(
                kept_value, leaves.params[index], leaves.grads[index], params[index]
            )
    return leaves.rebuild(params, slots)
