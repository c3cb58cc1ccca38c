"""Different optimizers for different leaves, or none."""

import contextlib
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeAlias, TypeVar

from torch import Tensor

from functional_sgd.hyper import Hyper, broadcast, is_tree, wider_names
from functional_sgd.optimizer import Optimizer, check_names, check_optimizer
from functional_sgd.state import State, check_state, new_calls, seeded
from functional_sgd.tree import Spec, Tree, flatten, flatten_like, paths, unflatten
from functional_sgd.wiring import CALLS
from functional_sgd.wrappers.labels import Labels, as_patterns, labels_of

PARTS = "parts"
"""The entry of the state with the states of the parts, by label."""

Chosen: TypeAlias = str | Sequence[str] | Callable[[str, Tensor], bool]
"""Leaves: a path pattern, several, or a function (path, leaf) -> bool."""

T = TypeVar("T")


@dataclass(frozen=True, repr=False)
class Partition(Optimizer):
    """One optimizer for each label; `partition` and `freeze` make one.

    Its state is {"calls": how many, "parts": {label: state}}, with a part for each label that
    some leaf has; a part sees its leaves as a dict {path: leaf}.
    """

    optimizers: Mapping[str, Optimizer] = field(hash=False)
    labels: Labels = field(hash=False)
    # The labels; a tree of them as the paths of its leaves.
    patterns: Labels = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.optimizers, Mapping):
            raise TypeError(
                f"partition: expected a dict label -> optimizer, got {self.optimizers!r}."
            )
        for label, opt in self.optimizers.items():
            if not isinstance(label, str):
                raise TypeError(f"partition: labels must be strings, got {label!r}.")
            if opt is None:
                raise TypeError(
                    f"partition: {label!r} has no optimizer. Leaves that are not to move have the "
                    f"label None: drop {label!r}, and put None where labels say {label!r}."
                )
            check_optimizer(f"partition: {label!r}", opt)
        object.__setattr__(self, "patterns", as_patterns(self.labels))

    @property
    def hyper(self) -> dict[str, Hyper]:
        """The hypers and their defaults: `lr` if all parts that have it agree, else `label.lr` for
        each of them.

        A part that reads it without a default, as one whose lr is scheduled, does not agree: it
        would get the others'. Nor does a partition within this one whose own parts differ: its
        hypers are `label.part.lr`.
        """
        merged: dict[str, Hyper] = {}
        for label, opt in self.optimizers.items():
            for name, default in opt.hyper.items():
                of_all = "." not in name
                for other in self.optimizers.values():
                    of_all = of_all and _agrees(other, name, default)
                merged[name if of_all else f"{label}.{name}"] = default
        return merged

    @property
    def required(self) -> tuple[str, ...]:
        """The hypers and extras without a default: `lr` if no part that has it has one, else
        `label.lr`.
        """
        with_default: set[str] = set()
        for opt in self.optimizers.values():
            for name in opt.hyper:
                with_default |= {name, *wider_names(name)}
        found: dict[str, None] = {}  # a set that keeps its order
        for label, opt in self.optimizers.items():
            for name in opt.required:
                of_one = "." in name or name in with_default
                found[f"{label}.{name}" if of_one else name] = None
        return tuple(found)

    @property
    def names(self) -> frozenset[str]:
        """Every hyper and extra that is understood: `lr` for all parts that have one, `label.lr`
        for one part.
        """
        found: set[str] = set()
        for label, opt in self.optimizers.items():
            for name in opt.names:
                found |= {name, f"{label}.{name}"}
        return frozenset(found)

    @property
    def donates(self) -> bool:
        """Whether the trees that are passed in are overwritten."""
        return any(opt.donates for opt in self.optimizers.values())

    @property
    def inner(self) -> tuple[Optimizer, ...]:
        """The optimizers of the parts."""
        return tuple(self.optimizers.values())

    def with_inner(self, inner: tuple[Optimizer, ...]) -> Self:
        """The same partition with other optimizers for its labels, in order."""
        return replace(self, optimizers=dict(zip(self.optimizers, inner, strict=True)))

    def init(self, params: Tree) -> State:
        """A fresh state. Raises ValueError for a leaf without a label, or with an unknown one."""
        split = self._split(params)
        states = {}
        for label in split.owned:
            fresh = self.optimizers[label].init(split.part(label, split.leaves))
            # Parts number their leaves from 0, so each draws its random numbers from its own seed.
            states[label] = seeded(fresh, label)
        return {CALLS: new_calls(split.leaves), PARTS: states}

    def __call__(
        self,
        params: Tree,
        grads: Tree,
        state: State,
        hyper: Mapping[str, Hyper] | None = None,
        **extras: Any,
    ) -> tuple[Tree, State]:
        """One step of every part: (new params, new state)."""
        check_state("partition", state, (CALLS, PARTS))
        hyper = check_names("partition", hyper, extras, self.names)
        split = self._split(params)
        if state[PARTS].keys() != split.owned.keys():
            raise ValueError(
                f"partition: expected state['parts'] for the labels "
                f"{', '.join(map(repr, split.owned))}, got those for "
                f"{', '.join(map(repr, state[PARTS]))}. Was it made with other labels? "
                f"opt.init(params) makes one."
            )
        given = flatten_like(split.spec, grads, params, "partition", "grads")
        moved, states = list(split.leaves), {}
        for label in split.owned:
            opt = self.optimizers[label]
            own_hyper = split.scalars(label, opt.names, hyper, split.cut)
            own_extras = split.scalars(label, opt.names, extras, split.cut_if_tree)
            own, own_grads = split.part(label, split.leaves), split.part(label, given)
            new, states[label] = opt(own, own_grads, state[PARTS][label], own_hyper, **own_extras)
            split.put(label, moved, new)
        return unflatten(split.spec, moved), {CALLS: state[CALLS] + 1, PARTS: states}

    def extend(self, state: State, before: Tree, params: Tree) -> State:
        """The state for more params."""
        old, new = self._split(before), self._split(params)
        states = {}
        for label in new.owned:
            opt, own = self.optimizers[label], new.part(label, new.leaves)
            if label in old.owned:
                known = old.part(label, old.leaves)
                states[label] = opt.extend(state[PARTS][label], known, own)
            else:
                states[label] = seeded(opt.init(own), label)  # as in init
        return {CALLS: state[CALLS], PARTS: states}

    def perturb(
        self, params: Tree, grads: Tree, state: State, hyper: Mapping[str, Hyper] | None = None
    ) -> Tree:
        """Where each part wants the gradient of its leaves."""
        hyper = check_names("partition", hyper, {}, self.names)
        split = self._split(params)
        given = flatten_like(split.spec, grads, params, "partition", "grads")
        moved = list(split.leaves)
        for label in split.owned:
            opt = self.optimizers[label]
            own_hyper = split.scalars(label, opt.names, hyper, split.cut)
            own, own_grads = split.part(label, split.leaves), split.part(label, given)
            split.put(label, moved, opt.perturb(own, own_grads, state[PARTS][label], own_hyper))
        return unflatten(split.spec, moved)

    def evaluated(self, params: Tree, state: State) -> Tree:
        """What each part wants to be evaluated."""
        split = self._split(params)
        chosen = list(split.leaves)
        for label in split.owned:
            own = split.part(label, split.leaves)
            split.put(label, chosen, self.optimizers[label].evaluated(own, state[PARTS][label]))
        return unflatten(split.spec, chosen)

    def explain(self, params: Tree = None) -> None:
        """Print what each part runs; with params, on its leaves.

        >>> from functional_sgd import fuse, momentum, sgd
        >>> parts = {"slow": momentum(lr=0.1), "fast": sgd(lr=1.0)}
        >>> fuse(partition(parts, {"head*": "fast", "*": "slow"})).explain()
        slow
        kernel  average_grad, sgd_step  reads param, grad, grad_avg; writes grad_avg, param
        <BLANKLINE>
        fast
        kernel  sgd_step  reads param, grad; writes param
        """
        parts: dict[str, Tree] = dict.fromkeys(self.optimizers)
        if params is not None:
            split = self._split(params)
            parts = {label: split.part(label, split.leaves) for label in split.owned}
        for number, (label, own) in enumerate(parts.items()):
            if number:
                print()
            print(label)
            self.optimizers[label].explain(own)

    def owned(self, params: Tree) -> dict[str, list[str]]:
        """The paths of the leaves of each label that some leaf has."""
        split = self._split(params)
        found: dict[str, list[str]] = {}
        for label, places in split.owned.items():
            found[label] = [split.names[place] for place in places]
        return found

    def _split(self, params: Tree) -> "_Split":
        leaves, spec = flatten(params)
        names = paths(params)
        labels = labels_of("partition", self.patterns, params, names)
        owned: dict[str, list[int]] = {}
        for index, label in enumerate(labels):
            if label is None:
                continue
            if label not in self.optimizers:
                raise ValueError(
                    f"partition: leaf {names[index]!r} has the label {label!r}, but there are "
                    f"optimizers for "
                    f"{', '.join(map(repr, self.optimizers))} only. The label None leaves it as it "
                    f"is."
                )
            owned.setdefault(label, []).append(index)
        # Parts are dicts by path, in which one of two leaves would be lost.
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(
                f"partition: two leaves have the path {twice!r}. Use keys without dots."
            )
        return _Split(params, spec, leaves, names, owned, self.optimizers)

    def __repr__(self) -> str:
        parts = ", ".join(f"{label!r}: {opt!r}" for label, opt in self.optimizers.items())
        return f"partition({{{parts}}}, {self.labels!r})"


