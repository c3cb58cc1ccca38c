"""What a learner is made of: layers with their shapes and parameters, the optimizer, the loss, the
callbacks.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import optree
from torch import Tensor, nn

from functional_sgd.notebook import html_facts, html_table
from loop.callback import in_order, name_of
from loop.learner import Learner
from loop.metrics import metric_name
from loop.state import State
from loop.tools.table import aligned
from loop.training.batch import first_batch
from loop.training.fit import validate, with_recorder

_TITLES = ["layer", "kind", "output", "parameters", "trained"]


@dataclass(frozen=True)
class Layer:
    """One layer of a model. A tensor that two layers share is counted in the first."""

    name: str
    kind: str
    # Of the tensors that come out the first time; empty if it was not called.
    shapes: tuple[tuple[int, ...], ...]
    trained: int  # elements of parameters that are trained
    frozen: int  # elements of parameters that are not


@dataclass(frozen=True, repr=False)
class Summary:
    """What `summary` found; print it to read it."""

    model: str
    inputs: tuple[tuple[int, ...], ...]  # shapes
    layers: tuple[Layer, ...]
    sizes: Mapping[str, tuple[int, int]]  # params, frozen, buffers, optimizer -> (elements, bytes)
    opt: str
    hyper: Mapping[str, Any]
    loss: str
    metrics: tuple[str, ...]
    callbacks: tuple[str, ...]  # in the order of their calls

    def __str__(self) -> str:
        table = aligned([_TITLES, *self._rows()], left=3)
        rule = "-" * max(map(len, table))
        sizes = [
            [f"{name}:", f"{count:,}", f"({_bytes(size)})"]
            for name, (count, size) in self.sizes.items()
        ]
        facts = [[f"{name}:", text] for name, text in self._facts().items()]
        lines = [
            self._title(),
            rule,
            table[0],
            rule,
            *table[1:],
            rule,
        ]
        return "\n".join([*lines, *aligned(sizes), "", *aligned(facts, left=2)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The same as tables."""
        layers = html_table(self._rows(), _TITLES, left=3, caption=self._title())
        sizes = [[name, f"{count:,}", _bytes(size)] for name, (count, size) in self.sizes.items()]
        return (
            layers
            + html_table(sizes, ("", "elements", "memory"), left=1)
            + html_facts(self._facts())
        )

    def _title(self) -> str:
        return f"{self.model}, input {_shapes(self.inputs)}"

    def _rows(self) -> list[list[str]]:
        return [
            [layer.name, layer.kind, _shapes(layer.shapes), *_counts(layer)]
            for layer in self.layers
        ]

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
        validate(replace(learner, callbacks=(), metrics=()), state, [xb])
    return Summary(
        type(learner.model).__name__,
        shapes_of(xb),
        tuple(layers(learner.model, state, found)),
        sizes(learner.model, state),
        repr(learner.opt),
        {**learner.opt.hyper, **state.hyper},
        metric_name(learner.loss),
        tuple(metric_name(metric) for metric in learner.metrics),
        tuple(name_of(callback) for callback in in_order(with_recorder(learner.callbacks))),
    )


@contextmanager
def recorded_shapes(model: nn.Module) -> Iterator[dict[str, tuple[tuple[int, ...], ...]]]:
    """A dict that gets the shapes of what every layer gives when it is first called."""
    found: dict[str, tuple[tuple[int, ...], ...]] = {}
    with ExitStack() as stack:
        for name, layer in model.named_modules():
            # The default binds this name; a closure would see the last one.
            def keep(layer: nn.Module, args: Any, output: Any, name: str = name) -> None:
                found.setdefault(name, shapes_of(output))

            stack.callback(layer.register_forward_hook(keep).remove)
        yield found


def layers(
    model: nn.Module, state: State, found: Mapping[str, tuple[tuple[int, ...], ...]]
) -> Iterator[Layer]:
    """The layers without layers in them, and those with parameters of their own, as the model lists
    them.
    """
    names = {name for name, _ in model.named_parameters()}  # a shared one has one name here
    for name, layer in model.named_modules():
        own = {
            f"{name}.{key}" if name else key: value
            for key, value in layer.named_parameters(recurse=False)
        }
        if not own and (next(layer.children(), None) is not None or name not in found):
            continue
        sizes = {key: value.numel() for key, value in own.items() if key in names}
        trained = sum(size for key, size in sizes.items() if key in state.params)
        yield Layer(
            name, type(layer).__name__, found.get(name, ()), trained, sum(sizes.values()) - trained
        )


def sizes(model: nn.Module, state: State) -> dict[str, tuple[int, int]]:
    """(elements, bytes) of the trained parameters, of the others, of the buffers, and of the
    optimizer's state.
    """
    parameters = {name for name, _ in model.named_parameters()}
    frozen = {name: value for name, value in state.buffers.items() if name in parameters}
    buffers = {name: value for name, value in state.buffers.items() if name not in parameters}
    parts = {
        "trained": state.params,
        "frozen": frozen,
        "buffers": buffers,
        "optimizer": state.opt_state,
    }
    return {name: _size(part) for name, part in parts.items()}


def shapes_of(tree: Any) -> tuple[tuple[int, ...], ...]:
    """The shape of every tensor in a tree."""
    return tuple(tuple(leaf.shape) for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor))


def _size(tree: Any) -> tuple[int, int]:
    tensors = [leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    return sum(leaf.numel() for leaf in tensors), sum(
        leaf.numel() * leaf.element_size() for leaf in tensors
    )


def _counts(layer: Layer) -> list[str]:
    if not layer.trained + layer.frozen:
        return ["", ""]
    part = "yes" if not layer.frozen else "no" if not layer.trained else f"{layer.trained:,}"
    return [f"{layer.trained + layer.frozen:,}", part]


def _hyper(value: Any) -> str:
    leaves = [float(leaf) for leaf in optree.tree_leaves(value)]
    return f"{leaves[0]:g}" if len(set(leaves)) == 1 else f"{min(leaves):g} to {max(leaves):g}"


def _shapes(shapes: tuple[tuple[int, ...], ...]) -> str:
    return ", ".join(" x ".join(map(str, shape)) or "number" for shape in shapes) or "-"


def _bytes(size: int) -> str:
    value = float(size)
    for unit in ("bytes", "KiB", "MiB"):
        if value < 1024:
            return f"{size} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
