"""The fixed parts of a run, in one frozen record: storage only."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from functional_sgd import Optimizer, split
from functional_sgd.wrappers.wrapper import names_of
from loop.data.batches import DataLoaders
from loop.metrics.tally import Metric
from loop.state import State


@dataclass(frozen=True, eq=False)
class Learner:
    """What a run is made of and what does not change while it runs.

    `loss(pred, *targets)` returns a 0-d tensor, a mean over the batch. Each of `metrics` is a
    function `(pred, *targets) -> 0-d tensor`, also a mean over the batch; its name is the column.
    The first `n_inputs` entries of a batch are inputs, the rest targets; a batch of one entry has
    no targets.

    Raises TypeError if the data, the loss, the optimizer or a metric is not of the right kind, and
    ValueError for an optimizer that donates its buffers.

    >>> from functional_sgd import sgd
    >>> x = torch.linspace(-1, 1, 8)[:, None]
    >>> data = DataLoaders(train=[(x, 3 * x + 1)])
    >>> Learner(nn.Linear(1, 1), data, loss=nn.functional.mse_loss, opt=sgd(lr=0.1)).init(seed=0).train_iter
    0
    """

    model: nn.Module
    data: DataLoaders
    loss: Callable[..., Tensor]
    opt: Optimizer
    metrics: Sequence[Metric] = ()  # kept as a tuple, as callbacks are
    callbacks: Sequence[Any] = ()
    n_inputs: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise TypeError(
                f"Learner: model must be an nn.Module, got {type(self.model).__name__}."
            )
        if not isinstance(self.data, DataLoaders):
            raise TypeError(
                f"Learner: data must be DataLoaders(train, valid), got {type(self.data).__name__}."
            )
        if not isinstance(self.opt, Optimizer):
            raise TypeError(
                f"Learner: opt must be an optimizer such as adamw(), got {self.opt!r}. Call the "
                f"recipe."
            )
        if getattr(self.opt, "donate", False):
            raise ValueError(
                f"Learner: {self.opt!r} overwrites the state it is given, but a run must leave "
                f"yours as it was. "
                f"Use fuse(opt) without donate: it uses memory again once you have dropped it."
            )
        object.__setattr__(self, "metrics", _functions("metrics", self.metrics))
        object.__setattr__(self, "callbacks", tuple(_listed("callbacks", self.callbacks)))
        _functions("loss", [self.loss])

    def init(self, seed: int = 0, device: torch.device | str | None = None) -> State:
        """A fresh state: copies of the model's tensors (on `device`, if given), a fresh optimizer
        state.

        `seed` decides the order of the data and the randomness inside batches; the model's values
        are its own.
        """
        params, buffers = split(self.model)
        if device is not None:
            params = {name: value.to(device) for name, value in params.items()}
            buffers = {name: value.to(device) for name, value in buffers.items()}
        return State(params, buffers, self.opt.init(params), self.opt.hyper, seed)


def hyper_names(learner: Learner) -> set[str]:
    """Every hyper and extra that the optimizer reads, with or without a default."""
    return {*names_of(learner.opt)}


def _listed(what: str, values: Any) -> Iterable[Any]:
    if not isinstance(values, Iterable):
        raise TypeError(
            f"Learner: {what} must be a list, got {values!r}. Put it in one: [{values!r}]."
        )
    return values


def _functions(what: str, values: Iterable[Any]) -> tuple[Any, ...]:
    for value in _listed(what, values):
        if not callable(value):
            raise TypeError(
                f"Learner: {what} must be functions (pred, *targets) -> 0-d tensor, got {value!r}."
            )
    return tuple(values)
