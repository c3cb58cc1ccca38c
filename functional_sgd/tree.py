"""Trees of tensors: flatten, rebuild, name the leaves, and say where two trees differ."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import optree

Tree: TypeAlias = Any
"""Any nesting of dict, list, tuple, namedtuple and registered nodes with tensors at its leaves."""

Spec: TypeAlias = optree.PyTreeSpec

Keys: TypeAlias = tuple[Any, ...]
"""The path of a leaf: the keys and numbers that lead to it."""


def flatten(tree: Tree) -> tuple[list[Any], Spec]:
    """The leaves of a tree, in a fixed order, and what is needed to rebuild it."""
    leaves, spec = optree.tree_flatten(tree)
    return leaves, spec


def unflatten(spec: Spec, leaves: Sequence[Any]) -> Tree:
    """The tree that `spec` describes, with these leaves; a leaf may be None."""
    return optree.tree_unflatten(spec, leaves)


def flatten_like(spec: Spec, tree: Tree, reference: Tree, who: str, what: str) -> list[Any]:
    """The leaves of `tree` at the leaf positions of `reference` (whose spec is given); None is
    allowed there.

    Raises ValueError, naming the first path that differs, if the structures do not match.
    """
    try:
        return spec.flatten_up_to(tree)
    except (ValueError, TypeError) as error:
        difference = first_difference(reference, tree)
        raise ValueError(
            f"{who}: expected {what} with the structure of params, but {difference}. "
            f"Pass a tree built like params (None stands for a leaf without {what})."
        ) from error


def dotted(path: Sequence[Any]) -> str:
    """A path as people write it: ("head", 0, "weight") -> "head.0.weight"."""
    return ".".join(str(part) for part in path)


def paths(tree: Tree) -> list[str]:
    """The dotted name of every leaf, in the order of `flatten`.

    >>> paths({"head": {"weight": 1.0, "bias": 2.0}})
    ['head.bias', 'head.weight']
    """
    return [dotted(path) for path in optree.tree_paths(tree)]


def keys_of(tree: Tree) -> list[Keys]:
    """The path of every leaf as it is: dotted, those of two leaves may be one.

    >>> keys_of({"a": {"b": 1.0}, "a.b": 2.0})
    [('a', 'b'), ('a.b',)]
    """
    return optree.tree_paths(tree)


def prefix_difference(tree: Tree, prefix: Tree) -> str:
    """Where a tree that should be a prefix of another is not, in words."""
    wanted, given = paths(tree), paths(prefix)
    for path in wanted:
        if not any(path == other or path.startswith(f"{other}.") for other in given):
            return f"{path!r} is not covered"
    for path in given:
        if not any(other == path or other.startswith(f"{path}.") for other in wanted):
            return f"{path!r} is not in params"
    return first_difference(tree, prefix)


def first_difference(expected: Tree, found: Tree) -> str:
    """Where two trees first differ, in words."""
    wanted, given = paths(expected), paths(found)
    for path in wanted:
        if path not in given:
            return f"{path!r} is missing"
    for path in given:
        if path not in wanted:
            return f"{path!r} is not in params"
    return (
        f"its containers are {optree.tree_structure(found)}, not {optree.tree_structure(expected)}"
    )
