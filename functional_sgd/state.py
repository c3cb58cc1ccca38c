"""The state of an optimizer: a dict of tensors. And the one place where precision is decided."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from functional_sgd.rule import COUNTER, Initializer, Rule
from functional_sgd.tracing import transformed
from functional_sgd.tree import Tree, flatten, unflatten
from functional_sgd.wiring import did_you_mean

State: TypeAlias = dict[str, Any]
"""{"step": 0-d int64 tensor, slot: tree like params, ...}"""

_HALVES = (torch.float16, torch.bfloat16)


def init_state(rules: tuple[Rule, ...], params: Tree) -> State:
    """A fresh state: step 0, and the first value of every slot of every leaf. Nothing in it is
    shared with params.
    """
    leaves, spec = flatten(params)
    _check_params(leaves)
    state: State = {COUNTER: new_counter(leaves)}
    for rule in rules:
        for inner, initializer in rule.initializers.items():
            state[rule.outer(inner)] = unflatten(
                spec, [_first_value(rule, initializer, leaf) for leaf in leaves]
            )
    return state


def new_counter(leaves: list[Tensor]) -> Tensor:
    """Step 0, on the device that all leaves are on, else on the CPU."""
    devices = {leaf.device for leaf in leaves}
    return torch.zeros((), dtype=torch.int64, device=devices.pop() if len(devices) == 1 else "cpu")


def check_state(who: str, state: Any, slots: tuple[str, ...]) -> None:
    """Raise ValueError unless the state has the counter and exactly these slots."""
    if not isinstance(state, Mapping):
        raise TypeError(
            f"{who}: state must be what opt.init(params) returns, got {type(state).__name__}."
        )
    expected = (COUNTER, *slots)
    if state.keys() == set(expected):
        return
    for name in expected:
        if name not in state:
            raise ValueError(
                f"{who}: state has no {name!r}. Was it made by another optimizer? opt.init(params) "
                f"makes one."
            )
    for name in sorted(state.keys() - set(expected)):
        raise ValueError(
            f"{who}: no rule keeps {name!r}, which is in state. {did_you_mean(name, expected)}"
        )


def working(leaf: Tensor) -> Tensor:
    """A leaf as rules see it: half precision as float32, complex as pairs of reals, a 0-d leaf as
    one element.
    """
    if leaf.is_complex():
        leaf = torch.view_as_real(leaf)
    if leaf.dtype in _HALVES:
        leaf = leaf.to(torch.float32)
    return leaf.reshape(1) if leaf.dim() == 0 else leaf


def stored(value: Tensor, like: Tensor) -> Tensor:
    """A result as it is kept: shape and dtype of `like`, rounded once."""
    if like.is_complex():
        return torch.view_as_complex(value.to(like.real.dtype))
    return (
        value.to(like.dtype).reshape(like.shape)
        if value.shape != like.shape
        else value.to(like.dtype)
    )


def owned(value: Tensor, *others: Tensor | None) -> Tensor:
    """The value, copied if it shares memory with any of the others."""
    return (
        value.clone()
        if any(other is not None and _share(value, other) for other in others)
        else value
    )


def gradient_for(leaf: Tensor, grad: Tensor) -> Tensor:
    """A gradient as rules see it: like `working`, in the precision of its parameter."""
    return working(grad).to(working_dtype(leaf))


def working_dtype(leaf: Tensor) -> torch.dtype:
    """The dtype in which a leaf is computed."""
    if leaf.is_complex():
        return torch.float64 if leaf.dtype == torch.complex128 else torch.float32
    return torch.float32 if leaf.dtype in _HALVES else leaf.dtype


def _first_value(rule: Rule, initializer: Initializer, leaf: Tensor) -> Tensor:
    seen = torch.view_as_real(leaf) if leaf.is_complex() else leaf
    seen = seen.to(torch.float32) if leaf.dtype in _HALVES else seen
    value = initializer(seen)
    if not isinstance(value, Tensor):
        raise TypeError(
            f"rule {rule.name}: a slot's first value must be a tensor, got {type(value).__name__}."
        )
    return owned(value, leaf) if seen is leaf else owned(value, leaf, seen)


def _share(one: Tensor, other: Tensor) -> bool:
    if transformed():
        return one is other  # inside transforms, memory is not to be seen
    try:
        return (
            one.numel() > 0
            and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        )
    except (RuntimeError, NotImplementedError):  # tensors without memory of their own
        return one is other


def _check_params(leaves: list[Any]) -> None:
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"init: expected a tree of tensors, got a leaf of type {type(leaf).__name__}: "
                f"{leaf!r}."
            )
        if not (leaf.is_floating_point() or leaf.is_complex()):
            raise TypeError(
                f"init: expected floating or complex tensors, got {leaf.dtype}. Keep it among the "
                f"buffers."
            )
