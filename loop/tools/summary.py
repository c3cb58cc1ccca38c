"""What a learner is made of: layers with their shapes and parameters, the optimizer, the loss, the
callbacks.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias

import optree
from torch import Tensor, nn

from functional_sgd.hyper import Hyper, with_hypers
from functional_sgd.notebook import html_facts, html_table
from functional_sgd.tree import Tree
from loop.callback import in_order, name_of
from loop.learner import Learner
from loop.metrics import metric_name
from loop.state import State
from loop.tools.table import aligned
from loop.training.batch import first_batch
from loop.training.fit import predict, with_recorder

Shapes: TypeAlias = tuple[tuple[int, ...], ...]
"""Of several tensors."""

_TITLES = ["layer", "kind", "output", "parameters", "trained"]


@dataclass(frozen=True)
class Layer:
    """One layer of a model. A tensor that two layers share is counted in the first."""

    name: str
    kind: str
    shapes: Shapes  # of the tensors that come out the first time; empty if it was not called
    trained: int  # elements of parameters that are trained
    frozen: int  # elements of parameters that are not


@dataclass(frozen=True, repr=False)
class Summary:
    """What `summary` found; print it to read it."""

    model: str
    inputs: Shapes
    layers: tuple[Layer, ...]
    sizes: Mapping[str, tuple[int, int]]  # params, frozen, buffers, optimizer -> (elements, bytes)
    opt: str
    hyper: Mapping[str, Hyper]
    loss: str
    metrics: tuple[str, ...]
    callbacks: tuple[str, ...]  # in the order of their calls

    def __str__(self) -> str:
        table = aligned([_TITLES, *self._rows()], left=3)
        rule = "-" * max(map(len, table))
        layers = [self._title(), rule, table[0], rule, *table[1:], rule]
        sizes = [[f"{name}:", count, f"({size})"] for name, count, size in self._sizes()]
        facts = [[f"{name}:", text] for name, text in self._facts().items()]
        return "\n".join([*layers, *aligned(sizes), "", *aligned(facts, left=2)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The same as tables."""
        layers = html_table(self._rows(), _TITLES, left=3, caption=self._title())
        sizes = html_table(self._sizes(), ("", "elements", "memory"), left=1)
        return layers + sizes + html_facts(self._facts())

    def _title(self) -> str:
        return f"{self.model}, input {_shapes(self.inputs)}"

    def _rows(self) -> list[list[str]]:
        rows = []
        for layer in self.layers:
            shapes = _shapes(layer.shapes)
            rows.append([layer.name, layer.kind, shapes, *_counts(layer)])
        return rows

    def _sizes(self) -> list[list[str]]:
        rows = []
        for name, (count, size) in self.sizes.items():
            rows.append([name, f"{count:,}", _bytes(size)])
        return rows

    def _facts(self) -> dict[str, str]:
        hyper = ", ".join(f"{name}={_hyper(value)}" for name, value in self.hyper.items())
        return {
            "optimizer": self.opt,
            "hypers": hyper or "none",
            "loss": self.loss,
            "metrics": ", ".join(self.metrics) or "none",
            "callbacks": ", ".join(self.callbacks) or "none",
        }


def summary(learner: Learner, state: State) -> Summary:
    """The layers of the model with their output shapes and parameters, the sizes, optimizer, loss
    and callbacks.

    The shapes are those of the first batch of training data, in evaluation mode. The model, its
    mode, its buffers and the caller's random numbers are as they were, whatever happens. Parameters
    count as trained if they are among the state's `params`.

    >>> import torch
    >>> from functional_sgd import sgd
    >>> from loop import DataLoaders
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> data = DataLoaders([(torch.ones(4, 2), torch.ones(4, 3))])
    >>> learner = Learner(model, data, nn.functional.mse_loss, sgd())
    >>> print(summary(learner, learner.init()))
    Sequential, input 4 x 2
    ------------------------------------------
    layer  kind    output  parameters  trained
    ------------------------------------------
    0      Linear  4 x 3            9      yes
    1      ReLU    4 x 3
    ------------------------------------------
    trained:    9  (36 bytes)
    frozen:     0   (0 bytes)
    buffers:    0   (0 bytes)
    optimizer:  2  (16 bytes)
    <BLANKLINE>
    optimizer:  chain(sgd_step, lr=0.001)
    hypers:     lr=0.001
    loss:       mse_loss
    metrics:    none
    callbacks:  recorder
    """
    xb, _ = first_batch(learner, state)
    with recorded_shapes(learner.model) as found:
        # Without targets, so that only the model is called.
        predict(replace(learner, callbacks=(), metrics=()), state, [xb])
    # `fit` adds a Recorder if there is none, so it is listed too.
    called = in_order(with_recorder(learner.callbacks))
    return Summary(
        type(learner.model).__name__,
        shapes_of(xb),
        tuple(layers(learner.model, state, found)),
        sizes(learner.model, state),
        repr(learner.opt),
        with_hypers(learner.opt.hyper, state.hyper),
        metric_name(learner.loss),
        tuple(map(metric_name, learner.metrics)),
        tuple(map(name_of, called)),
    )


