"""Recognise the tensors of a call as being just like those of an earlier one, which has been
checked.
"""

from collections.abc import Callable, Iterable, Sequence
from operator import eq
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sgd.memory import Addresses, addresses_of
from functional_sgd.tree import Spec, Tree, unflatten


class Recognised(NamedTuple):
    """The leaves of trees that a guard knows, and where each of them begins."""

    columns: list[list[Any]]
    addresses: list[Addresses]


class Guard:
    """The trees of a call that went well. Others with tensors just like theirs need no checks.

    Just like: of the same class, dtype, device, shape, strides and requires_grad, and with none of
    torch's marks (negated, conjugated, within a transform) that the others did not have. Every leaf
    must be a tensor.
    """

    def __init__(self, spec: Spec, columns: Sequence[list[Tensor]]) -> None:
        self.spec = spec
        self.tracked = False
        for column in columns:
            self.tracked = self.tracked or any(tensor.requires_grad for tensor in column)
        # None in place of the tensors, so that the guard does not keep them alive.
        self._containers = _containers(unflatten(spec, [None] * spec.num_leaves))
        # For each column. Columns that look alike share theirs, since what has been looked at just
        # now is still in the processor's cache.
        self._alike: list[Callable[..., bool]] = []
        for column in columns:
            shared = next((alike for alike in self._alike if alike(*column)), None)
            self._alike.append(shared or _alike(column))

    def holds(self, tensors: list[Tensor]) -> bool:
        """Whether tensors are just like those of the first column, in number too."""
        try:
            return self._alike[0](*tensors)
        except (ValueError, TypeError):
            # torch's check raises TypeError for a different number of tensors.
            return False

    def fits(self, columns: Sequence[list[Any]]) -> bool:
        """Whether columns of tensors are just like the known ones."""
        try:
            return all(alike(*own) for alike, own in zip(self._alike, columns, strict=True))
        except (ValueError, TypeError):
            # zip raises ValueError for a different number of columns.
            return False

    def flatten(self, trees: Sequence[Tree]) -> Recognised | None:
        """The leaves of trees that are just like the known ones; None if they are not."""
        found = Recognised([], [])
        try:
            if not _built_alike(trees[0], self._containers):
                return None  # before optree finds out, which writes all tensors into its message
            # One tree after the other, while its tensors are in the cache: a thousand small leaves
            # cost more to look at than to update.
            for tree, alike in zip(trees, self._alike, strict=True):
                column: list[Any] = self.spec.flatten_up_to(tree)
                if not alike(*column):
                    return None
                found.columns.append(column)
                found.addresses.append(addresses_of(column))
        except (KeyError, ValueError, TypeError, RuntimeError):
            # KeyError comes from a dict with another key between the first and the last one,
            # RuntimeError from a tensor without an address, such as a sparse one.
            return None
        return found


class Containers(NamedTuple):
    """How a dict, list or tuple is built."""

    kind: type
    size: object  # of a dict with its first and last key
    inner: dict[Any, "Containers"]  # its children that are containers too


def _containers(tree: Tree) -> Containers | None:
    """How a tree is built, as far as it is of dicts, lists and tuples."""
    children = dict(_children(tree))
    if not children:
        return None
    inner = {}
    for key, child in children.items():
        found = _containers(child)
        if found is not None:
            inner[key] = found
    return Containers(type(tree), _size(tree), inner)


def _built_alike(tree: Tree, known: Containers | None) -> bool:
    if known is None:
        return True
    kind: Any
    kind, size, inner = known
    if type(tree) is not kind or _size(tree) != size:
        return False
    return all(_built_alike(tree[key], child) for key, child in inner.items())


def _size(tree: Tree) -> object:
    """Enough to tell most trees apart; looking at all keys would take as long as flattening."""
    if isinstance(tree, dict) and tree:
        return len(tree), next(iter(tree)), next(reversed(tree))
    return len(tree)


def _children(tree: Tree) -> Iterable[tuple[Any, Tree]]:
    if isinstance(tree, dict):
        return tree.items()
    return enumerate(tree) if isinstance(tree, (list, tuple)) else ()


def _alike(known: list[Tensor]) -> Callable[..., bool]:
    """A function of as many tensors that says whether each is just like the known one (60
    nanoseconds each).
    """
    try:
        from torch._C._dynamo.guards import TensorGuards

        check: Callable[..., bool] = TensorGuards(
            *known, dynamic_dims_sizes=None, dynamic_dims_strides=None
        ).check
        if check(*known):
            return check
    except (ImportError, TypeError):  # a torch that has something else there
        pass
    looks = [_look(tensor) for tensor in known]
    return lambda *tensors: len(tensors) == len(looks) and all(map(eq, map(_look, tensors), looks))


def _look(value: object) -> tuple[object, ...]:
    """What makes a tensor like another."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return (type(value), None)
    marks = (value.requires_grad, value.is_neg(), value.is_conj(), value.is_inference())
    return (type(value), value.dtype, value.device, value.shape, value.stride(), *marks)
