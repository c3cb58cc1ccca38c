"""Compiled batches: where they are kept, and how states become flat lists of tensors."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import optree
import torch
from torch import Tensor, nn

from functional_sgd.chained import functions_in
from functional_sgd.compile.step import without_kernels
from functional_sgd.compile.traced import MANY, Constants, Traced, plain_constants
from functional_sgd.fingerprint import PLAIN, fingerprint, reads_outside
from functional_sgd.optimizer import Optimizer
from functional_sgd.outputs import map_output
from functional_sgd.tree import Tree
from loop.learner import Learner
from loop.losses import MixedLoss
from loop.run.attributes import OF_ANY, is_of_torch

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


def _partial(
    function: Callable[..., object], args: Iterable[object], keywords: Mapping[str, object]
) -> "partial[object]":
    return partial(function, *args, **keywords)


@dataclass(frozen=True, eq=False)
class Learned:
    """(buffers, params, optimizer state), taken apart: tensors only, so None has no leaf."""

    tree: tuple[Tree, Tree, Tree]
    leaves: Sequence[Tensor]
    spec: optree.PyTreeSpec

    def now(self, tree: Tree) -> "Learned":
        """What a batch starts from: this, if it is the same trees, else those taken apart."""
        if all(one is other for one, other in zip(tree, self.tree, strict=True)):
            return self
        return Learned(tree, *optree.tree_flatten(tree))


def flat(tree: Tree) -> tuple[list[Any], optree.PyTreeSpec]:
    """(leaves, spec); None is a leaf in the data, and the parts of some losses are leaves too."""
    return optree.tree_flatten(tree, none_is_leaf=True, namespace=_NAMESPACE)


def counted(value: object) -> object:
    """A number as a tensor, so that another one does not make another graph; a float keeps its
    digits.
    """
    if type(value) is float:
        return torch.tensor(value, dtype=torch.float64)
    if type(value) is int:
        return torch.tensor(value)
    return value


@dataclass(frozen=True, eq=False)
class Shape:
    """How a prediction is built: the same, with the number of each part instead of it."""

    tree: Tree

    def filled(self, parts: Sequence[object]) -> Tree:
        """The prediction, of these parts."""
        return map_output(parts.__getitem__, self.tree)


def taken_apart(pred: Tree) -> tuple[list[object], Shape]:
    """The parts of a prediction, and how it is built of them."""
    parts: list[object] = []
    return parts, Shape(map_output(partial(_taken, parts), pred))


def _taken(parts: list[object], leaf: object) -> int:
    """The number that a leaf gets among the parts."""
    parts.append(leaf)
    return len(parts) - 1


_HOOKS = frozenset(name for name in OF_ANY if name.endswith("_hooks"))


def _fingerprint_of_loss(loss: Callable[..., Tensor]) -> tuple[object, ...]:
    """What of a loss a graph has in it as constants; what changes by batch goes in as tensors."""
    found: list[object] = []
    leaves, _ = flat(loss)
    for leaf in leaves:
        if isinstance(leaf, nn.Module):
            found += map(_fingerprint_of_layer, leaf.modules())
            found += map(fingerprint, leaf.state_dict(keep_vars=True).values())
        elif not isinstance(leaf, Tensor):
            found.append(fingerprint(leaf))
    return tuple(found)


def _fingerprint_of_layer(layer: nn.Module) -> tuple[object, ...]:
    """What of a layer a graph has in it as constants."""
    # Without the mode: it is in the key of every graph, so that one list serves all phases. Without
    # what layers of torch keep for themselves: an LSTM has its parameters in a list, too.
    constant = (*PLAIN, tuple)
    found: list[object] = [type(layer), *layer._modules]
    if not is_of_torch(layer):
        found.append(fingerprint(type(layer).forward))
    for name, value in sorted(vars(layer).items()):
        if name in _HOOKS:
            found.append((name, fingerprint([*value.values()])))  # without their numbers
        elif name in OF_ANY:
            continue
        elif not is_of_torch(layer) or isinstance(value, constant) or callable(value):
            found.append((name, fingerprint(value)))
    return tuple(found)


class Modes(NamedTuple):
    """What a forward pass depends on besides tensors."""

    training: tuple[bool, ...]  # of every layer
    autocast: torch.dtype | None


class Key(NamedTuple):
    """Everything that a graph depends on, but for the looks of its tensors."""

    constants: Constants  # in the data
    phase: str
    data: optree.PyTreeSpec
    learned: optree.PyTreeSpec
    modes: Modes
    functions: tuple[object, ...] = ()  # what tells whether loss and rules are the same
    frozen: tuple[str, ...] = ()
    opt: Optimizer | None = None  # if the graph goes on to the update
    handlers: tuple[object, ...] = ()  # of callbacks, that are called inside


_GRAPHS: WeakKeyDictionary[nn.Module, dict[object, list[Traced]]] = WeakKeyDictionary()


def graphs_of(model: nn.Module) -> list[Traced]:
    """The graphs of a model as it looks now, to find them in and to add to: kept as torch.compile
    keeps its code.
    """
    layers = tuple(map(_fingerprint_of_layer, model.modules()))
    return _GRAPHS.setdefault(model, {}).setdefault(layers, [])


_CONSTANTS = (
    "fit(compile=True): every batch is compiled by itself, since what is no tensor in it, {odd} "
    "now, is a constant of its graph. Leave out texts that the model does not read, and give "
    "numbers as tensors; or fit without compile=True."
)


class Graphs:
    """The graphs of the model that a run has now: a callback may put another one in its place, or
    change it between two phases.
    """

    def __init__(self) -> None:
        self.model: nn.Module | None = None
        self.alike = 0  # graphs of this run that differ by constants in the data alone

    def look_again(self) -> None:
        """Look at the model before its next batch."""
        self.model = None

    def look_at(self, learner: Learner) -> None:
        """Be those of the model and the loss of this learner."""
        model = learner.model
        if model is not self.model:
            self.model, self.known = model, graphs_of(model)
            rules = filter(reads_outside, functions_in(without_kernels(learner.opt)))
            self.functions = (*_fingerprint_of_loss(learner.loss), *map(fingerprint, rules))
            # Listed here, since the mode of each is part of the key of every batch.
            self.layers = list(model.modules())
            self.has_lstm = any(isinstance(layer, nn.LSTM) for layer in self.layers)

    def find(self, tensors: list[Tensor], key: Key, make: Callable[[], Traced]) -> Traced:
        """The graph for a batch that looks like this, made if there is none."""
        for one in self.known:
            if one.fits(tensors, key):
                return one
        self._count(tensors, key)
        graph = make()
        self.known.append(graph)
        return graph

    def _count(self, tensors: list[Tensor], key: Key) -> None:
        """Warn of many graphs that differ by constants in the data alone."""
        for one in self.known:
            # All but the constants, which come first.
            if one.fixed[1:] == key[1:] and one.guard.holds(tensors):
                self.alike += 1
                if self.alike == MANY:
                    odd = plain_constants(key.constants)
                    warnings.warn(_CONSTANTS.format(odd=odd), stacklevel=2)
                return
