"""The arguments of a call: checked, and taken apart into leaves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import eq
from typing import Any

import torch
from torch import Tensor

from functional_sgd.guard import Guard
from functional_sgd.hyper import collect, per_leaf
from functional_sgd.rule import COUNTER
from functional_sgd.state import State, check_state
from functional_sgd.tree import Spec, Tree, flatten, flatten_like, paths, unflatten
from functional_sgd.wiring import Call


@dataclass(frozen=True)
class Plan:
    """What an executor needs to know of a chain; made once, when the chain is built."""

    who: str  # named in errors
    calls: tuple[Call, ...]
    slots: tuple[str, ...]
    shaped: tuple[str, ...]  # the slots that have the shape of their parameter
    defaults: Mapping[str, Any]  # every hyper and extra that is read -> default or REQUIRED


@dataclass
class Leaves:
    """One call of an optimizer, taken apart: a list for each tree, with one entry for each leaf of
    params.
    """

    spec: Spec
    trees: dict[str, Tree]  # params, as "param", and the slots, as they came
    params: list[Tensor]
    grads: list[Tensor | None]
    slots: dict[str, list[Tensor]]
    step: Tensor  # the new count
    shared: dict[str, Any]  # scalars that are the same for all leaves
    separate: dict[str, list[Any]]  # scalars that differ by leaf
    familiar: bool = False  # whether the trees are just like those of an earlier call
    common: dict[torch.device, dict[str, Any]] = field(
        default_factory=dict
    )  # shared, and the step, by device

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

    def rebuild(
        self, params: list[Tensor], slots: Mapping[str, list[Tensor]]
    ) -> tuple[Tree, State]:
        """The trees that the optimizer returns; where they have the very leaves that came, as they
        came.
        """
        new, old = {"param": params, **slots}, {"param": self.params, **self.slots}
        trees = {
            name: self.trees[name] if values is old[name] else unflatten(self.spec, values)
            for name, values in new.items()
        }
        return trees.pop("param"), {COUNTER: self.step, **trees}


def take_apart(
    plan: Plan,
    params: Tree,
    grads: Tree,
    state: Any,
    hyper: Any,
    extras: Mapping[str, Any],
    guard: Guard | None = None,
) -> Leaves:
    """Check the arguments of a call and flatten them; nothing has been computed yet when an error
    is raised.

    Trees that the guard recognises are not checked again.
    """
    check_state(plan.who, state, plan.slots)
    trees = {"param": params, **{name: state[name] for name in plan.slots}}
    known = guard.flatten((*trees.values(), grads)) if guard is not None else None
    if guard is not None and known is not None:
        spec = guard.spec
        leaves, *columns, grad_leaves = known
        slots = dict(zip(plan.slots, columns, strict=True))
    else:
        leaves, spec = flatten(params)
        grad_leaves = flatten_like(spec, grads, params, plan.who, "grads")
        check_like(
            plan.who,
            "the gradient",
            params,
            leaves,
            grad_leaves,
            "Were the gradients taken of other params?",
        )
        slots = {
            name: flatten_like(spec, state[name], params, plan.who, f"state[{name!r}]")
            for name in plan.slots
        }
        seen = [torch.view_as_real(leaf) if leaf.is_complex() else leaf for leaf in leaves]
        for name in plan.shaped:
            check_like(
                plan.who,
                f"state[{name!r}]",
                params,
                seen,
                slots[name],
                "Was it made for other params?",
            )
    values = collect(plan.who, plan.defaults, hyper, extras)
    shared, separate = per_leaf(plan.who, values, {} if hyper is None else hyper, params, spec)
    return Leaves(
        spec,
        trees,
        leaves,
        grad_leaves,
        slots,
        state[COUNTER] + 1,
        shared,
        separate,
        known is not None,
    )


def _on(value: Any, device: Any) -> Any:
    """A scalar tensor where a leaf can use it: CPU scalars go anywhere, others must move."""
    if isinstance(value, Tensor) and value.device.type != "cpu" and value.device != device:
        return value.to(device)
    return value


def check_like(
    who: str, what: str, params: Tree, leaves: Sequence[Any], values: Sequence[Any], cure: str
) -> None:
    """Raise an error, with the first path, unless each value is None or a tensor of its leaf's
    shape and kind.
    """
    given = values
    types = set(map(type, values))
    if type(None) in types:
        given = [
            leaf if value is None else value for leaf, value in zip(leaves, values, strict=True)
        ]
    tensors = all(issubclass(kind, (Tensor, type(None))) for kind in types)
    if tensors and all(
        all(map(eq, map(of, given), map(of, leaves))) for of in (Tensor.size, Tensor.is_complex)
    ):
        return
    for path, leaf, value in zip(paths(params), leaves, given, strict=True):
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{who}: {what} of {path!r} must be a tensor, got {type(value).__name__}. {cure}"
            )
        if value.shape != leaf.shape:
            raise ValueError(
                f"{who}: {what} of {path!r} must have its shape {tuple(leaf.shape)}, got "
                f"{tuple(value.shape)}. {cure}"
            )
        if value.is_complex() != leaf.is_complex():
            raise TypeError(
                f"{who}: {what} of {path!r} is {value.dtype}, its leaf {leaf.dtype}. {cure}"
            )
