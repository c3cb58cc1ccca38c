"""Run a chain leaf by leaf, with plain torch operators: the meaning that every faster executor must reproduce."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from functional_sgd.hyper import collect, per_leaf
from functional_sgd.rule import COUNTER
from functional_sgd.state import State, check_state, gradient_for, stored, working
from functional_sgd.tree import Spec, Tree, flatten, flatten_like, paths, unflatten
from functional_sgd.wiring import Call


@dataclass(frozen=True)
class Plan:
    """What an executor needs to know of a chain; made once, when the chain is built."""

    who: str  # named in errors
    calls: tuple[Call, ...]
    slots: tuple[str, ...]
    defaults: Mapping[str, Any]  # every hyper and extra that is read -> default or REQUIRED


@dataclass
class Leaves:
    """One call of an optimizer, taken apart: a list for each tree, with one entry for each leaf of params."""

    spec: Spec
    params: list[Tensor]
    grads: list[Tensor | None]
    slots: dict[str, list[Tensor]]
    step: Tensor  # the new count
    shared: dict[str, Any]  # scalars that are the same for all leaves
    separate: dict[str, list[Any]]  # scalars that differ by leaf
    common: dict[torch.device, dict[str, Any]] = field(default_factory=dict)  # shared, and the step, by device

    @property
    def active(self) -> list[int]:
        """The leaves that have a gradient."""
        return [index for index, grad in enumerate(self.grads) if grad is not None]

    def scalars(self, index: int) -> dict[str, Any]:
        """The scalars that one leaf sees."""
        device = self.params[index].device
        own = {name: _on(values[index], device) for name, values in self.separate.items()}
        return {**self._common(device), **own}

    def _common(self, device: torch.device) -> dict[str, Any]:
        """The scalars that all leaves on a device see."""
        if device not in self.common:
            every = {**self.shared, COUNTER: self.step.double()}
            self.common[device] = {name: _on(value, device) for name, value in every.items()}
        return self.common[device]

    def rebuild(self, params: list[Tensor], slots: Mapping[str, list[Tensor]]) -> tuple[Tree, State]:
        """The trees that the optimizer returns."""
        trees = {name: unflatten(self.spec, values) for name, values in slots.items()}
        return unflatten(self.spec, params), {COUNTER: self.step, **trees}


def take_apart(plan: Plan, params: Tree, grads: Tree, state: Any, hyper: Any, extras: Mapping[str, Any]) -> Leaves:
    """Check the arguments of a call and flatten them; nothing has been computed yet when an error is raised."""
    check_state(plan.who, state, plan.slots)
    leaves, spec = flatten(params)
    grad_leaves = flatten_like(spec, grads, params, plan.who, "grads")
    slots = {name: flatten_like(spec, state[name], params, plan.who, f"state[{name!r}]") for name in plan.slots}
    given = [leaf if grad is None else grad for leaf, grad in zip(leaves, grad_leaves, strict=True)]
    if list(map(Tensor.size, leaves)) != list(map(Tensor.size, given)):
        raise ValueError(_wrong_shape(plan.who, params, leaves, grad_leaves))
    values = collect(plan.who, plan.defaults, hyper, extras)
    shared, separate = per_leaf(plan.who, values, extras.keys(), params, spec)
    return Leaves(spec, leaves, grad_leaves, slots, state[COUNTER] + 1, shared, separate)


def leaf_by_leaf(
    plan: Plan, params: Tree, grads: Tree, state: Any, hyper: Any, extras: Mapping[str, Any]
) -> tuple[Tree, State]:
    """One step of the chain: (new params, new state). Leaves without a gradient come back as they are."""
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
                    run_on_leaf(call, columns[index], scalars[index], kept[index])
                if last:  # let go of temporaries before the next leaf makes its own
                    columns[index] = {"param": columns[index]["param"]}
    return _results(leaves, columns, kept)


def _segments(calls: Sequence[Call]) -> Iterator[tuple[bool, list[Call]]]:
    """Runs of calls that can be done one leaf after the other, with treewise calls alone between them."""
    left = len(calls)
    for treewise, group in groupby(calls, key=lambda call: call.treewise):
        members = list(group)
        for segment in [[call] for call in members] if treewise else [members]:
            left -= len(segment)
            yield left == 0, segment


def columns_of(leaves: Leaves, index: int) -> dict[str, Tensor]:
    param, grad = leaves.params[index], leaves.grads[index]
    assert grad is not None
    own = {name: working(values[index]) for name, values in leaves.slots.items()}
    return {"param": working(param), "grad": gradient_for(param, grad), **own}


def run_on_leaf(call: Call, columns: dict[str, Tensor], scalars: Mapping[str, Any], kept: dict[str, Tensor]) -> None:
    reads = {inner: columns[outer] for inner, outer in call.reads}
    result = call.rule.function(**reads, **{inner: scalars[outer] for inner, outer in call.scalars})
    for inner, outer in call.writes:
        columns[outer] = result[inner]
        if inner in call.rule.initializers:
            kept[outer] = result[inner]


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
    results = run_on_tree(plan, call, leaves, {n: {i: columns[i][n] for i in columns} for n in names}, common)
    for inner, outer in call.writes:
        for index in columns:
            columns[index][outer] = results[outer][index]
            if inner in call.rule.initializers:
                kept[index][outer] = results[outer][index]


def run_on_tree(
    plan: Plan, call: Call, leaves: Leaves, columns: Mapping[str, Mapping[int, Any]], scalars: Mapping[str, Any]
) -> dict[str, list[Any]]:
    """Call a treewise rule: column -> its value for every leaf (None where there was none)."""
    for _, name in call.scalars:
        if name in leaves.separate:
            raise ValueError(f"{plan.who}: rule {call.rule.name} sees whole trees, so {name!r} must be one number.")
    count = range(len(leaves.params))
    reads = {
        inner: unflatten(leaves.spec, [columns[outer].get(index) for index in count]) for inner, outer in call.reads
    }
    result = call.rule.function(**reads, **{inner: scalars[outer] for inner, outer in call.scalars})
    return {outer: leaves.spec.flatten_up_to(result[inner]) for inner, outer in call.writes}


def _results(
    leaves: Leaves, columns: Mapping[int, Mapping[str, Tensor]], kept: Mapping[int, Mapping[str, Tensor]]
) -> tuple[Tree, State]:
    params, slots = list(leaves.params), {name: list(values) for name, values in leaves.slots.items()}
    for index in columns:
        params[index] = stored(columns[index]["param"], params[index])
        for name, value in kept[index].items():
            slots[name][index] = stored(value, slots[name][index])
    return leaves.rebuild(params, slots)


def _on(value: Any, device: Any) -> Any:
    """A scalar tensor where a leaf can use it: CPU scalars go anywhere, others must move."""
    if isinstance(value, Tensor) and value.device.type != "cpu" and value.device != device:
        return value.to(device)
    return value


def _wrong_shape(who: str, params: Tree, leaves: list[Tensor], grads: list[Tensor | None]) -> str:
    for path, leaf, grad in zip(paths(params), leaves, grads, strict=True):
        if grad is not None and leaf.shape != grad.shape:
            return (
                f"{who}: the gradient of {path!r} must have its shape {tuple(leaf.shape)}, got {tuple(grad.shape)}. "
                f"Were the gradients taken of other params?"
            )
    raise AssertionError("shapes agree")