def partition(optimizers: Mapping[str, Optimizer], labels: Labels) -> Partition:
    """An optimizer that hands every leaf to the optimizer of its label; a leaf with the label None
    does not move.

    `labels` is one of: a mapping of path patterns to labels, of which the first that matches the
    leaf, or a branch that it is on, wins; a function (path, leaf) -> label, which may look at the
    leaf's shape and dtype but not at its numbers; or a tree prefix of params with labels at its
    leaves.

    A hyper is passed to all parts that have it by its name, to one of them as "label.name": `{"lr":
    0.1, "head.lr": 0.5}`. A value may be a tree prefix of the whole params. Rules that see whole
    trees, such as clip_norm, see those of their part.

    Raises ValueError, in `init`, if a leaf has no label, a label no optimizer, or a pattern no
    leaf.

    >>> import torch
    >>> from functional_sgd import momentum, sgd
    >>> parts = {"slow": momentum(lr=0.1), "fast": sgd(lr=1.0)}
    >>> opt = partition(parts, {"head*": "fast", "*": "slow"})
    >>> opt.hyper
    {'mom': 0.9, 'slow.lr': 0.1, 'fast.lr': 1.0}
    >>> params = {"body": torch.ones(1), "head": torch.ones(1)}
    >>> opt(params, params, opt.init(params), {"fast.lr": 0.5})[0]
    {'body': tensor([0.9900]), 'head': tensor([0.5000])}
    """
    return Partition(optimizers, labels)


