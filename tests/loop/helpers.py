"""Builders for the tests of the loop: a small net with chance and buffers in it, data, callbacks
made of functions.
"""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from functional_sgd import Optimizer, adamw, sgd
from loop import Batches, DataLoaders, Learner, State
from tests.comparing import Untouched, assert_same

EVENTS = (
    "before_fit before_epoch before_train before_batch after_pred after_loss before_backward "
    "after_cancel_backward "
    "after_backward before_step after_cancel_step after_step after_cancel_batch after_batch "
    "after_cancel_train "
    "after_train before_validate after_cancel_validate after_validate after_cancel_epoch "
    "after_epoch after_cancel_fit "
    "after_fit"
).split()
"""Written down a second time on purpose: the tests do not read the list that they check."""

SCOPES = ("fit", "epoch", "train", "validate", "batch", "backward", "step")
STAGES = ("predict", "loss", "gradients", "update")

UNUSED = "the loss does not depend on"
"""What a run says of parameters without a gradient."""


def net(dropout: float = 0.5) -> nn.Sequential:
    """A net with every kind of state: parameters, BatchNorm's buffers, and chance."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(dropout), nn.Linear(4, 2)
        )


def linear() -> nn.Linear:
    """A layer with the weights 1, 2, 3, 4 (tenths) and no bias to begin with."""
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.1, 0.2], [0.3, 0.4]]))
        layer.bias.zero_()
    return layer


def one_weight(value: float = 1.0) -> nn.Linear:
    """y = value * x."""
    layer = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(value)
    return layer


def batches(count: int, seed: int, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Some batches of two inputs and two targets."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 2, generator=generator), torch.randn(size, 2, generator=generator))
        for _ in range(count)
    ]


def loaders(train: int = 3, valid: int | None = 2) -> DataLoaders:
    """So many batches of each."""
    return DataLoaders(batches(train, seed=1), None if valid is None else batches(valid, seed=2))


def learner(
    model: nn.Module | None = None,
    data: DataLoaders | None = None,
    loss: Callable[..., Tensor] = mse_loss,
    opt: Optimizer | None = None,
    **rest: Any,
) -> Learner:
    """A learner for a linear layer on 3 training and 2 validation batches, unless told
    otherwise.
    """
    return Learner(model or linear(), data or loaders(), loss, opt or sgd(lr=0.1, mom=0.9), **rest)


def by_hand(model: nn.Module, data: Any, epochs: int, lr: float = 0.1) -> dict[str, Tensor]:
    """The parameters after plain PyTorch's loop."""
    model = copy.deepcopy(model).train()
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(epochs):
        for x, y in data:
            opt.zero_grad()
            mse_loss(model(x), y).backward()
            opt.step()
    return {name: value.detach() for name, value in model.named_parameters()}


def plain(model: nn.Module, **rest: Any) -> Learner:
    """A learner that `by_hand` can be compared with."""
    return learner(model, opt=sgd(lr=0.1), **rest)


def on(name: str = "spy", order: int = 0, **handlers: Callable[[State], Any]) -> SimpleNamespace:
    """A callback made of functions: `on(after_loss=lambda state: ...)`."""
    return SimpleNamespace(name=name, order=order, **handlers)


def everywhere(
    handler: Callable[[str, State], Any], name: str = "spy", order: int = 0
) -> SimpleNamespace:
    """A callback that handles every event with one function of (event, state)."""
    return on(
        name, order, **{event: lambda state, event=event: handler(event, state) for event in EVENTS}
    )


def raiser(signal: BaseException | type[BaseException]) -> Callable[..., Any]:
    """A function that raises this, whatever it is called with."""

    def act(*_: Any) -> None:
        raise signal

    return act


def raise_once(signal: BaseException | type[BaseException], at: int = 0) -> Callable[..., Any]:
    """A function that raises this at one of its calls only."""
    calls = iter(range(10**6))

    def act(*_: Any) -> None:
        if next(calls) == at:
            raise signal

    return act


def learned(state: State) -> dict[str, Any]:
    """What training changes."""
    return {"params": state.params, "buffers": state.buffers, "opt_state": state.opt_state}


def losses(state: State) -> list[float]:
    """The training losses of all batches."""
    return [float(loss) for loss in state.history.losses]


def assert_same_run(found: State, expected: State) -> None:
    """Two states that are equal bit for bit, history and counters included."""
    assert_same(learned(found), learned(expected))
    assert losses(found) == losses(expected)
    assert found.history.rows == expected.history.rows
    assert found.history.hypers == expected.history.hypers
    for name in (
        "hyper",
        "seed",
        "epoch",
        "n_epoch",
        "iter",
        "n_iter",
        "train_iter",
        "epochs_seen",
        "pct_train",
    ):
        assert getattr(found, name) == getattr(expected, name), name


def assert_at_rest(state: State) -> None:
    """Nothing that belongs to a run is left in a state."""
    for name in ("xb", "yb", "pred", "loss", "grads", "learner"):
        assert getattr(state, name) is None, name
    assert state.resources == {}
    assert state.event == ""
    assert not state.training


X, Y = (torch.cat(parts) for parts in zip(*batches(5, seed=3), strict=True))


def shuffled(kind: str) -> DataLoaders:
    """Twenty samples in batches of 8, 8 and 4, shuffled by one loader or another; and validation
    data.
    """
    generator = torch.Generator() if kind == "DataLoader with a generator" else None
    train: Any = Batches((X, Y), 8, shuffle=True)
    if kind != "Batches":
        train = DataLoader(TensorDataset(X, Y), 8, shuffle=True, generator=generator)
    return DataLoaders(train, Batches((X, Y), 16))


KINDS = ["Batches", "DataLoader", "DataLoader with a generator"]


def full(kind: str = "Batches", **rest: Any) -> Learner:
    """Dropout, BatchNorm, an optimizer with memory, and shuffled data."""
    return learner(net(), shuffled(kind), opt=adamw(lr=0.01), **rest)


class Kept:
    """A snapshot of a state; `check()` fails if anything in it has been written to."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.tensors = Untouched(learned(state))
        self.rest = self._rest()

    def _rest(self) -> dict[str, Any]:
        values = {
            name: value
            for name, value in vars(self.state).items()
            if name not in learned(self.state)
        }
        history = values.pop("history")
        copies = {
            name: dict(value) if isinstance(value, dict) else value
            for name, value in values.items()
        }
        hypers = {name: list(log) for name, log in history.hypers.items()}
        return {
            **copies,
            "losses": losses(self.state),
            "hypers": hypers,
            "rows": [dict(row) for row in history.rows],
        }

    def check(self) -> None:
        """Compare with the snapshot."""
        self.tensors.check()
        assert self._rest() == self.rest
