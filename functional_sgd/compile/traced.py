"""A function of tensors as compiled code, for arguments that look like those with which it was
traced.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from numbers import Number
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple, TypeAlias

import optree
import torch
from torch import Tensor

from functional_sgd.guard import Guard
from functional_sgd.hyper import Hyper
from functional_sgd.tree import Spec, Tree

_LEAF: Any = 0
LIST = optree.tree_structure(_LEAF)
"""The pytree spec of a single leaf."""


@dataclass(frozen=True, eq=False)
class Traced:
    """Compiled code, and what it was made for: everything that is not a tensor, and the looks of
    what is.
    """

    fixed: tuple[Any, ...]
    guard: Guard
    run: Callable[..., Sequence[Tensor]]
    spec: Spec  # of the result
    constants: dict[int, object]  # the leaves of the result that are no tensors

    def fits(self, tensors: list[Tensor], fixed: tuple[Any, ...]) -> bool:
        """Whether it is right for these arguments."""
        return bool(self.fixed == fixed) and self.guard.holds(tensors)

    def __call__(self, tensors: list[Tensor]) -> tuple[Tree, list[Any]]:
        """The result for these tensors, and its leaves."""
        with torch.no_grad():
            leaves: list[Any] = list(self.run(*tensors))
        for place, constant in self.constants.items():  # in order
            leaves.insert(place, constant)
        return self.spec.unflatten(leaves), leaves


def trace(
    function: Callable[..., Tree], tensors: list[Tensor], fixed: tuple[Any, ...], advice: str
) -> Traced:
    """`function(*tensors)`, which may return any tree, as one compiled graph for tensors like
    these.

    It is called once, on tensors without values. What depends on values cannot be traced: then
    torch's error goes on, with `advice` as a note.
    """
    # Here, since it takes half a second, which only those who compile should wait for.
    from torch.fx.experimental.proxy_tensor import make_fx

    # A graph returns tensors only; the rest of the result is recorded while tracing.
    specs: list[Spec] = []
    constants: dict[int, object] = {}

    def flat(*values: Tensor) -> list[Tensor]:
        leaves, spec = optree.tree_flatten(function(*values), none_is_leaf=True)
        specs.append(spec)
        found: list[Tensor] = []
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                found.append(leaf)
            else:
                constants[place] = leaf
        return found

    try:
        # Fake tensors, since models ask whether they are traced by asking for these: those of
        # Hugging Face then do not look whether an attention mask is all ones.
        # Non-fake inputs are the tensors that the function closes over.
        graph = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
        with torch.no_grad():
            run: Any = torch._inductor.compile(graph, [*tensors])
    except Exception as error:
        error.add_note(advice)
        raise
    return Traced(fixed, Guard(LIST, [tensors]), run, specs[0], constants)


MANY = 8
"""Graphs that differ by constants alone, after which it is said that there are many."""


class Constant(NamedTuple):
    """A leaf that is no tensor: a constant of a graph, which is right for equal ones only."""

    place: int
    kind: type  # since 1, 1.0 and True are equal
    leaf: object


Constants: TypeAlias = list[Constant]


def constants_in(leaves: Sequence[object]) -> Constants:
    """The leaves that are no tensors."""
    found: Constants = []
    for place, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            found.append(Constant(place, type(leaf), leaf))
    return found


_FIXED = (
    *(Number, str, bytes, type(None), Enum, type, FunctionType, BuiltinFunctionType),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
)
"""What stays what it is, and is told from others by ==."""


def check_constants(who: str, constants: Iterable[Constant]) -> None:
    """Raise TypeError for a constant that may change while it stays equal to itself."""
    for one in constants:
        if isinstance(one.leaf, _FIXED):
            continue
        name = one.kind.__name__
        if hasattr(one.leaf, "__array__"):
            cure = "Give numbers as tensors, torch.from_numpy(array), and leave out the rest"
        elif isinstance(one.leaf, Mapping):
            cure = f"Give a dict of tensors, dict(batch) of a {name}"
        else:
            cure = "Give a dict of tensors, or register its class with optree"
        raise TypeError(
            f"{who}: expected tensors, numbers and texts in a batch, or trees of them (dicts, "
            f"lists, tuples), got {name}, which would be a constant of the graph, whatever is put "
            f"into it later. {cure}."
        )


def plain_constants(constants: Constants) -> list[float | str]:
    """The numbers and texts among them, which are what differs from batch to batch."""
    return [one.leaf for one in constants if isinstance(one.leaf, (int, float, str))]


def joined(constants: Constants, spec: Spec, tensors: Iterator[Tensor]) -> list[Any]:
    """The leaves again, of their constants and the tensors in order."""
    known = {one.place: one.leaf for one in constants}
    leaves = []
    for place in range(spec.num_leaves):
        if place in known:
            leaves.append(known[place])
        else:
            leaves.append(next(tensors))
    return leaves


_NUMBER = object()
"""Stands where a number is, among what else is given as hypers; None may be given, and refused."""


class Packed(NamedTuple):
    """Hypers as data of a graph: a plain number would be a constant of it, and a new value would
    need a new graph.
    """

    spec: Spec
    numbers: Tensor  # all plain numbers, in order
    rest: list[object] | None  # all leaves, with _NUMBER for each number; None if all are numbers


def numbers_of(hyper: Mapping[str, Hyper]) -> Packed:
    """Hypers, with all plain numbers in one tensor."""
    tree: Any = dict(hyper)
    leaves, spec = optree.tree_flatten(tree, none_is_leaf=True)
    numbers: list[float] = []
    rest: list[object] = []
    for leaf in leaves:
        # NumPy's float64 is a float too.
        if isinstance(leaf, (int, float)) and not isinstance(leaf, bool):
            numbers.append(leaf)
            rest.append(_NUMBER)
        else:
            rest.append(leaf)
    values = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    if len(numbers) == len(leaves):
        return Packed(spec, values, None)
    return Packed(spec, values, rest)


def by_name(packed: Packed) -> Tree:
    """The hypers again, their numbers as 0-d tensors."""
    each = iter(packed.numbers.unbind())
    if packed.rest is None:
        return packed.spec.unflatten(each)
    leaves: list[object] = []
    for leaf in packed.rest:
        if leaf is _NUMBER:
            leaves.append(next(each))
        else:
            leaves.append(leaf)
    return packed.spec.unflatten(leaves)
