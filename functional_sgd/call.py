"""The arguments of a call: checked, and taken apart into leaves."""

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import eq
from typing import Any

import optree
import torch
from torch import Tensor

from functional_sgd.errors import did_you_mean, meant
from functional_sgd.guard import Guard
from functional_sgd.hyper import Hyper, Scalar, collect, per_leaf
from functional_sgd.memory import Addresses
from functional_sgd.pairs import as_real
from functional_sgd.precision import widest
from functional_sgd.randomness import LeafKey, key_of
from functional_sgd.ranges import Range
from functional_sgd.sharded import (
    Shards,
    all_placed,
    any_distributed,
    check_placed,
    placed,
)
from functional_sgd.signature import FROM_CALLER, STEP
from functional_sgd.state import State, check_state, check_steps, first_shape, in_order_of
from functional_sgd.tracing import recorded
from functional_sgd.tree import Spec, Tree, flatten, flatten_like, paths, unflatten
from functional_sgd.wiring import CALLS, SEED, Call


@dataclass(frozen=True)
class Plan:
    """What an executor needs to know of a chain; made once, when the chain is built."""

    who: str  # named in errors
    calls: tuple[Call, ...]
    slots: tuple[str, ...]  # of each leaf
    shaped: tuple[str, ...]  # the slots that have the shape of their parameter
    numbers: tuple[str, ...]  # of the tree
    given: tuple[str, ...]  # columns that the caller gives
    defaults: Mapping[str, Any]  # every hyper and extra that is read -> default or REQUIRED
    ranges: Mapping[str, tuple[Range, ...]]  # of hypers
    results: tuple[str, ...]  # the columns that are results, besides the slots

    @functools.cached_property
    def blocks(self) -> dict[str, str]:
        """The slots that are codes of 8 bits -> those with the scales of their blocks."""
        blocks: dict[str, str] = {}
        for call in self.calls:
            blocks.update(call.rule.blocks)
        return blocks

    @property
    def entries(self) -> tuple[str, ...]:
        """The entries of the state."""
        return (STEP, *self.slots, *self.numbers)


@dataclass
class Leaves:
    """One call of an optimizer, taken apart: a list for each tree, with one entry for each leaf."""

    spec: Spec
    trees: dict[str, Tree]  # params, as "param", and the slots, as they came
    params: list[Tensor]
    grads: list[Tensor | None]
    slots: dict[str, list[Tensor]]
    given: dict[str, list[Tensor | None]]  # columns from the caller
    step: Tensor  # the new counts, of each leaf
    numbers: dict[str, Tensor]  # of the tree, from the state; `calls` counts this call
    shared: dict[str, Any]  # scalars that are the same for all leaves
    separate: dict[str, list[Any]]  # scalars that differ by leaf
    matches_guard: bool = False  # whether the trees are just like those of an earlier call
    common: dict[torch.device, dict[str, Any]] = field(default_factory=dict)  # shared, by device
    steps: Sequence[Tensor] | None = None  # the counts in floating point, once they are needed
    starts: Mapping[str, Addresses] = field(default_factory=dict)  # of columns, where known
    distributed: bool = False  # whether some leaves are DTensors
    shards: Shards | None = None  # if so, what they are, while pieces of them are worked on

    @property
    def active(self) -> list[int]:
        """The leaves that have a gradient."""
        return [index for index, grad in enumerate(self.grads) if grad is not None]

    def scalars(self, index: int) -> dict[str, Any]:
        """The hypers, numbers of the tree and step that one leaf sees."""
        device = self.params[index].device
        if self.steps is None:
            # Counts must be exact beyond 2**24, where float32 ends.
            self.steps = self.step.to(widest(self.step.device)).unbind()
        scalars = dict(self.tree_scalars(device))
        scalars[STEP] = here(self.steps[index], device)
        for name, values in self.separate.items():
            scalars[name] = here(values[index], device)
        return scalars

    def tree_scalars(self, device: torch.device) -> Mapping[str, Any]:
        """The scalars that all leaves on a device see."""
        if device not in self.common:
            every = {**self.shared, **self.numbers}
            if CALLS in every:
                every[CALLS] = every[CALLS].to(widest(every[CALLS].device))
            self.common[device] = {name: here(value, device) for name, value in every.items()}
        return self.common[device]

    def key(self, call: Call, index: int) -> LeafKey:
        """What a rule draws its random numbers for a leaf from."""
        key = key_of(self.numbers[SEED], self.step[index], index, call.position)
        return key if self.shards is None else replace(key, leaf=self.shards.leaves[index])

    @property
    def tensors(self) -> Iterator[object]:
        """All that a step is computed from."""
        columns: list[Iterable[object]] = [self.params, self.grads, *self.slots.values()]
        columns += [*self.given.values(), *self.separate.values()]
        return itertools.chain(*columns, self.shared.values(), self.numbers.values())

    def on_pieces(self) -> "Leaves":
        """The same call, on this process's pieces of leaves that are DTensors."""
        if not self.distributed:
            return self
        shards = Shards(self.params, self.slots)
        slots = {name: shards.pieces[name] for name in self.slots}
        given = {name: shards.column(values) for name, values in self.given.items()}
        return replace(
            self, params=shards.pieces["param"], grads=shards.column(self.grads), slots=slots,
            given=given, shards=shards,
        )  # fmt: skip

    def set_number(self, name: str, value: Scalar) -> None:
        """A rule has written a number of the tree; later rules see the new one."""
        old = self.numbers[name]
        self.numbers[name] = torch.as_tensor(value, dtype=old.dtype, device=old.device)
        self.common.clear()

    def rebuild(
        self, results: Mapping[str, list[Any]], slots: Mapping[str, list[Tensor]]
    ) -> tuple[Tree, ...]:
        """What the optimizer returns: a tree for each result, then the state.

        Trees that have the very leaves that came are handed back as they came.
        """
        old = {"param": self.params, **self.slots}
        trees = {}
        for name, values in (*results.items(), *slots.items()):
            # Executors that overwrite trees pass on the lists that they got: nothing is to be
            # rebuilt.
            if values is old.get(name):
                trees[name] = self.trees[name]
                continue
            if self.shards is not None:
                values = self.shards.wrapped(name, values)
            trees[name] = unflatten(self.spec, values)
        state: State = {STEP: self.step}
        for name in slots:
            state[name] = trees[name]
        state.update(self.numbers)
        return (*[trees[name] for name in results], state)


