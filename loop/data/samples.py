"""Which parts of a batch have an entry for each sample."""

from collections.abc import Mapping

import optree
from torch import Tensor

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
