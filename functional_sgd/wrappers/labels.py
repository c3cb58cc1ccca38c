"""Which leaf belongs to which part: labels by path, by leaf, or as a tree."""

import glob
from collections.abc import Mapping
from typing import Any, TypeAlias

import optree

from functional_sgd.hyper import check_patterns, first_matches, matches
from functional_sgd.tree import Tree, dotted, flatten

Labels: TypeAlias = Any
"""A function (path, leaf) -> label, a mapping of path patterns to labels, or a tree prefix of
params with labels.
"""


class Patterned:
    """A function (path, leaf) -> label that goes by patterns, of which each must cover a leaf."""

    patterns: tuple[str, ...]


def as_patterns(labels: Labels) -> Labels:
    """Labels as a function or a mapping of path patterns: of a tree, the paths of its leaves."""
    if callable(labels):
        return labels
    # A flat dict of texts may be meant as a tree; as patterns it says the same.
    if isinstance(labels, Mapping) and all(map(_is_pattern, labels, labels.values())):
        return labels
    paths, values, _ = optree.tree_flatten_with_path(labels, none_is_leaf=True)
    found: dict[str, Any] = {}
    for path, label in zip(paths, values, strict=True):
        # Escaped, since keys may have a * or a [ of their own. A single label has an empty path,
        # and is for all leaves.
        pattern = glob.escape(dotted(path)) or "*"
        found[pattern] = label
    return found


def labels_of(who: str, labels: Labels, params: Tree, names: list[str]) -> list[Any]:
    """The label of every leaf of params, whose paths are `names`; `labels` are a function or
    patterns.

    Raises ValueError if no pattern covers a leaf, or if a pattern covers none.
    """
    if callable(labels):
        if isinstance(labels, Patterned) and names:
            check_patterns(who, names, labels.patterns, covers)
        each = zip(names, flatten(params)[0], strict=True)
        return [labels(name, leaf) for name, leaf in each]
    # Without leaves every pattern would be one that covers none.
    return first_matches(who, names, labels, covers) if names else []


def covers(name: str, pattern: str) -> bool:
    """Whether a pattern matches a path, or a branch that it is on.

    >>> name = "head.weight"
    >>> covers(name, "head"), covers(name, "*.weight"), covers("head2.weight", "head")
    (True, True, False)
    """
    return bool(matches(name, pattern) or matches(name, f"{pattern}.*"))


def _is_pattern(key: object, value: object) -> bool:
    return isinstance(key, str) and not isinstance(value, (dict, list, tuple))
