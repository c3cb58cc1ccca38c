"""Leave parts of a model as they are: parameters (Freeze), and the statistics of batch norm
(BnFreeze).
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from loop.callback import Callback, Order
from loop.layer_groups import matching
from loop.run.stages import learner_of
from loop.state import State


@dataclass(frozen=True)
class Freeze(Callback):
    """Do not train the parameters whose names match: `Freeze("body.*")`, or `Freeze(("stem.*",
    "body.*"))`.

    Patterns are those of `by_path`; names are patterns too, so the names in all groups of
    `layer_groups(params)` but the last leave the head to train. The gradient of a frozen parameter
    is not even computed. So neither the step nor decay moves it, its slots in the optimizer's state
    stay, and clipping does not count it.

    Each parameter counts its own steps, so one that is trained in a later run begins there with the
    first steps of a fresh optimizer, and the others go on.

    Raises ValueError when the run starts if a pattern matches no parameter, or nothing is left to
    train.
    """

    patterns: str | tuple[str, ...]
    order: ClassVar[int] = Order.PREPARE

    def __post_init__(self) -> None:
        patterns = (self.patterns,) if isinstance(self.patterns, str) else tuple(self.patterns)
        object.__setattr__(self, "patterns", patterns)

    def before_fit(self, state: State) -> State:
        """Find the names."""
        # A second Freeze, under another name, adds to the first.
        names = {*state.frozen, *matching("Freeze", state.params, self.patterns)}
        if len(names) == len(state.params):
            raise ValueError(
                f"Freeze: {self.patterns} leaves no parameter to train. Leave some out."
            )
        return state.replace(frozen=tuple(name for name in state.params if name in names))


@dataclass(frozen=True)
class BnFreeze(Callback):
    """Let batch-norm layers that are not trained normalise by their running statistics, and leave
    these as they are.

    Not trained are layers whose parameters do not require a gradient, or are frozen by `Freeze`;
    with `all`, every batch-norm layer counts as such. A layer without parameters (affine=False)
    goes with the smallest module around it that has some. The layers are in evaluation mode during
    the forward pass only; the model is left as it was.
    """

    all: bool = False

    @contextmanager
    def around_train(self, state: State) -> Iterator[tuple[str, ...]]:
        """Find the names of the layers, which are the same for every batch."""
        model, trained = learner_of(state).model, state.params.keys() - {*state.frozen}
        # Once a phase, since is_trained goes through all parameters for every layer.
        found = []
        for name, layer in model.named_modules():
            is_norm = isinstance(layer, _BatchNorm)
            if is_norm and (self.all or not is_trained(model, name, trained)):
                found.append(name)
        del state  # its tensors would live as long as the run
        yield tuple(found)

    @contextmanager
    def around_predict(self, state: State) -> Iterator[None]:
        """Switch the layers to evaluation mode for the forward pass of a training batch."""
        model = learner_of(state).model
        names = state.resources[self.name] if state.training else ()
        # A layer that is already in evaluation mode must not be put into training mode afterwards.
        layers = [layer for layer in map(model.get_submodule, names) if layer.training]
        try:
            for layer in layers:
                layer.training = False
            yield
        finally:
            for layer in layers:
                layer.training = True


def is_trained(model: nn.Module, path: str, trained: Collection[str]) -> bool:
    """Whether a module of the model, or the smallest one around it that has parameters, has any
    that are trained.

    >>> inner = nn.Sequential(nn.BatchNorm1d(2, affine=False))
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), inner)
    >>> is_trained(model, "1", ["0.weight"]), is_trained(model, "2.0", ["0.weight"])
    (False, True)
    """
    names = [name for name, _ in model.named_parameters()]
    while path:
        own = [name for name in names if name.startswith(f"{path}.")]
        if own:
            return any(name in trained for name in own)
        path = path.rpartition(".")[0]
    return any(name in trained for name in names)
