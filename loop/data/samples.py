"""Which parts of a batch have an entry for each sample, and where its tensors are."""

from collections.abc import Callable, Mapping
from dataclasses import is_dataclass

import optree
from torch import Tensor

from functional_sgd.outputs import map_output
from functional_sgd.tree import Tree


def one_each(part: Tree, count: int) -> bool:
    """Whether this is a list or tuple with an entry for each of so many samples.

    >>> one_each(["cat", "dog"], 2), one_each([{"boxes": Tensor(5, 4)}, {"boxes": Tensor(1, 4)}], 2)
    (True, True)
    >>> one_each([Tensor(2), Tensor(2)], 2)
    False
    """
    if not isinstance(part, (list, tuple)) or len(part) != count or hasattr(part, "_fields"):
        return False
    # A list may be of dicts of tensors, such as the boxes of each image. A tuple of these, or a
    # list of tensors, is taken to be several inputs.
    leaves = part if isinstance(part, list) else optree.tree_leaves(plain(part))
    return not any(isinstance(leaf, Tensor) for leaf in leaves)


def plain(batch: Tree) -> Tree:
    """Mappings of other classes, such as Hugging Face's, as dicts."""
    return dict(batch) if isinstance(batch, Mapping) else batch


def map_tensors(function: Callable[[Tensor], object], part: Tree) -> Tree:
    """The part of a batch with `function` of every tensor in it; also of those in dataclasses and
    in mappings of other classes, which optree takes to be leaves.

    >>> from collections import UserDict
    >>> map_tensors(len, (UserDict(x=Tensor(2)), [Tensor(3), "cat"]))
    ({'x': 2}, [3, 'cat'])
    """

    def of_tensor(leaf: object) -> object:
        return function(leaf) if isinstance(leaf, Tensor) else leaf

    def of_leaf(leaf: Tree) -> object:
        return map_output(of_tensor, leaf) if _has_parts(leaf) else of_tensor(leaf)

    mapped: Tree = optree.tree_map(of_leaf, part)
    return mapped


def _has_parts(leaf: object) -> bool:
    """Whether what optree takes to be a leaf has parts by names."""
    if isinstance(leaf, type):
        return False
    return isinstance(leaf, Mapping) or is_dataclass(leaf)
