"""A function of tensors as compiled code, for arguments that look like those with which it was
traced.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import optree
import torch
from torch import Tensor

from functional_sgd.guard import Guard

_LEAF: Any = 0
LIST = optree.tree_structure(_LEAF)
"""The pytree spec of a single leaf."""


@dataclass(frozen=True, eq=False)
class Traced:
    """Compiled code, and what it was made for: everything that is not a tensor, and the looks of
    what is.
    """

    fixed: Any
    guard: Guard
    run: Callable[..., Sequence[Tensor]]
    spec: optree.PyTreeSpec  # of the result
    constants: dict[int, Any]  # the leaves of the result that are no tensors

    def fits(self, tensors: list[Tensor], fixed: Any) -> bool:
        """Whether it is right for these arguments."""
        return bool(self.fixed == fixed) and self.guard.holds(tensors)

    def __call__(self, tensors: list[Tensor]) -> Any:
        """The result for these tensors, and its leaves."""
        with torch.no_grad():
            leaves = list(self.run(*tensors))
        for place, constant in self.constants.items():  # in order
            leaves.insert(place, constant)
        return self.spec.unflatten(leaves), leaves


def trace(function: Callable[..., Any], tensors: list[Tensor], fixed: Any, advice: str) -> Traced:
    """`function(*tensors)`, which may return any tree, as one compiled graph for tensors like
    these.

    It is called once, on tensors without values. What depends on values cannot be traced: then
    torch's error goes on, with `advice` as a note.
    """
    from torch.fx.experimental.proxy_tensor import (
        make_fx,
    )  # half a second, for those only who compile

    # A graph returns tensors only; the rest of the result is recorded while tracing.
    shape: list[Any] = []

    def flat(*values: Tensor) -> list[Tensor]:
        leaves, spec = optree.tree_flatten(function(*values), none_is_leaf=True)
        shape[:] = (
            spec,
            {place: leaf for place, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)},
        )
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

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
    return Traced(fixed, Guard(LIST, [tensors]), run, *shape)


MANY = 8
"""Graphs that differ by constants alone, after which it is said that there are many."""

Constants: TypeAlias = list[tuple[int, type, Any]]


def constants_in(leaves: Sequence[Any]) -> Constants:
    """The leaves that are no tensors, with their places, and types: 1, 1.0 and True are equal. They
    are constants of a graph, which is right for equal ones only.
    """
    each = enumerate(leaves)
    return [(place, type(leaf), leaf) for place, leaf in each if not isinstance(leaf, Tensor)]


def plain_constants(constants: Constants) -> list[Any]:
    """The numbers and texts among them, which are what differs from batch to batch."""
    return [leaf for _, _, leaf in constants if isinstance(leaf, (int, float, str))]


def joined(constants: Constants, spec: optree.PyTreeSpec, tensors: Iterator[Tensor]) -> list[Any]:
    """The leaves again, of their constants and the tensors in order."""
    known = {place: leaf for place, _, leaf in constants}
    return [known[i] if i in known else next(tensors) for i in range(spec.num_leaves)]


_NUMBER = object()
"""Stands where a number is, among what else is given as hypers; None may be given, and refused."""


def numbers_of(hyper: Mapping[str, Any]) -> Any:
    """Hypers as (their structure, all plain numbers in one tensor, the rest)."""
    tree: Any = dict(hyper)
    leaves, spec = optree.tree_flatten(tree, none_is_leaf=True)
    # A plain number would be a constant of the graph, and a new value would need a new graph.
    numbers = [leaf for leaf in leaves if type(leaf) in (int, float)]
    rest: list[Any] = [_NUMBER if type(leaf) in (int, float) else leaf for leaf in leaves]
    values = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    return spec, values, rest if len(numbers) < len(leaves) else None


def by_name(packed: Any) -> Any:
    """The hypers again, their numbers as 0-d tensors."""
    spec, numbers, rest = packed
    each = iter(numbers.unbind())
    known = [_NUMBER] * spec.num_leaves if rest is None else rest
    return spec.unflatten([next(each) if leaf is _NUMBER else leaf for leaf in known])
