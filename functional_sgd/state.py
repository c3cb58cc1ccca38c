"""The state of an optimizer: a dict of tensors. And the one place where precision is decided."""

import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import optree
import torch
from torch import Tensor

from functional_sgd.errors import did_you_mean
from functional_sgd.pairs import as_real
from functional_sgd.precision import HALVES, computed_in, widest
from functional_sgd.rule import Rule
from functional_sgd.sharded import check_whole, local, placed
from functional_sgd.signature import STEP, Initializer
from functional_sgd.tracing import transformed
from functional_sgd.tree import Keys, Spec, Tree, flatten, keys_of, paths, unflatten
from functional_sgd.wiring import CALLS, SEED

State: TypeAlias = dict[str, Any]
"""{"step": int64, one entry for each leaf; slot: tree like params; number: 0-d tensor; ...}"""


def init_state(rules: tuple[Rule, ...], numbers: tuple[str, ...], params: Tree) -> State:
    """A fresh state: no leaf has taken a step, every slot of every leaf has its first value.

    Nothing in it is shared with params.
    """
    leaves, spec = flatten(params)
    check_params(leaves)
    for index, leaf in enumerate(leaves):
        check_whole("init", lambda: paths(params), index, leaf)
    state: State = {STEP: new_steps(leaves)}
    for rule in rules:
        for name, initializer in rule.initializers.items():
            state[name] = unflatten(spec, _first_values(rule, name, initializer, params))
    starts: dict[str, Any] = {}
    for rule in rules:
        for name in rule.signature.numbers:
            starts[rule.outer(name)] = rule.starts[name]
    for name in numbers:
        whole = name in (CALLS, SEED)
        device = device_of(leaves)
        # Counts are whole; others are as precise as the device allows, since all leaves use them.
        kind = torch.int64 if whole else widest(device)
        state[name] = torch.tensor(starts.get(name, 0), dtype=kind, device=device)
    return state


def seeded(state: State, seed: int | str) -> State:
    """The state with its random numbers drawn from another seed; also inside of wrappers.

    What draws nothing comes back as it is. A text is a seed too.

    >>> seeded({"step": torch.tensor([0]), "seed": torch.tensor(0)}, 5)["seed"]
    tensor(5)
    """
    # Not hash(), which differs between processes.
    number = zlib.crc32(seed.encode()) if isinstance(seed, str) else seed
    found: State = {}
    for name, value in state.items():
        if name == SEED and _is_of_chain(state):
            # Added, not set: the parts of a partition begin with different seeds and must keep them
            # different.
            found[name] = value + number
        elif type(value) is dict:
            found[name] = seeded(value, number)
        else:
            found[name] = value
    return found


def _is_of_chain(state: Mapping[str, Any]) -> bool:
    """Whether this is the state of a chain, and not a slot, whose params may have any name."""
    for name in (STEP, SEED):
        value = state.get(name)
        if not isinstance(value, Tensor) or value.dtype != torch.int64:
            return False
    return True


