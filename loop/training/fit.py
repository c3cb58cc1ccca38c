"""Ways to run the machine: fit, fit_one_cycle, validate, predict, trace; each from state to state
(or to numbers).
"""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import optree
import torch

from functional_sgd import Chain, fuse
from functional_sgd.schedules import one_cycle, three_cosines
from functional_sgd.wiring import did_you_mean
from loop.callback import Callback
from loop.callbacks import ParamScheduler, Recorder
from loop.callbacks.recorder import RECORDER, recorded
from loop.data.batches import DataLoaders
from loop.learner import Learner, hyper_names
from loop.run.compiled import CompiledWork, check_compilable
from loop.run.events import VALIDATE
from loop.run.machine import Run, Steps
from loop.state import State
from loop.training.resume import begun_with, to_go_on_from


def fit(
    learner: Learner,
    state: State,
    epochs: int,
    callbacks: Sequence[Any] = (),
    resume: bool | str | Path = False,
    compile: bool = False,
    **hyper: Any,
) -> State:
    """Train for some epochs: state -> state. The state given is not touched and can be used again.

    `callbacks` join the learner's for this run. `hyper` are new values for the optimizer's hypers
    (`lr=0.1`), which stay in the state. Ctrl-C and SIGTERM end the run between two events: the
    state of the latest whole batch is returned, and its `stopped` says which it was.

    `resume=True` goes on with the run that the state was in when it was stopped or saved, as if
    nothing had happened: the end is the same bit for bit, if learner, callbacks and epochs are the
    same. `resume=folder` does so from the newest checkpoint in there (see Checkpoint), and begins
    with `state` while there is none. Another hyper, seed, number of epochs or length of the data
    than the run was begun with is an error, another optimizer, callback or torch a warning.

    `compile=True` compiles forward pass, loss and gradients of a training batch into one graph (a
    few seconds for each shape of batch; kept for later runs) and fuses the optimizer. Numbers then
    differ in their last digits, and dropout draws others. Callbacks that change pred or loss in
    between must be `traceable`.

    Raises ValueError for an unknown hyper, a negative number of epochs, or a state that is in no
    run of as many epochs; and whatever the model, the loss, the loaders and the callbacks raise:
    such an error has a note on where it happened, and `error.state`, the state of the latest whole
    batch.

    >>> from functional_sgd import sgd
    >>> x = torch.linspace(-1, 1, 8)[:, None]
    >>> data = DataLoaders([(x, 3 * x + 1)])
    >>> learner = Learner(torch.nn.Linear(1, 1), data, torch.nn.functional.mse_loss, sgd(lr=0.1))
    >>> state = fit(learner, learner.init(), epochs=200)
    >>> round(state.params["weight"].item(), 3)
    3.0
    """
    return run_to_end(begin(learner, state, epochs, callbacks, hyper, resume, compile))


def trace(
    learner: Learner,
    state: State,
    epochs: int = 1,
    callbacks: Sequence[Any] = (),
    resume: bool | str | Path = False,
    compile: bool = False,
    **hyper: Any,
) -> Steps:
    """`fit`, one transition at a time: yields (event, state) after every event; the last state is
    its return value.

    >>> from functional_sgd import sgd
    >>> x = torch.ones(1, 1)
    >>> learner = Learner(torch.nn.Linear(1, 1), DataLoaders([(x, x)]), torch.nn.functional.mse_loss, sgd(lr=0.1))
    >>> [event for event, state in trace(learner, learner.init())][3:7]
    ['before_batch', 'after_pred', 'after_loss', 'before_backward']
    """
    return _named(begin(learner, state, epochs, callbacks, hyper, resume, compile).steps())


def begin(
    learner: Learner,
    state: State,
    epochs: int,
    callbacks: Sequence[Any],
    hyper: Mapping[str, Any],
    resume: bool | str | Path = False,
    compile: bool = False,
) -> Run:
    """A run of `fit` that has not taken its first step; its arguments are checked here."""
    if not isinstance(epochs, int) or epochs < 0:
        raise ValueError(f"fit: epochs must be a whole number, 0 or more, got {epochs!r}.")
    known = hyper_names(learner)
    for name in hyper:
        if name not in known:
            raise ValueError(f"fit: the optimizer reads no {name!r}. {did_you_mean(name, known)}")
    everyone = with_recorder([*learner.callbacks, *callbacks])
    now = begun_with(learner, state, everyone, hyper, compile)
    work = None
    if compile:
        check_compilable(everyone)
        fusible = isinstance(learner.opt, Chain) or hasattr(learner.opt, "map_inner")
        learner = replace(learner, opt=fuse(learner.opt)) if fusible else learner
        work = CompiledWork(learner.model)
    stopped = to_go_on_from(resume, state, epochs, hyper, now, everyone)
    if stopped is not None:
        return Run(learner, stopped, callbacks=everyone, work=work)
    fresh: dict[str, Any] = dict(
        epoch=0, n_epoch=epochs, pct_train=0.0, stopped="", done=(), frozen=(), begun_with=now
    )
    start = state.replace(**fresh, hyper={**state.hyper, **hyper})
    return Run(learner, start, callbacks=everyone, work=work)


