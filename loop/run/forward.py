"""Calls of the model and the loss that leave the batch as it is."""

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor

from functional_sgd.placing import Placed
from functional_sgd.tree import Tree


class ByName(dict[str, Any]):
    """Inputs by name: the model is called with them as keyword arguments."""


# In the global namespace, since callbacks map over batches without naming one.
_register: Any = optree.register_pytree_node
_register(
    ByName,
    lambda named: (list(named.values()), tuple(named), tuple(named)),
    lambda names, values: ByName(zip(names, values, strict=True)),
    namespace=optree.registry.__GLOBAL_NAMESPACE,
)


def called(placed: Placed, xb: tuple[Tree, ...]) -> Tree:
    """The model's output for the inputs of a batch; those of a dict go by name."""
    if len(xb) == 1 and isinstance(xb[0], ByName):
        return placed.call((), xb[0])
    return placed.call(xb, {})


class Unharmed:
    """Calls of functions that may write to their arguments, as Dropout(inplace=True) does.

    A batch is the caller's data, often a view of a whole data set. So the first call is made on
    copies, which tell whether it writes; later calls get copies only if it does.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.writes: dict[bool, bool] = {}  # by phase, as far as it is known

    def call(self, function: Callable[[Tree], Tree], batch: Tree, training: bool) -> Tree:
        """function(batch), a tuple. Raises RuntimeError if it has written to it all the same."""
        copied = self.writes.get(training, True)
        if copied:
            batch = optree.tree_map(_copy, batch)
        if torch.is_inference_mode_enabled():  # which keeps no versions
            return function(batch)
        # A batch is nearly always a flat tuple, and flattening takes longer than this.
        tensors = [part for part in batch if isinstance(part, Tensor)]
        if len(tensors) < len(batch):
            tensors = [leaf for leaf in optree.tree_leaves(batch) if isinstance(leaf, Tensor)]
        versions = [tensor._version for tensor in tensors]
        result = function(batch)
        written = versions != [tensor._version for tensor in tensors]
        # A function that has written once gets copies for good, also where it does not write.
        self.writes[training] = written or (copied and training in self.writes)
        if written and not copied:
            raise RuntimeError(
                f"Learner: the {self.what} has written to a batch in place, which it did not do in "
                f"its first one, so the data may be changed. Load it again, and do not write to "
                f"it in place (x = x + 1 instead of x += 1)."
            )
        return result


_LINE = 64
"""Bytes of a line of a processor's cache, which is where torch lets a tensor's memory begin."""


def _copy(leaf: Any) -> Any:
    """A copy that begins as many bytes after a line of the cache as the tensor does.

    Products of matrices are rounded otherwise where memory is aligned otherwise, and a batch is to
    give the same bits whether it is copied or not: it is in one run, and not where that is resumed.
    """
    if not isinstance(leaf, Tensor):
        return leaf
    plain = type(leaf) is Tensor and leaf.layout is torch.strided and leaf.is_contiguous()
    plain = plain and leaf.device.type == "cpu" and not leaf.requires_grad
    if not plain or not leaf.data_ptr() % _LINE:
        return leaf.clone()
    room = torch.empty(leaf.numel() + _LINE, dtype=leaf.dtype)
    begin = (leaf.data_ptr() - room.data_ptr()) % _LINE // leaf.element_size()
    return room[begin : begin + leaf.numel()].view(leaf.shape).copy_(leaf)