def extended(state: State, fresh: State, before: list[Keys], names: list[Keys]) -> State:
    """A fresh state of leaves with these paths, in which those from `before` go on."""
    grown: State = {}
    order = _order_of(state, before)
    for entry, first in fresh.items():
        old = state[entry]
        if not isinstance(first, Tensor):
            known = dict(zip(keys_of(old), flatten(old)[0], strict=True))
            leaves, spec = flatten(first)
            if len(leaves) != len(names):
                raise ValueError(
                    f"extend: expected state[{entry!r}] to be a tensor or a tree like params, got "
                    f"{len(leaves)} leaves for {len(names)} params. If it is the state of an "
                    f"optimizer inside, define extend(state, before, params) in your class, which "
                    f"calls that one's."
                )
            kept = [known.get(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
            grown[entry] = unflatten(spec, kept)
        elif first.shape == (len(names),):
            # One entry for each leaf, like the steps; other tensors belong to the whole tree.
            places = {name: place for place, name in enumerate(order)}
            each = list(first.unbind())
            for index, name in enumerate(names):
                if name in places:
                    each[index] = old[places[name]]
            grown[entry] = torch.stack(each)
        else:
            grown[entry] = old
    return grown


def _order_of(state: State, before: list[Keys]) -> list[Keys]:
    """The paths of these leaves, in the order that vectors of the state have: that of its trees."""
    known = set(before)
    for value in state.values():
        if not isinstance(value, Tensor):
            order = keys_of(value)
            if set(order) == known:
                return order
    return before


def in_order_of(spec: Spec, vector: Tensor, like: Tree) -> Tensor:
    """A vector of a state, with an entry for each leaf, in the order of the leaves of `spec`.

    `like` is a tree of the same state. A dict and an OrderedDict with the same keys are one tree to
    everything that goes by keys, but a vector goes by places.

    >>> from collections import OrderedDict
    >>> spec = optree.tree_structure(OrderedDict(w=0, b=0))
    >>> in_order_of(spec, torch.tensor([1, 2]), dict(b=0, w=0))
    tensor([2, 1])
    """
    own = optree.tree_structure(like)
    if own == spec or own.num_leaves != spec.num_leaves:
        return vector
    numbers = optree.tree_unflatten(own, range(own.num_leaves))
    places: list[Any] = spec.flatten_up_to(numbers)
    if places == list(range(len(places))):
        return vector
    return vector[torch.tensor(places, device=vector.device)]


def new_steps(leaves: list[Tensor]) -> Tensor:
    """How many updates each leaf has taken: none."""
    return torch.zeros(len(leaves), dtype=torch.int64, device=device_of(leaves))


def new_calls(leaves: list[Tensor]) -> Tensor:
    """How many calls there were: none."""
    return torch.zeros((), dtype=torch.int64, device=device_of(leaves))


def device_of(leaves: list[Tensor]) -> torch.device:
    """The device that all leaves are on, else the CPU."""
    devices = {leaf.device for leaf in leaves}
    return devices.pop() if len(devices) == 1 else torch.device("cpu")


def check_state(who: str, state: object, entries: tuple[str, ...]) -> None:
    """Raise ValueError unless the state has exactly these entries."""
    if not isinstance(state, Mapping):
        raise TypeError(
            f"{who}: state must be what opt.init(params) returns, got {type(state).__name__}."
        )
    if state.keys() == set(entries):
        return
    for name in entries:
        if name not in state:
            raise ValueError(
                f"{who}: state has no {name!r}. Was it made by another optimizer, or by an "
                f"earlier version? opt.init(params) makes one."
            )
    for name in sorted(state.keys() - set(entries)):
        raise ValueError(
            f"{who}: no rule keeps {name!r}, which is in state. {did_you_mean(name, entries)}"
        )


def check_steps(who: str, step: object, count: int) -> None:
    """Raise ValueError unless there is an entry for each leaf."""
    if not isinstance(step, Tensor) or step.shape != (count,):
        found = tuple(step.shape) if isinstance(step, Tensor) else type(step).__name__
        raise ValueError(
            f"{who}: state[{STEP!r}] must have one entry for each of the {count} leaves of params, "
            f"got {found}. Was the state made for other params, or by an earlier version?"
        )


def working(leaf: Tensor) -> Tensor:
    """A leaf as rules see it: half precision as float32, complex as pairs of reals, a 0-d leaf as
    one element.
    """
    leaf = as_real(leaf)
    if leaf.dtype in HALVES:
        leaf = leaf.to(torch.float32)
    # With a 0-d leaf, the float64 scalars would promote results to float64.
    return leaf.reshape(1) if leaf.dim() == 0 else leaf


def stored(value: Tensor, like: Tensor) -> Tensor:
    """A result as it is kept: shape, dtype and placement of `like`, rounded once."""
    value = placed(value, like)
    if like.is_complex():
        return torch.view_as_complex(value.to(like.real.dtype))
    value = value.to(like.dtype)
    return value.reshape(like.shape) if value.shape != like.shape else value


def owned(value: Tensor, *others: Tensor | None) -> Tensor:
    """The value, copied if it shares memory with any of the others."""
    shared = any(other is not None and _share(value, other) for other in others)
    return value.clone() if shared else value


def like_params(params: Tree, slot: Tree) -> Tree:
    """A copy of a slot in the dtypes of the params, complex where they are."""
    leaves, spec = flatten(params)
    values: list[Any] = spec.flatten_up_to(slot)
    copies = []
    for leaf, value in zip(leaves, values, strict=True):
        pairs = leaf.is_complex() and not value.is_complex()
        whole = torch.view_as_complex(value) if pairs else value
        copies.append(whole.to(leaf.dtype, copy=True))
    return unflatten(spec, copies)


def gradient_for(leaf: Tensor, grad: Tensor) -> Tensor:
    """A gradient as rules see it: like `working`, in the precision of its parameter."""
    return working(grad).to(working_dtype(leaf))


def working_dtype(leaf: Tensor) -> torch.dtype:
    """The dtype in which a leaf is computed."""
    if leaf.is_complex():
        return torch.float64 if leaf.dtype == torch.complex128 else torch.float32
    return computed_in(leaf.dtype)


def _first_values(rule: Rule, slot: str, initializer: Initializer, params: Tree) -> list[Tensor]:
    values = []
    for place, leaf in enumerate(flatten(params)[0]):
        try:
            values.append(_first_value(rule, initializer, leaf))
        except Exception as error:
            error.add_note(
                f"raised for the first value of slot {slot!r} of rule {rule!r}, of leaf "
                f"{paths(params)[place]!r} with the shape {tuple(leaf.shape)}"
            )
            raise
    return values


def _first_value(rule: Rule, initializer: Initializer, leaf: Tensor) -> Tensor:
    seen = as_real(leaf)
    seen = seen.to(torch.float32) if leaf.dtype in HALVES else seen
    value = initializer(seen)
    if not isinstance(value, Tensor):
        raise TypeError(
            f"rule {rule.name}: a slot's first value must be a tensor, got {type(value).__name__}."
        )
    if rule.scope == "elementwise" and value.shape != seen.shape:
        raise TypeError(
            f"rule {rule.name}: a slot of an elementwise rule has the shape of its leaf, "
            f"{tuple(seen.shape)}, but begins as {tuple(value.shape)}. Use @leafwise."
        )
    return owned(value, leaf) if seen is leaf else owned(value, leaf, seen)


def first_shape(initializer: Initializer, leaf: Tensor) -> torch.Size | None:
    """The shape in which a slot of this leaf begins; None if it can be told only from its values.

    >>> first_shape(lambda param: param.new_zeros(param.shape[0]), torch.ones(3, 2))
    torch.Size([3])
    """
    try:
        return _first_shape(initializer, leaf.shape, leaf.dtype)
    except TypeError:  # no key for a cache
        return None


@lru_cache(maxsize=4096)
def _first_shape(
    initializer: Initializer, shape: torch.Size, dtype: torch.dtype
) -> torch.Size | None:
    # On the meta device nothing is allocated or computed, however large the leaf.
    seen = torch.empty(shape, dtype=dtype, device="meta")
    seen = torch.view_as_real(seen) if dtype.is_complex else seen
    if dtype in HALVES:
        seen = seen.to(torch.float32)
    try:
        value = initializer(seen)
    except (RuntimeError, NotImplementedError):  # of meta tensors, which have no values
        return None
    return value.shape


def _share(one: Tensor, other: Tensor) -> bool:
    one, other = local(one), local(other)
    if transformed():
        return one is other  # inside transforms, memory is not to be seen
    try:
        return (
            one.numel() > 0
            and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        )
    except (RuntimeError, NotImplementedError):  # tensors without memory of their own
        return one is other


def check_params(leaves: Sequence[object]) -> None:
    """Raise TypeError unless every leaf is a tensor that can be trained."""
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            module = isinstance(leaf, torch.nn.Module)
            hint = " Pass dict(module.named_parameters())." if module else ""
            raise TypeError(
                f"init: expected a tree of tensors, got a leaf of type {type(leaf).__name__}: "
                f"{leaf!r}.{hint}"
            )
        if not (leaf.is_floating_point() or leaf.is_complex()):
            raise TypeError(
                f"init: expected floating or complex tensors, got {leaf.dtype}. Keep it among the "
                f"buffers."
            )