def take_apart(
    plan: Plan,
    params: Tree,
    grads: Tree,
    state: State,
    hyper: Mapping[str, Hyper] | None,
    extras: Mapping[str, Any],
    guard: Guard | None = None,
) -> Leaves:
    """Check the arguments of a call and flatten them.

    Nothing has been computed yet when an error is raised. Trees that the guard recognises are not
    checked again.
    """
    check_state(plan.who, state, plan.entries)
    trees = {"param": params}
    for name in plan.slots:
        trees[name] = state[name]
    known = guard.flatten((*trees.values(), grads)) if guard is not None else None
    starts: Mapping[str, Addresses] = {}
    if guard is not None and known is not None:
        spec = guard.spec
        leaves, *columns, grad_leaves = known.columns
        slots = dict(zip(plan.slots, columns, strict=True))
        starts = dict(zip((*trees, "grad"), known.addresses, strict=True))
        # A guard only recognises trees without None.
        active = [True] * len(leaves)
    else:
        leaves, spec = flatten(params)
        grad_leaves = flatten_like(spec, grads, params, plan.who, "grads")
        cure = "Were the gradients taken of other params?"
        check_like(plan.who, "the gradient", params, leaves, grad_leaves, cure)
        # After the check, so that an error speaks of what the caller has given.
        grad_leaves = list(map(_dense, grad_leaves, leaves))
        active = [grad is not None for grad in grad_leaves]
        slots = {}
        for name in plan.slots:
            what = f"state[{name!r}]"
            slots[name] = flatten_like(spec, state[name], params, plan.who, what)
        # Slots of complex leaves are kept as pairs of reals.
        seen = list(map(as_real, leaves))
        cure = "Was it made for other params?"
        for name in plan.shaped:
            check_like(plan.who, f"state[{name!r}]", params, seen, slots[name], cure)
        if len(plan.shaped) < len(plan.slots) and not recorded():
            _check_shapes(plan, params, leaves, slots)
    check_steps(plan.who, state[STEP], len(leaves))
    steps = state[STEP]
    # Counts go by places, which a dict and an OrderedDict of the same leaves give otherwise.
    if known is None and plan.slots and optree.tree_structure(state[plan.slots[0]]) != spec:
        steps = in_order_of(spec, steps, state[plan.slots[0]])
    given, extras = _take_given(plan, params, spec, leaves, grad_leaves, extras)
    values = collect(plan.who, plan.defaults, hyper, extras, plan.ranges)
    hypers = {} if hyper is None else hyper
    shared, separate = per_leaf(plan.who, values, hypers, params, spec, plan.ranges)
    numbers = {name: state[name] for name in plan.numbers}
    # No guard is made of DTensors, so trees that one recognises have none.
    several = known is None and any_distributed((*leaves, *grad_leaves))
    if several:
        grad_leaves = _placed(plan.who, "its gradient", params, leaves, grad_leaves)
        for name, column in given.items():
            given[name] = _placed(plan.who, name, params, leaves, column)
    # A call without any gradient is no step: nothing has been learned, so nothing is counted.
    if CALLS in numbers and any(active):
        numbers[CALLS] = numbers[CALLS] + 1
    step = _advanced(steps, active)
    return Leaves(
        spec, trees, leaves, grad_leaves, slots, given, step, numbers, shared, separate,
        known is not None, starts=starts, distributed=several,
    )  # fmt: skip