def freeze(opt: Optimizer, chosen: Chosen) -> Partition:
    """The optimizer for all leaves but the chosen ones, which do not move and have no slots.

    `chosen` is a path pattern ("body", "*.bias"), a list of patterns, or a function (path, leaf) ->
    bool. Frozen leaves come back as the same tensors. Raises ValueError, in `init`, if a pattern
    matches no leaf.

    >>> import torch
    >>> from functional_sgd import sgd
    >>> opt, params = freeze(sgd(lr=0.5), "body"), {"body": torch.ones(1), "head": torch.ones(1)}
    >>> opt(params, params, opt.init(params))[0]
    {'body': tensor([1.]), 'head': tensor([0.5000])}
    """
    if callable(chosen):
        return Partition({"trained": opt}, _Unless(chosen, "trained"))
    patterns = (chosen,) if isinstance(chosen, str) else chosen
    labels: dict[str, str | None] = dict.fromkeys(patterns)
    labels.setdefault("*", "trained")
    return Partition({"trained": opt}, labels)


# A class, as a function made in `freeze` could not be pickled.
@dataclass(frozen=True)
class _Unless:
    """A label for every leaf, but None for those of which `chosen` is true."""

    chosen: Callable[[str, Tensor], bool]
    label: str

    def __call__(self, path: str, leaf: Tensor) -> str | None:
        return None if self.chosen(path, leaf) else self.label


@dataclass(frozen=True)
class _Split:
    """Params taken apart, and which leaves each part owns."""

    params: Tree
    spec: Spec
    leaves: list[Tensor]
    names: list[str]
    owned: dict[str, list[int]]
    labels: Container[str]  # of all parts, also those that own nothing

    def part(self, label: str, values: Sequence[T]) -> dict[str, T]:
        """{path: value} of the leaves of one part."""
        return {self.names[index]: values[index] for index in self.owned[label]}

    def put(self, label: str, values: list[T], part: Mapping[str, T]) -> None:
        """Put what one part made of its leaves among the values of all leaves."""
        for index in self.owned[label]:
            values[index] = part[self.names[index]]

    def scalars(
        self,
        label: str,
        names: frozenset[str],
        values: Mapping[str, Any],
        cut: Callable[[str, str, Any], Any],
    ) -> dict[str, Any]:
        """Those of the hypers or extras that one part reads; trees are cut to its leaves."""
        found: dict[str, Any] = {}
        for name in names:
            # What is said of one part wins over what is said of all.
            key = f"{label}.{name}"
            # A part of a part may have the label of one of these, which is who is meant then.
            first, dot, _ = name.partition(".")
            if key not in values and not (dot and first in self.labels):
                key = name
            if key in values:
                found[name] = cut(label, name, values[key])
        return found

    def cut(self, label: str, name: str, value: Any) -> Any:
        """A hyper for one part: of a tree prefix, the values of its leaves."""
        if not is_tree(value):
            return value
        return self.part(label, broadcast("partition", name, value, self.params, self.spec))

    def cut_if_tree(self, label: str, name: str, value: Any) -> Any:
        """An extra for one part: cut if it is a tree like params, in which leaves may be None, or a
        tree prefix of params; else as it is.
        """
        if not is_tree(value):
            return value
        # Not every list is a tree of params: one that does not fit goes to the rule as it is.
        tree: Any = value
        with contextlib.suppress(ValueError, TypeError):
            return self.part(label, self.spec.flatten_up_to(tree))
        with contextlib.suppress(ValueError):
            return self.cut(label, name, value)
        return value


def _agrees(opt: Optimizer, name: str, default: object) -> bool:
    """Whether an optimizer can be passed the default of another one, and nothing changes."""
    if name in opt.hyper:
        return _same(default, opt.hyper[name])
    return name not in opt.names


def _same(one: object, other: object) -> bool:
    return one is other or bool(one == other)
