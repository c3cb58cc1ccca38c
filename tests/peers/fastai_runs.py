"""The same tiny run with fastai's Learner and with ours: what both deliver, if signals are raised
at chosen places.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from functional_sgd import sgd
from loop import DataLoaders, Learner, SignalError, State, events, fit
from loop.run.signals import SIGNALS
from tests.loop.helpers import batches, everywhere, linear
from tests.peers.peers import fastai_module

SIGNAL_NAMES = ("fit", "epoch", "train", "validate", "batch", "backward", "step")

Plan = Mapping[int, str | type[Exception]]
"""Number of a delivered event -> what the spy raises there: the scope of a signal, or an error."""


learners = fastai_module("fastai.learner")
loaders = fastai_module("fastai.data.core")
optimizers = fastai_module("fastai.optimizer")
callbacks = fastai_module("fastai.callback.core")
fastai_module("fastai.callback.schedule")


def loader(count: int, seed: int, last: int = 4) -> DataLoader[Any]:
    """So many batches of four samples, the last one shorter if asked."""
    x, y = (torch.cat(parts) for parts in zip(*batches(count, seed), strict=True))
    kept = 4 * (count - 1) + last
    return DataLoader(TensorDataset(x[:kept], y[:kept]), 4)


@dataclass(frozen=True)
class Result:
    """What a run was like: the events delivered, how it ended, the weights and the
    smoothed losses.
    """

    events: list[str]
    end: str  # "finished", "uncaught" (a signal that nothing caught), or the name of an error
    params: dict[str, Tensor]
    losses: list[float]


def theirs(
    plan: Plan, run: Callable[[Any], Any], train: int = 2, valid: int = 2, last: int = 4
) -> tuple[Result, Any]:
    """A run with fastai, and its learner; `run(learner)` says what to do, `last` sizes the last
    batch of validation.
    """
    seen: list[str] = []

    class Spy(callbacks.Callback):  # type: ignore[misc,name-defined]
        order = -1000

        def __call__(self, event: str) -> None:
            if event in events():
                seen.append(event)
                act(plan.get(len(seen) - 1), THEIR_SIGNALS)

    data = loaders.DataLoaders(loader(train, 1), loader(valid, 2, last))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = learners.Learner(data, linear(), mse_loss, opt_func=their_sgd, lr=0.1, cbs=[Spy()])
        with fast.no_bar(), fast.no_logging():
            end = ended(lambda: run(fast), tuple(THEIR_SIGNALS.values()))
    params = {name: value.detach().clone() for name, value in fast.model.named_parameters()}
    return Result(
        seen, end, params, [float(loss) for loss in getattr(fast.recorder, "losses", [])]
    ), fast


def ours(
    plan: Plan, run: Callable[[Learner, State], Any], train: int = 2, valid: int = 2, last: int = 4
) -> Result:
    """A run with ours; `run(learner, state)` says what to do."""
    seen: list[str] = []
    states: list[Any] = []

    def spy(event: str, state: State) -> None:
        seen.append(event)
        act(plan.get(len(seen) - 1), SIGNALS)

    data = DataLoaders(loader(train, 1), loader(valid, 2, last))
    mine = Learner(
        linear(), data, mse_loss, sgd(lr=0.1, mom=0.9), callbacks=[everywhere(spy, order=-1000)]
    )
    start = mine.init()
    end = ended(lambda: states.append(run(mine, start)), (SignalError,))
    state = states[0] if states and isinstance(states[0], State) else start
    return Result(seen, end, dict(state.params), state.history.smooth_losses())


def fit_both(plan: Plan, epochs: int = 2) -> tuple[Result, Result]:
    """fit(2), unless told otherwise: (theirs, ours)."""
    return theirs(plan, lambda fast: fast.fit(epochs))[0], ours(
        plan, lambda mine, state: fit(mine, state, epochs)
    )


def act(what: str | type[Exception] | None, signals: Mapping[str, type[Exception]]) -> None:
    """Raise it, if anything."""
    if what is not None:
        raise signals[what] if isinstance(what, str) else what("on purpose")


def ended(run: Callable[[], Any], signals: tuple[type[Exception], ...]) -> str:
    """How a run ends."""
    try:
        run()
    except signals:
        return "uncaught"
    except Exception as error:
        return type(error).__name__
    return "finished"


def their_sgd(params: Any, lr: float) -> Any:
    """The same optimizer."""
    return optimizers.SGD(params, lr, mom=0.9)


THEIR_SIGNALS: dict[str, type[Exception]] = {
    scope: getattr(
        callbacks, f"Cancel{'Valid' if scope == 'validate' else scope.capitalize()}Exception"
    )
    for scope in SIGNAL_NAMES
}