def _check_shapes(
    plan: Plan, params: Tree, leaves: Sequence[Tensor], slots: Mapping[str, Sequence[object]]
) -> None:
    """Raise ValueError for a slot that has not the shape in which it begins.

    Only of slots that have shapes of their own: those of factored means, say.
    """
    for call in plan.calls:
        for name, initializer in call.rule.initializers.items():
            if name in plan.shaped:
                continue
            for index, (leaf, value) in enumerate(zip(leaves, slots[name], strict=True)):
                wanted = first_shape(initializer, leaf)
                found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                if value is not None and wanted is not None and found != wanted:
                    raise ValueError(
                        f"{plan.who}: state[{name!r}] of {paths(params)[index]!r} must have the "
                        f"shape {tuple(wanted)}, got {found}. Was it made for other params? "
                        f"opt.init(params) makes one."
                    )


def _dense(grad: Tensor | None, leaf: Tensor) -> Tensor | None:
    """A gradient that is sparse (of an embedding, say) as the dense one that it stands for."""
    if grad is None or grad.layout is torch.strided or leaf.layout is not torch.strided:
        return grad
    return grad.to_dense()


def _placed(
    who: str, what: str, params: Tree, leaves: Sequence[Tensor], values: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The values of a column where their leaves are. Raises what `check_placed` raises."""
    if all_placed(leaves, values):
        return list(values)
    check_placed(who, what, lambda: paths(params), leaves, values)
    found = list(values)
    for index, (value, leaf) in enumerate(zip(values, leaves, strict=True)):
        if value is not None:
            found[index] = placed(value, leaf)
    return found


def _advanced(step: Tensor, active: list[bool]) -> Tensor:
    """One more for each leaf that is updated."""
    # The usual case: no tensor of flags has to be made and moved to the device.
    if all(active):
        return step + 1
    return step + torch.tensor(active, dtype=torch.int64, device=step.device)


def _take_given(
    plan: Plan,
    params: Tree,
    spec: Spec,
    leaves: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    extras: Mapping[str, Any],
) -> tuple[dict[str, list[Tensor | None]], Mapping[str, Any]]:
    """(the columns that the caller gives, the other extras)."""
    if not plan.given:
        return {}, extras
    given: dict[str, list[Tensor | None]] = {}
    for name in plan.given:
        if name not in extras:
            known = did_you_mean(name, extras) if extras else "It was not given."
            hint = meant(name, FROM_CALLER)
            raise ValueError(
                f"{plan.who}: a rule reads the column {name!r}, which the caller gives: "
                f"opt(params, grads, state, {name}=tree), a tree like params. {known} {hint}If it "
                f"is meant to be a hyper, put it behind a * in the rule's signature; if state, "
                f"declare it: @elementwise({name}=torch.zeros_like)."
            )
        values = flatten_like(spec, extras[name], params, plan.who, name)
        check_like(plan.who, name, params, leaves, values, "Was it made for other params?")
        for index, grad in enumerate(grads):
            if grad is not None and values[index] is None:
                raise ValueError(
                    f"{plan.who}: {name} of {paths(params)[index]!r} is None, but the leaf has a "
                    f"gradient. Give a tensor of its shape."
                )
        given[name] = values
    return given, {name: value for name, value in extras.items() if name not in given}


def here(value: Any, device: torch.device) -> Any:
    """A scalar tensor where a leaf can use it: CPU scalars go anywhere, others must move."""
    if isinstance(value, Tensor) and value.device.type != "cpu" and value.device != device:
        return value.to(device)
    return value


def check_like(
    who: str, what: str, params: Tree, leaves: Sequence[Any], values: Sequence[Any], cure: str
) -> None:
    """Raise an error, with the first path, unless each value is None or fits its leaf."""
    # all_placed compares shapes as well, and caches its answer. The first leaf is asked before,
    # since trees without DTensors come here at every step.
    if any_distributed(leaves[:1]) and all_placed(leaves, values):
        return
    # A missing value always fits, so its leaf stands in for it below.
    given = values
    types = set(map(type, values))
    if type(None) in types:
        given = list(values)
        for index, (leaf, value) in enumerate(zip(leaves, values, strict=True)):
            if value is None:
                given[index] = leaf
    # map keeps these loops in C, since every step pays for them. The slow loop below only finds the
    # path to name in the error.
    if all(issubclass(kind, (Tensor, type(None))) for kind in types):
        sizes = all(map(eq, map(Tensor.size, given), map(Tensor.size, leaves)))
        if sizes and all(map(eq, map(Tensor.is_complex, given), map(Tensor.is_complex, leaves))):
            return
    for path, leaf, value in zip(paths(params), leaves, given, strict=True):
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ValueError(f"{who}: {what} of {path!r} must be a tensor, got {kind}. {cure}")
        if value.shape != leaf.shape:
            raise ValueError(
                f"{who}: {what} of {path!r} must have its shape {tuple(leaf.shape)}, "
                f"got {tuple(value.shape)}. {cure}"
            )
        if value.is_complex() != leaf.is_complex():
            raise TypeError(
                f"{who}: {what} of {path!r} is {value.dtype}, its leaf {leaf.dtype}. {cure}"
            )