def fit_one_cycle(
    learner: Learner,
    state: State,
    epochs: int,
    lr: Any,
    moms: tuple[float, float, float] | None = (0.95, 0.85, 0.95),
    div: float = 25.0,
    div_final: float = 1e5,
    pct_start: float = 0.25,
    callbacks: Sequence[Any] = (),
    **options: Any,
) -> State:
    """Train while lr rises to its maximum and falls again, and momentum does the opposite.

    `lr` is the maximum, a number or a tree prefix of params. `moms` are the momentum at the start,
    at the peak and at the end; left alone if None, or if the optimizer has no `mom`. The other
    arguments are those of `one_cycle`, and those of `fit`. Source: Smith 2018, in fastai's form.
    """
    schedules: dict[str, Any] = {
        "lr": optree.tree_map(lambda top: one_cycle(float(top), div, div_final, pct_start), lr)
    }
    if moms is not None and "mom" in learner.opt.hyper:
        schedules["mom"] = three_cosines(pct_start, *moms)
    return fit(learner, state, epochs, [*callbacks, ParamScheduler(schedules)], **options)


def validate(learner: Learner, state: State, data: Iterable[Any] | None = None) -> dict[str, float]:
    """The loss and metrics on the validation data (or on other data): {"valid_loss": ..., metric:
    ...}.

    Means over all samples, whatever the batch sizes. The state is not touched, and no history is
    written. Raises ValueError if there is no data.
    """
    return dict(recorded(evaluate(learner, state, data, [])).row)


def predict(learner: Learner, state: State, data: Iterable[Any] | None = None) -> Any:
    """The model's outputs on the validation data (or on other data, with or without targets), all
    batches joined.

    The model is in evaluation mode. Raises ValueError if there is no data.
    """
    collected = evaluate(learner, state, data, [CollectPredictions()]).memory["collect_predictions"]
    return optree.tree_map(lambda *parts: torch.cat(parts), *collected)


@dataclass(frozen=True)
class CollectPredictions(Callback):
    """Remember every prediction of a validation, as the other callbacks leave it."""

    order: ClassVar[int] = 100

    def after_pred(self, state: State) -> State:
        """Keep one batch's."""
        return state.remember(self.name, (*state.memory.get(self.name, ()), state.pred))


def run_to_end(run: Run) -> State:
    """The last state of a run, or the committed one where Ctrl-C or SIGTERM stopped it.

    What fails between the signal and the next event is not raised: the loader's processes may have
    got it too.
    """
    with interruptible() as caught:
        try:
            state = run.to_end(lambda: bool(caught))
        except Exception as error:
            if error is not run.failure:
                raise
            state = run.committed.at_rest()
    return state.replace(stopped=signal.Signals(caught[0]).name) if caught else state


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """A list that gets the numbers of SIGINT and SIGTERM when they come; a second one interrupts at
    once.

    In another thread than the main one, Python cannot listen to them, and the list stays empty.
    """
    caught: list[int] = []
    before: dict[int, Any] = {}

    def catch(number: int, frame: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        heard = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        if callable(
            heard
        ):  # torch's raises an error, anywhere, when a loader's process has got the signal too
            before[signal.SIGCHLD] = heard
            signal.signal(signal.SIGCHLD, _quiet(heard))

    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before |= {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _quiet(handler: Callable[..., Any]) -> Callable[..., None]:
    """The handler of a signal, without its RuntimeError."""

    def handle(*details: Any) -> None:
        with suppress(RuntimeError):
            handler(*details)

    return handle


def with_recorder(callbacks: Sequence[Any]) -> list[Any]:
    """The callbacks, with a Recorder among them."""
    return (
        [*callbacks]
        if any(isinstance(callback, Recorder) for callback in callbacks)
        else [Recorder(), *callbacks]
    )


def evaluate(
    learner: Learner, state: State, data: Iterable[Any] | None, callbacks: Sequence[Any]
) -> State:
    """The state after the validate scope, run on other data if given; what callbacks have
    remembered is in it.
    """
    if data is not None:
        learner = replace(learner, data=DataLoaders(learner.data.train, data))
    if learner.data.valid is None:
        raise ValueError(
            "validate: the learner has no validation data. Pass data=..., or DataLoaders(train, "
            "valid)."
        )
    everyone = with_recorder([*learner.callbacks, *callbacks])
    start = state.forget(RECORDER).forget("collect_predictions").replace(n_epoch=0, done=())
    return Run(learner, start, VALIDATE, everyone).to_end(stop=lambda: False)


def _named(running: Steps) -> Steps:
    """Steps whose states know the event even where no callback has asked for it."""
    try:
        while True:
            event, state = next(running)
            yield event, state.replace(event=event)
    except StopIteration as end:
        result: State = end.value
        return result
    finally:
        running.close()
