"""Watch the outputs of layers while a model learns."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, NamedTuple, TypeAlias, TypeVar

import optree
import torch
from torch import Tensor, nn

from functional_sgd.errors import did_you_mean
from functional_sgd.tree import Tree
from loop.callback import Callback, Order
from loop.history import Log
from loop.layer_stats import NEAR_ZERO
from loop.layer_stats import activation_stats as activation_stats
from loop.run.stages import device_of, learner_of
from loop.state import State

Layers: TypeAlias = str | Sequence[str] | Callable[[str, nn.Module], bool] | None
"""Which layers: their names or patterns, or a predicate of name and layer; None for all leaves with
parameters.
"""

Value = TypeVar("Value")


class Measured(NamedTuple):
    """What a hook says of one output."""

    stats: Tensor  # mean, std, share near zero
    histogram: Tensor | None


@dataclass(frozen=True)
class ActivationStats(Callback):
    """Keep mean, standard deviation and share near zero of layers' outputs in training batches, and
    their histogram.

    `layers` are names as in `model.named_modules()`, with wildcards if you like ("encoder.*"), or a
    predicate (name, layer) -> bool; None takes every layer that has parameters and no layers
    inside. `every` n-th batch of the state's life is measured. With `hist`, outputs are counted in
    `bins` over `range` too (not those outside of it). Hooks are on the model only during the
    forward pass of these batches, so nothing is measured in validation, and no way out leaves a
    hook behind. An output that is a tuple, as of an LSTM, counts by its first tensor; of a layer
    that is called twice the last call counts; one that is not called has NaNs.

    Read the results with `activation_stats(state)`, draw them with `plot_activations` and others. A
    run adds to what earlier runs measured, unless other layers or bins are asked for: then it
    begins anew. Nothing waits for a device.

    Raises ValueError for a bad number when built, and when the run starts if a name or pattern
    matches no layer. Source: fastai's ActivationStats; with the same numbers.
    """

    layers: Layers = None
    every: int = 1
    hist: bool = False
    bins: int = 40
    range: tuple[float, float] = (0.0, 10.0)
    order: ClassVar[int] = Order.MEASURE
    # In a compiled batch no layer is called, so no hook would run.
    eager: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"ActivationStats: every must be at least 1 batch, got {self.every}.")
        if self.bins < 1:
            raise ValueError(f"ActivationStats: bins must be at least 1, got {self.bins}.")
        if not self.range[0] < self.range[1]:
            raise ValueError(
                f"ActivationStats: range must be (low, high) with low < high, got {self.range}."
            )

    def before_fit(self, state: State) -> State:
        """Find the layers; go on with what was measured, if it is the same."""
        fresh, kept = self._fresh(state), state.memory.get(self.name, {})
        for name in ("layers", "kinds", "bins", "range"):
            if name not in kept or kept[name] != fresh[name]:
                return state.remember(self.name, fresh)
        return state

    @contextmanager
    def around_fit(self, state: State) -> Iterator[dict[str, Measured]]:
        """Where hooks leave what they measure, until after_pred."""
        del state  # its tensors would live as long as the run
        yield {}

    @contextmanager
    def around_predict(self, state: State) -> Iterator[None]:
        """Hooks on the layers, in training batches whose turn it is."""
        if not self._measures(state):
            yield
            return
        # Brackets of stages lend no resource, so the hooks write into the one of around_fit.
        found: dict[str, Measured] = state.resources[self.name]
        # A forward pass that raised may have left what its first layers gave.
        found.clear()
        with hooked(learner_of(state).model, self._memory(state)["layers"], self._measure, found):
            yield

    def after_pred(self, state: State) -> State | None:
        """Remember what the hooks have measured."""
        if not self._measures(state):
            return None
        found: dict[str, Measured] = state.resources[self.name]
        memory, device = self._memory(state), device_of(state)
        nothing = torch.full((3,), torch.nan, device=device)
        none = Measured(nothing, torch.zeros(self.bins, device=device))
        stats: list[Tensor] = []
        histograms: list[Tensor] = []
        for name in memory["layers"]:
            measured = found.pop(name, none)
            stats.append(measured.stats)
            if measured.histogram is not None:
                histograms.append(measured.histogram)
        logs = {
            "train_iter": memory["train_iter"].append(state.train_iter),
            "stats": memory["stats"].append(torch.stack(stats)),
        }
        if self.hist:
            logs["histograms"] = memory["histograms"].append(torch.stack(histograms))
        return state.remember(self.name, {**memory, **logs})

    def _memory(self, state: State) -> Mapping[str, Any]:
        memory: Mapping[str, Any] | None = state.memory.get(self.name)
        # None after a callback went back to a state from before the run.
        return self._fresh(state) if memory is None else memory

    def _fresh(self, state: State) -> dict[str, Any]:
        chosen = layers_of(learner_of(state).model, self.layers)
        bins = self.bins if self.hist else 0
        return {
            "layers": tuple(chosen),
            "kinds": tuple(type(layer).__name__ for layer in chosen.values()),
            "bins": bins,
            "range": tuple(self.range),
            "train_iter": Log(),
            "stats": Log(),
            "histograms": Log(),
        }

    def _measure(self, output: Tensor) -> Measured:
        histogram = torch.histc(output, self.bins, *self.range) if self.hist else None
        return Measured(stats_of(output), histogram)

    def _measures(self, state: State) -> bool:
        return state.training and state.train_iter % self.every == 0


def layers_of(model: nn.Module, layers: Layers = None) -> dict[str, nn.Module]:
    """The layers of a model that are meant, by name, in the order of the model.

    Raises ValueError if a name or pattern matches none, or if there is none at all.

    >>> list(layers_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), "*"))
    ['0', '1', '2']
    """
    named = dict(model.named_modules())
    fits = _chooser(layers, named)
    chosen = {name: layer for name, layer in named.items() if fits(name, layer)}
    if not chosen:
        raise ValueError(
            f"ActivationStats: layers={layers!r} chooses none of the model's {len(named)} layers."
        )
    return chosen


def _chooser(layers: Layers, named: Mapping[str, nn.Module]) -> Callable[[str, nn.Module], bool]:
    """The predicate of name and layer that stands for names, patterns or None."""
    if layers is None:
        return _is_leaf_with_params
    if callable(layers):
        return layers
    patterns = (layers,) if isinstance(layers, str) else tuple(layers)
    # The model itself, whose name is "", is no layer of its own: even "*" does not match it.
    inner = [name for name in named if name]
    matched: set[str] = set()
    for pattern in patterns:
        names = [name for name in inner if fnmatchcase(name, pattern)]
        if not names:
            hint = did_you_mean(pattern, inner)
            raise ValueError(
                f"ActivationStats: no layer of the model is called {pattern!r}. {hint}"
            )
        matched.update(names)
    return lambda name, layer: name in matched


def _is_leaf_with_params(name: str, layer: nn.Module) -> bool:
    is_leaf = next(layer.children(), None) is None
    return is_leaf and next(layer.parameters(), None) is not None


@contextmanager
def hooked(
    model: nn.Module,
    names: Sequence[str],
    measure: Callable[[Tensor], Value],
    found: dict[str, Value],
) -> Iterator[None]:
    """While this is open, these layers leave in `found`, by name, what `measure` says of their
    outputs.

    It gets the first tensor of an output, detached and at least float32, before a later layer can
    overwrite it.
    """

    def hook_of(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: object, output: Tree) -> None:
            tensors = [leaf for leaf in optree.tree_leaves(output) if isinstance(leaf, Tensor)]
            if tensors:
                first = tensors[0].detach()
                precise = first if first.dtype == torch.float64 else first.float()
                found[name] = measure(precise)

        return hook

    named = dict(model.named_modules())
    with ExitStack() as stack:
        for name in names:
            if name in named:
                stack.enter_context(named[name].register_forward_hook(hook_of(name)))
        yield


def stats_of(output: Tensor) -> Tensor:
    """(mean, standard deviation, share up to 0.05) of an output.

    >>> stats_of(torch.tensor([0.0, 1.0, 2.0, 1.0]))
    tensor([1.0000, 0.8165, 0.2500])
    """
    # With one element the corrected deviation would be NaN.
    correction = 1 if output.numel() > 1 else 0
    std, mean = torch.std_mean(output, correction=correction)
    near_zero = (output <= NEAR_ZERO).to(output.dtype).mean()
    return torch.stack([mean, std, near_zero])
