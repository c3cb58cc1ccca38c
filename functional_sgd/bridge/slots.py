"""The state of an optimizer, seen parameter by parameter, as torch.optim keeps it."""

from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from functional_sgd.chained import Chained
from functional_sgd.compile.step import without_kernels
from functional_sgd.optimizer import Optimizer
from functional_sgd.state import State
from functional_sgd.tree import Tree, flatten, unflatten
from functional_sgd.wrappers.partition import PARTS, Partition
from functional_sgd.wrappers.sam import Sam
from functional_sgd.wrappers.wrapper import INNER

Named: TypeAlias = Mapping[str, Tensor]
Groups: TypeAlias = list[dict[str, Any]]
Keys: TypeAlias = tuple[str | int, ...]


class Place(NamedTuple):
    """Where in a state something of one parameter is."""

    keys: Keys  # from the state down to a tensor
    entry: int | None = None  # of that tensor, if it has one number for each parameter


Found: TypeAlias = Iterator[tuple[tuple[str, ...], Place]]
"""Places in a state, each with the names of the parameters that it is of."""

Layout: TypeAlias = dict[str, dict[str, Place]]
"""{parameter: {slot: where it is}}"""


@dataclass(frozen=True, eq=False)
class Kept(MutableMapping[str, Any]):
    """What is kept of one parameter, by the names of the slots: the tensors themselves.

    To assign one copies it into the tensor that is there. Slots are not added or taken away.
    """

    slots: "Slots"
    param: str

    def __getitem__(self, slot: str) -> Any:
        return self.slots.read(self.slots.layout[self.param][slot])

    def __setitem__(self, slot: str, value: Any) -> None:
        self.slots.write(self.param, {slot: value})

    def __delitem__(self, slot: str) -> None:
        raise _fixed(f"the slot {slot!r}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.slots.layout[self.param])

    def __len__(self) -> int:
        return len(self.slots.layout[self.param])

    def __repr__(self) -> str:
        return repr(dict(self))


class Slots(MutableMapping[Tensor, Kept]):
    """{parameter: what is kept of it}, of the one state that all parameters have together.

    It has the parameters of all groups, always: a state that nobody has stepped is made when it is
    looked at. Numbers of the whole tree are with every parameter.
    """

    def __init__(self, opt: Optimizer, groups: Groups) -> None:
        self.opt, self.groups = opt, groups
        self.tree: State | None = None
        # Of the parameters that the state was made for.
        self._looks: list[tuple[torch.device, torch.dtype]] = []
        self._begun = False  # whether it is more than a fresh state
        self._stepped = False  # whether a step has made it, so that it fits the parameters
        self._layout: Layout | None = None
        self._known: dict[int, tuple[Tensor, str]] = {}  # with the parameters, to keep their ids

    def named(self) -> dict[str, Tensor]:
        """The parameters of all groups by name. Raises ValueError if two have the same."""
        return named_in(self.groups)

    def state_for(self, leaves: Named) -> State:
        """The state, for these leaves: made if there is none.

        Until the first step, it follows leaves that are moved or converted.
        """
        # Only until the first step, so that later ones do not pay for the comparison.
        if self.tree is not None and self._stepped:
            return self.tree
        looks = [(leaf.device, leaf.dtype) for leaf in leaves.values()]
        if self.tree is None or (looks != self._looks and not self._begun):
            self.tree = self.opt.init(leaves)
        elif looks != self._looks:
            self.tree = _moved(self.tree, self.opt.init(leaves))
        self._looks = looks
        return self.tree

    def keep(self, state: State) -> None:
        """Go on from this state, which a step has made."""
        self.tree, self._begun, self._stepped = state, True, True

    def whole(self) -> State:
        """The state, with slots by the names of the parameters."""
        return self.state_for(detached(self.named()))

    def put(self, given: State) -> None:
        """Go on from a copy of this state. Raises ValueError if it does not fit, and is then as it
        was.
        """
        leaves = detached(self.named())
        fresh, spec = flatten(self.opt.init(leaves))
        values, theirs = flatten(given)
        if theirs != spec or [one.shape for one in values] != [one.shape for one in fresh]:
            raise ValueError(
                "to_torch: the state does not fit. It must be built like optimizer.opt_state: the "
                "same slots, with the same names of parameters and the same shapes. Was to_torch "
                "given module.named_parameters()?"
            )
        # Into fresh tensors, which have the dtypes and devices that the parameters need.
        pairs = zip(values, fresh, strict=True)
        copied = [like.detach().clone().copy_(value.detach()) for value, like in pairs]
        self.regroup(self.groups, unflatten(spec, copied))

    def regroup(self, groups: Groups, state: State | None) -> None:
        """Take other groups, and a state for their parameters (None: a fresh one)."""
        self.groups, self._layout, self._known = groups, None, {}
        self.tree = state
        self._begun, self._stepped = state is not None, False
        if state is not None:
            self._looks = [(leaf.device, leaf.dtype) for leaf in self.named().values()]

    def adopt(self, groups: Groups, given: Mapping[Tensor, Mapping[str, object]]) -> None:
        """Take other groups, and what is kept of their parameters, in memory of its own.

        What is not given begins afresh. Raises ValueError for what does not fit, and is then as it
        was.
        """
        other = Slots(self.opt, groups)
        for param, own in given.items():
            name = other._name(param)
            if own:
                _check_all("is missing", name, other.layout[name], own)
                other.write(name, own)
        self.regroup(groups, other.tree)

    @property
    def layout(self) -> Layout:
        """Where what is kept of each parameter is."""
        if self._layout is None:
            leaves = detached(self.named())
            self._layout = layout_of(self.opt, self.state_for(leaves), leaves)
        return self._layout

    def read(self, place: Place) -> Any:
        """What is there in the state."""
        value: Any = self.tree
        for key in place.keys:
            value = value[key]
        return value if place.entry is None else value[place.entry]

    @torch.no_grad()
    def write(self, param: str, own: Mapping[str, object]) -> None:
        """Copy into what is kept of a parameter. Raises ValueError if it does not fit."""
        places = self.layout[param]
        _check_all("is not kept here", param, own, places)
        for slot, value in own.items():
            target = self.read(places[slot])
            if not isinstance(value, Tensor):
                value = torch.as_tensor(value)
            if target.shape != value.shape:
                raise ValueError(
                    f"to_torch: the state does not fit: {slot!r} of {param!r} has the shape "
                    f"{tuple(value.shape)}, expected {tuple(target.shape)}. Load it into the same "
                    f"optimizer, with the same parameters in the same order."
                )
            if target is not value:
                target.copy_(value)
        self._begun = True

    def __getitem__(self, param: Tensor) -> Kept:
        return Kept(self, self._name(param))

    def __setitem__(self, param: Tensor, own: Mapping[str, object]) -> None:
        self.write(self._name(param), own)

    def __delitem__(self, param: Tensor) -> None:
        raise _fixed("what is kept of a parameter")

    def __iter__(self) -> Iterator[Tensor]:
        for group in self.groups:
            yield from group["params"]

    def __len__(self) -> int:
        return sum(len(group["params"]) for group in self.groups)

    def __repr__(self) -> str:
        return repr(dict(self))

    def _name(self, param: Tensor) -> str:
        if id(param) not in self._known:
            self._known = {id(known): (known, name) for name, known in self.named().items()}
        if id(param) not in self._known:
            raise KeyError(f"to_torch: no parameter of this optimizer: {param!r}")
        return self._known[id(param)][1]


def named_in(groups: Groups) -> dict[str, Tensor]:
    """The parameters of groups by name. Raises ValueError if two have the same."""
    every: list[Tensor] = []
    names: list[str] = []
    for group in groups:
        every += group["params"]
        names += group.get("param_names", ())
    if not names:
        names = [str(number) for number in range(len(every))]
    named = dict(zip(names, every, strict=True))
    if len(named) < len(every):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"to_torch: two parameters have the name {twice!r}, expected one of each. Give them "
            f"others: (name, parameter) pairs in each group."
        )
    return named


