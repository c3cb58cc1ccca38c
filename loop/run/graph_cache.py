"""Compiled batches: where they are kept, and how states become flat lists of tensors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import optree
import torch
from torch import Tensor, nn

from functional_sgd.compile.traced import Traced
from functional_sgd.outputs import map_output
from loop.losses import MixedLoss

# Losses are taken apart, so that `lam` of each batch goes into the graph as a tensor, and an equal
# partial does not make another graph. In a namespace of our own: elsewhere a partial is a leaf.
_NAMESPACE = "functional_sgd.loop"
_register: Any = optree.register_pytree_node
_register(
    MixedLoss,
    lambda mixed: ((mixed.loss, mixed.lam, mixed.order), None, None),
    lambda _, parts: MixedLoss(*parts),
    namespace=_NAMESPACE,
)
_register(
    partial,
    lambda made: ((made.args, made.keywords), made.func, None),
    lambda function, parts: _partial(function, *parts),
    namespace=_NAMESPACE,
)


def _partial(function: Any, args: Any, keywords: Any) -> Any:
    return partial(function, *args, **keywords)


@dataclass(frozen=True, eq=False)
class Learned:
    """(buffers, params, optimizer state), taken apart: tensors only, so None has no leaf."""

    tree: tuple[Any, Any, Any]
    leaves: Sequence[Any]
    spec: optree.PyTreeSpec

    def now(self, tree: Any) -> "Learned":
        """What a batch starts from: this, if it is the same trees, else those taken apart."""
        if all(one is other for one, other in zip(tree, self.tree, strict=True)):
            return self
        return Learned(tree, *optree.tree_flatten(tree))


def flat(tree: Any) -> Any:
    """(leaves, spec); None is a leaf in the data, and the parts of some losses are leaves too."""
    return optree.tree_flatten(tree, none_is_leaf=True, namespace=_NAMESPACE)


def counted(value: Any) -> Any:
    """A number as a tensor, so that another one does not make another graph; a float keeps its
    digits.
    """
    if type(value) is float:
        return torch.tensor(value, dtype=torch.float64)
    return torch.tensor(value) if type(value) is int else value


@dataclass(frozen=True, eq=False)
class Shape:
    """How a prediction is built: the same, with the number of each part instead of it."""

    tree: Any

    def filled(self, parts: Sequence[Any]) -> Any:
        """The prediction, of these parts."""
        return map_output(parts.__getitem__, self.tree)


def constants_in(around: Sequence[Any]) -> list[tuple[int, Any]]:
    """What of a batch is no tensor, with its places."""
    return [(place, leaf) for place, leaf in enumerate(around) if not isinstance(leaf, Tensor)]


def joined(
    constants: Sequence[tuple[int, Any]], spec: optree.PyTreeSpec, tensors: Iterator[Tensor]
) -> list[Any]:
    """The leaves of a batch, from its tensors and what is none."""
    known = dict(constants)
    return [known[i] if i in known else next(tensors) for i in range(spec.num_leaves)]


def taken_apart(pred: Any) -> tuple[list[Any], Shape]:
    """The parts of a prediction, and how it is built of them."""
    parts: list[Any] = []
    return parts, Shape(map_output(partial(_taken, parts), pred))


def _taken(parts: list[Any], leaf: Any) -> int:
    """The number that a leaf gets among the parts."""
    parts.append(leaf)
    return len(parts) - 1


def _look(layer: nn.Module) -> tuple[Any, ...]:
    """What of a layer a graph has in it as constants, as far as it is plain."""
    # Without the mode: it is in the key of every graph, so that one list serves all phases.
    plain = (int, float, bool, str, tuple, type(None))
    values = {
        name: value
        for name, value in vars(layer).items()
        if isinstance(value, plain) and name != "training"
    }
    return type(layer), tuple(sorted((name, repr(value)) for name, value in values.items()))


_GRAPHS: WeakKeyDictionary[nn.Module, dict[Any, list[Traced]]] = WeakKeyDictionary()


def graphs_of(model: nn.Module) -> list[Traced]:
    """The graphs of a model as it looks now, to find them in and to add to: kept as torch.compile
    keeps its code.
    """
    return _GRAPHS.setdefault(model, {}).setdefault(tuple(map(_look, model.modules())), [])
