"""Comparing trees of tensors in tests."""

from typing import Any

import optree
import torch

from functional_sgd.tree import paths

Tree = Any


def assert_close(found: Tree, expected: Tree, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Same containers, dtypes, devices and shapes; numbers within the tolerance, NaN
    equal to NaN.
    """
    assert optree.tree_structure(found) == optree.tree_structure(expected)
    for path, left, right in zip(
        optree.tree_paths(found),
        optree.tree_leaves(found),
        optree.tree_leaves(expected),
        strict=True,
    ):
        where = ".".join(map(str, path))
        torch.testing.assert_close(
            left,
            right,
            rtol=rtol,
            atol=atol,
            equal_nan=True,
            msg=lambda text, where=where: f"{where}: {text}",
        )


def assert_same(found: Tree, expected: Tree) -> None:
    """Equal bit for bit."""
    assert_close(found, expected)


def assert_finite(tree: Tree) -> None:
    """No leaf has a NaN or an infinity."""
    for path, leaf in zip(optree.tree_paths(tree), optree.tree_leaves(tree), strict=True):
        assert torch.isfinite(leaf).all(), f"{'.'.join(map(str, path))}: {leaf}"


def copy_of(tree: Tree) -> Tree:
    """The same numbers in other memory."""
    return optree.tree_map(
        lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, tree
    )


def by_path_of(tree: Tree) -> dict[str, torch.Tensor]:
    """The leaves of a tree by their dotted paths."""
    return dict(zip(paths(tree), optree.tree_leaves(tree), strict=True))


def counters(state: Tree) -> dict[str, torch.Tensor]:
    """What a state counts: "step" of every leaf, "calls" of every wrapper; by dotted path."""
    found = by_path_of(state)
    return {p: leaf for p, leaf in found.items() if p.split(".")[-1] in ("step", "calls")}


def of_params(path: str, params: Tree) -> bool:
    """Whether a path in a state ends with that of a leaf of params, so that it is a slot of that
    leaf.
    """
    return any(path.endswith(f".{name}") for name in paths(params))


def stack(trees: list[Tree]) -> Tree:
    """One tree with a new first axis over the given ones."""
    return optree.tree_map(lambda *leaves: torch.stack(leaves), *trees)


def member(tree: Tree, index: int) -> Tree:
    """One entry of the first axis of every leaf."""
    return optree.tree_map(lambda leaf: leaf[index], tree)


class Untouched:
    """A snapshot of trees: `check()` fails if a tensor in them was written to, even with equal
    numbers.
    """

    def __init__(self, *trees: Tree) -> None:
        self.trees = trees
        self.before = copy_of(trees)
        self.versions = self._versions()

    def _versions(self) -> list[int]:
        # Those made in inference mode have none.
        return [0 if leaf.is_inference() else leaf._version for leaf in self._tensors()]

    def _tensors(self) -> list[torch.Tensor]:
        return [leaf for leaf in optree.tree_leaves(self.trees) if isinstance(leaf, torch.Tensor)]

    def check(self) -> None:
        """Compare with the snapshot."""
        assert_same(self.trees, self.before)
        assert self._versions() == self.versions