@contextmanager
def recorded_shapes(model: nn.Module) -> Iterator[dict[str, Shapes]]:
    """A dict that gets the shapes of what every layer gives when it is first called."""
    found: dict[str, Shapes] = {}
    with ExitStack() as stack:
        for name, layer in model.named_modules():
            # The default binds this name; a closure would see the last one.
            def keep(layer: nn.Module, args: object, output: Tree, name: str = name) -> None:
                found.setdefault(name, shapes_of(output))

            stack.callback(layer.register_forward_hook(keep).remove)
        yield found


def layers(model: nn.Module, state: State, found: Mapping[str, Shapes]) -> Iterator[Layer]:
    """The layers without layers in them, and those with parameters of their own, as the model lists
    them.
    """
    names = {name for name, _ in model.named_parameters()}  # a shared one has one name here
    for name, layer in model.named_modules():
        prefix = f"{name}." if name else ""
        own = dict(layer.named_parameters(recurse=False))
        has_layers = next(layer.children(), None) is not None
        if not own and (has_layers or name not in found):
            continue
        trained, frozen = 0, 0
        for key, value in own.items():
            path = f"{prefix}{key}"
            if path not in names:  # counted in the layer that it is shared with
                continue
            if path in state.params:
                trained += value.numel()
            else:
                frozen += value.numel()
        yield Layer(name, type(layer).__name__, found.get(name, ()), trained, frozen)


def sizes(model: nn.Module, state: State) -> dict[str, tuple[int, int]]:
    """(elements, bytes) of the trained parameters, of the others, of the buffers, and of the
    optimizer's state.
    """
    parameters = {name for name, _ in model.named_parameters()}
    frozen, buffers = {}, {}
    for name, value in state.buffers.items():
        if name in parameters:
            frozen[name] = value
        else:
            buffers[name] = value
    return {
        "trained": _size(state.params),
        "frozen": _size(frozen),
        "buffers": _size(buffers),
        "optimizer": _size(state.opt_state),
    }


def shapes_of(tree: Tree) -> Shapes:
    """The shape of every tensor in a tree."""
    return tuple(tuple(tensor.shape) for tensor in _tensors(tree))


def _size(tree: Tree) -> tuple[int, int]:
    elements, memory = 0, 0
    for tensor in _tensors(tree):
        elements += tensor.numel()
        memory += tensor.numel() * tensor.element_size()
    return elements, memory


def _tensors(tree: Tree) -> list[Tensor]:
    return [leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _counts(layer: Layer) -> list[str]:
    count = layer.trained + layer.frozen
    if not count:
        return ["", ""]
    if not layer.frozen:
        return [f"{count:,}", "yes"]
    if not layer.trained:
        return [f"{count:,}", "no"]
    return [f"{count:,}", f"{layer.trained:,}"]


def _hyper(value: Hyper) -> str:
    leaves = [float(leaf) for leaf in optree.tree_leaves(value)]
    if len(set(leaves)) == 1:
        return f"{leaves[0]:g}"
    return f"{min(leaves):g} to {max(leaves):g}"


def _shapes(shapes: Shapes) -> str:
    # A 0-d tensor has no sizes to join.
    texts = [" x ".join(map(str, shape)) or "number" for shape in shapes]
    return ", ".join(texts) or "-"


def _bytes(size: int) -> str:
    if size < 1024:
        return f"{size} bytes"
    value = size / 1024
    for unit in ("KiB", "MiB"):
        if value < 1024:
            return f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