def detached(named: Named) -> dict[str, Tensor]:
    """The parameters as tensors that are not tracked."""
    return {name: param.detach() for name, param in named.items()}


def layout_of(opt: Optimizer, state: State, leaves: Named) -> Layout:
    """Where in a state is what, for each of these leaves.

    Slots have the names that they have in the state, numbers of the whole tree too. What is deeper
    in wrappers and has the name of something further out has its whole path: "inner.calls".
    """
    layout: Layout = {name: {} for name in leaves}
    for names, place in _places(without_kernels(opt), state, leaves, ()):
        for name in names:
            own = layout[name]
            words = [str(key) for key in place.keys if key != name]
            slot = words[-1] if words else name
            if slot in own:
                slot = ".".join(words)
            own[slot] = place
    return layout


def _places(opt: Optimizer, state: State, leaves: Named, above: Keys) -> Found:
    """(names of leaves, a place) for all that is in the state of these leaves, outermost first."""
    while isinstance(opt, Sam):  # whose state is that of the optimizer inside
        opt = opt.opt
    # By the optimizer, since a chain may have slots with these names.
    inside = _inside(opt)
    for key, value in state.items():
        if key in opt.vectors:
            yield from _all_in(value, tuple(leaves), (*above, key))
        elif key not in inside:
            yield from _entry(value, tuple(leaves), (*above, key))
    for key, one in inside.items():
        if key in state and one is not None:
            yield from _places(one, state[key], leaves, (*above, key))
    if PARTS in state and isinstance(opt, Partition):
        owned = opt.owned(leaves)
        for label, part in state[PARTS].items():
            own = {name: leaves[name] for name in owned[label]}
            inner = opt.optimizers[label]
            yield from _places(inner, part, own, (*above, PARTS, label))


def _inside(opt: Optimizer) -> dict[str, Optimizer | None]:
    """The entries of a state that are states of optimizers inside, and of which; None for those of
    several.
    """
    if isinstance(opt, Partition):
        return {PARTS: None}
    if isinstance(opt, Chained):
        front, inner, after = opt.inner
        return {"front": front, "after": after, INNER: inner}
    return {INNER: opt.inner[0]} if opt.inner else {}


def _entry(value: Tree, names: tuple[str, ...], keys: Keys) -> Found:
    """The same, for one entry: a slot, a number for each leaf, or a number of the whole tree."""
    if isinstance(value, dict) and value.keys() == set(names):
        for name in names:
            yield from _all_in(value[name], (name,), (*keys, name))
    elif isinstance(value, Tensor) and value.shape == (len(names),):
        # A dict of tensors is flattened in the order of its sorted keys.
        for entry, name in enumerate(sorted(names)):
            yield (name,), Place(keys, entry)
    elif isinstance(value, dict):  # of several, such as the state of an optimizer
        for key, inner in value.items():
            yield from _entry(inner, names, (*keys, key))
    else:
        yield from _all_in(value, names, keys)


def _all_in(value: Tree, names: tuple[str, ...], keys: Keys) -> Found:
    """The same, for what belongs to these parameters as a whole."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _all_in(inner, names, (*keys, key))
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            yield from _all_in(inner, names, (*keys, number))
    elif value is not None:
        yield names, Place(keys)


def _moved(state: State, like: State) -> State:
    """The state on the devices of another, and in its dtypes."""
    leaves, spec = flatten(state)
    others, _ = flatten(like)
    pairs = zip(leaves, others, strict=True)
    moved: State = unflatten(spec, [leaf.to(other.device, other.dtype) for leaf, other in pairs])
    return moved


def _check_all(problem: str, param: str, slots: Iterable[str], among: Collection[str]) -> None:
    """Raise ValueError unless all slots of one are among those of the other."""
    for slot in slots:
        if slot not in among:
            raise ValueError(
                f"to_torch: the state does not fit: {slot!r} of {param!r} {problem}; there are "
                f"{', '.join(map(repr, among))}. Load what the same optimizer has saved; "
                f"from_torch takes over the state of one of torch.optim."
            )


def _fixed(what: str) -> TypeError:
    return TypeError(
        f"to_torch: {what} cannot be taken away from optimizer.state, since the parameters are "
        f"stepped together. Make another optimizer with to_torch, or write zeros to it in place."
    )
