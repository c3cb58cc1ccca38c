"""Ways to run the machine: fit, fit_one_cycle, validate, predict, trace; each from state to state
(or to numbers).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import optree

from functional_sgd.errors import did_you_mean, meant
from functional_sgd.fusion.spent import Donate, check_donate
from functional_sgd.hyper import with_hypers
from functional_sgd.outputs import map_output
from functional_sgd.ranges import check_number
from functional_sgd.schedules import one_cycle, three_cosines
from functional_sgd.sharded import any_distributed
from functional_sgd.tree import Tree
from loop.callback import taking_part
from loop.callbacks import ParamScheduler, Recorder
from loop.callbacks.parts.ending import ENDED
from loop.callbacks.recorder import RECORDER, recorded
from loop.callbacks.schedule import put_all_back
from loop.data.batches import check_loader
from loop.donation import check_not_spent, taken
from loop.learner import Learner, hyper_names
from loop.run import stages
from loop.run.compilable import check_compilable, check_optimizer_compilable
from loop.run.compiled import CompiledWork
from loop.run.events import VALIDATE
from loop.run.interrupt import STOPS, run_to_end
from loop.run.machine import Run, Steps
from loop.state import State
from loop.training.alone import warn_if_alone
from loop.training.checks import check_cut, check_frozen, check_written
from loop.training.collecting import Collector, CollectPredictions, joined
from loop.training.length import Length, length_asked
from loop.training.resume import begun_with, to_go_on_from

_COUNTED = ("epochs", "steps", "steps_per_epoch", "callbacks")
"""Arguments of `fit` that may be meant by a keyword that is no hyper."""


def fit(
    learner: Learner,
    state: State,
    epochs: int | None = None,
    callbacks: Sequence[object] = (),
    resume: bool | str | Path = False,
    compile: bool = False,
    stop: Literal["raise", "return"] = "raise",
    donate: Donate = False,
    steps: int | None = None,
    steps_per_epoch: int | None = None,
    **hyper: Tree,
) -> State:
    """Train for some epochs, or steps: state -> state. The state given is not touched and can be
    used again, unless you `donate` it.

    `steps` instead of `epochs` is how many training batches the run has; schedules are spread over
    these. An epoch is a pass over the training data, and the last ends where the steps do. With
    `steps_per_epoch=n` an epoch is n batches, whatever the length of the data: all that happens
    once an epoch (validation, the row of the history, SaveModel, EarlyStopping, Checkpoint) then
    happens every n batches. The order of the data does not depend on it: an epoch goes on with the
    pass where the last one has ended, in another run too.

    The model is not touched either: it has its first weights still. `learner.load(state)` copies
    those of a state into it.

    `callbacks` join the learner's for this run. `hyper` are new values for the optimizer's hypers
    (`lr=0.1`), which stay in the state.

    Ctrl-C and SIGTERM end the run at the next event, with every bracket closed, so that a
    Checkpoint has written the latest whole batch. Then KeyboardInterrupt is raised, or for SIGTERM
    SystemExit(143), so the script ends too; the state is the error's `state`. With `stop="return"`
    fit returns it instead, and `state.stopped` says which signal it was: "SIGINT" or "SIGTERM",
    else "". A second signal interrupts at once.

    `resume=True` goes on with the run that the state was in when it was stopped or saved, as if
    nothing had happened: the end is the same bit for bit, if learner, callbacks and epochs are the
    same. `resume=folder` does so from the newest checkpoint in there (see Checkpoint), and begins
    with `state` while there is none. Another `hyper` than the run was begun with is an error, as is
    another seed, length of the run or of the data; another optimizer, callback or torch is a
    warning. The lr of a schedule is part of a callback: resumed with another, `fit_one_cycle` warns
    and goes on along the new curve. Defaults of the optimizer (`adamw(lr=0.1)`) have no effect on a
    state that has hypers already.

    `compile=True` compiles forward pass, loss and gradients of a training batch into one graph, and
    the forward pass of a validation batch into another, and fuses the optimizer. The first batches
    wait for that: 20 to 35 s for a small model on an idle CPU core, about 10 s if torch's cache on
    disk has the graphs, several times as long on busy cores. Another shape of batch takes a few
    seconds more; later runs of the process wait for nothing. Numbers differ in their last digits,
    and dropout draws others. If the model cannot be compiled for validation, a warning says so.
    Callbacks that change pred or loss in between must be `traceable`; what they change of the model
    itself counts from the next phase on.

    `donate=True` gives the state away: the optimizer overwrites params and slots in place, which
    takes half of the memory. The state given is spent, and using it again is an error. What fails
    after a step has begun leaves no state to go on from (`error.state` is None), other than the
    last checkpoint; Ctrl-C and SIGTERM wait for the end of the batch. Callbacks keep copies:
    `state.keep()`. With `learner.init(donate=True)` the model gives its tensors away too.
    `donate="grads"` gives away the gradients alone: new params take the memory of large ones, which
    saves a copy of the params, and all else is as without it. After a step `state.grads` is None;
    what a callback keeps of gradients it keeps in `state.remember`, or as a copy.

    Raises ValueError for an unknown hyper, a negative number of epochs or steps, both or neither of
    them, or a state that is in no run of this length; and whatever the model, the loss, the loaders
    and the callbacks raise: such an error has a note on where it happened, and `error.state`, the
    state of the latest whole batch.

    >>> from functional_sgd import sgd
    >>> from loop import DataLoaders
    >>> x = torch.linspace(-1, 1, 8)[:, None]
    >>> data = DataLoaders([(x, 3 * x + 1)])
    >>> learner = Learner(torch.nn.Linear(1, 1), data, torch.nn.functional.mse_loss, sgd(lr=0.1))
    >>> state = fit(learner, learner.init(), epochs=200)
    >>> round(state.params["weight"].item(), 3)
    3.0
    >>> state = fit(learner, learner.init(), steps=250, steps_per_epoch=100)
    >>> [row["train_iter"] for row in state.history.rows]
    [100, 200, 250]
    """
    if stop not in STOPS:
        raise ValueError(f"fit: stop must be 'raise' or 'return', got {stop!r}.")
    check_arguments("fit", learner, state, callbacks)
    check_hypers(learner, hyper)
    length = length_asked(learner.data.train, epochs, steps, steps_per_epoch)
    run = begin(learner, state, length, callbacks, hyper, resume, compile, donate)
    del state  # whose memory may be used again as soon as the run has a state of its own
    return run_to_end(run, stop)


def trace(
    learner: Learner,
    state: State,
    epochs: int | None = None,
    callbacks: Sequence[object] = (),
    resume: bool | str | Path = False,
    compile: bool = False,
    donate: Donate = False,
    steps: int | None = None,
    steps_per_epoch: int | None = None,
    **hyper: Tree,
) -> Steps:
    """`fit`, one transition at a time: yields (event, state) after every event; the last state is
    its return value. One epoch, if nothing says how long.

    >>> from functional_sgd import sgd
    >>> from loop import DataLoaders
    >>> x = torch.ones(1, 1)
    >>> data, loss = DataLoaders([(x, x)]), torch.nn.functional.mse_loss
    >>> learner = Learner(torch.nn.Linear(1, 1), data, loss, sgd(lr=0.1))
    >>> [event for event, state in trace(learner, learner.init())][3:7]
    ['before_batch', 'after_pred', 'after_loss', 'before_backward']
    """
    check_arguments("fit", learner, state, callbacks)
    check_hypers(learner, hyper)
    epochs = 1 if epochs is None and steps is None else epochs
    length = length_asked(learner.data.train, epochs, steps, steps_per_epoch)
    # Begun here and not in a generator, so that mistakes are errors at the call.
    return _named(begin(learner, state, length, callbacks, hyper, resume, compile, donate).steps())


def check_hypers(learner: Learner, hyper: Mapping[str, Tree]) -> None:
    """Raise ValueError for a keyword that is neither a hyper nor an argument of `fit`."""
    known = hyper_names(learner)
    for name in hyper:
        if name not in known:
            # A hyper of nearly this name is more likely than an argument.
            hint = "" if meant(name, known) else meant(name, _COUNTED)
            raise ValueError(
                f"fit: the optimizer reads no {name!r}. {hint}{did_you_mean(name, known)}"
            )


def begin(
    learner: Learner,
    state: State,
    length: Length,
    callbacks: Sequence[object],
    hyper: Mapping[str, Tree],
    resume: bool | str | Path = False,
    compile: bool = False,
    donate: Donate = False,
) -> Run:
    """A run of `fit` that has not taken its first step; callbacks are checked here."""
    check_donate("fit", donate)
    check_cut(learner, state)
    check_frozen(learner, state)
    check_written(state, [*learner.callbacks, *callbacks])
    warn_if_alone(learner, state)
    everyone = with_recorder([*learner.callbacks, *callbacks], compile)
    now = begun_with(learner, state, everyone, hyper, compile)
    work = _compiled(learner, state, everyone) if compile else stages.Work()
    work.spend_grads = donate == "grads"
    stopped = to_go_on_from(resume, state, length, hyper, now, everyone)
    # The hypers of this command were set when the run began; schedules may have moved them since.
    if stopped is not None:
        return Run(learner, _owned(stopped, donate), callbacks=everyone, work=work)
    # train_iter and epochs_seen go on: two runs of one epoch are one run of two epochs.
    fresh: dict[str, Any] = dict(
        epoch=0, pct_train=0.0, stopped="", done=(), frozen=(), begun_with=now, **length.fields
    )
    # A schedule of a run that was stopped, and is not resumed; how an earlier one has ended.
    state = put_all_back(state).forget(ENDED)
    start = state.replace(**fresh, hyper=with_hypers(state.hyper, hyper))
    return Run(learner, _owned(start, donate), callbacks=everyone, work=work)


def _compiled(learner: Learner, state: State, callbacks: Sequence[object]) -> CompiledWork:
    """The work of compiled batches. Raises an error for what cannot be in one."""
    check_compilable(callbacks)
    check_optimizer_compilable(learner)
    if any_distributed(state.params.values()):
        raise ValueError(
            "fit(compile=True): the params are DTensors, which a compiled batch does not take. "
            "Fit without compile=True."
        )
    return CompiledWork()


def _owned(state: State, donate: Donate) -> State:
    """The state that a run begins with: if it is donated, nobody else has its tensors."""
    if donate is not True:
        return state
    return taken(state, "fit(donate=True)").replace(donated=True)


def fit_one_cycle(
    learner: Learner,
    state: State,
    epochs: int | None = None,
    lr: Tree = None,
    moms: tuple[float, float, float] | None = (0.95, 0.85, 0.95),
    div: float = 25.0,
    div_final: float = 1e5,
    pct_start: float = 0.25,
    callbacks: Sequence[object] = (),
    **options: Any,
) -> State:
    """Train while lr rises to its maximum and falls again, and momentum does the opposite.

    `lr` is the maximum, a number or a tree prefix of params; the state's own if None. `moms` are
    the momentum at the start, at the peak and at the end; left alone if None, or if the optimizer
    has no `mom`. The other arguments are those of `one_cycle`, and those of `fit` (`steps=1000`
    instead of epochs). Source: Smith 2018, in fastai's form.

    >>> from functional_sgd import sgd
    >>> from loop import DataLoaders
    >>> x = torch.ones(1, 1)
    >>> data, loss = DataLoaders([(x, x)]), torch.nn.functional.mse_loss
    >>> learner = Learner(torch.nn.Linear(1, 1), data, loss, sgd())
    >>> end = fit_one_cycle(learner, learner.init(), steps=4, lr=0.1)
    >>> [round(lr, 4) for lr in end.history.hypers["lr"]]
    [0.004, 0.1, 0.075, 0.025]
    """
    top = highest_lr("fit_one_cycle", learner, state, lr)
    schedules: dict[str, Tree] = {
        "lr": optree.tree_map(lambda top: one_cycle(float(top), div, div_final, pct_start), top)
    }
    if moms is not None and "mom" in learner.opt.hyper:
        schedules["mom"] = three_cosines(pct_start, *moms)
    return fit(learner, state, epochs, [*callbacks, ParamScheduler(schedules)], **options)


def highest_lr(who: str, learner: Learner, state: State, lr: Tree) -> Tree:
    """The lr itself, or that of the state before any schedule. Raises ValueError, on behalf of
    `who`, if it has none.
    """
    if lr is not None:
        for leaf in optree.tree_leaves(lr):
            check_number(who, "lr", leaf)
        return lr
    check_arguments(who, learner, state)
    own = put_all_back(state).hyper.get("lr")
    if own is None:
        raise ValueError(
            f"{who}: lr is not given, and the state has none. Pass the maximum: lr=0.01."
        )
    return own


def validate(
    learner: Learner, state: State, data: Iterable[Tree] | None = None
) -> dict[str, float]:
    """The loss and metrics on the validation data (or on other data): {"valid_loss": ..., metric:
    ...}.

    Means over all samples, whatever the batch sizes. The state is not touched, and no history is
    written. The learner's callbacks take part, those that were given to `fit` do not: an
    AverageParams or MixedPrecision among those makes other numbers in the history. What a callback
    of the learner cancels does not count. Raises ValueError if there is no data.
    """
    return dict(recorded(evaluate("validate", learner, state, data)).row)


def predict(learner: Learner, state: State, data: Iterable[Tree] | None = None) -> Tree:
    """The model's outputs on the validation data (or on other data, with or without targets), all
    batches joined.

    Joined are the tensors in an output that is a tuple, a dict, a dataclass or a ModelOutput; of
    what else is in there, there is a tuple with that of each batch. The model is in evaluation
    mode. Raises ValueError if there is no data, a callback of the learner leaves a batch out, or
    outputs cannot be joined, as those of sequences that each batch pads to a length of its own:
    then `[predict(learner, state, [batch]) for batch in data]` has them one by one.
    """
    collector = CollectPredictions()
    after = evaluate("predict", learner, state, data, collector)
    return map_output(partial(joined, "predict"), *after.memory[collector.name])


def check_arguments(
    who: str, learner: Learner, state: State, callbacks: Sequence[object] = ()
) -> None:
    """Raise TypeError, on behalf of `who`, for arguments of the wrong kind, or in the
    wrong order.
    """
    if not isinstance(learner, Learner):
        raise TypeError(
            f"{who}: the first argument must be a Learner, got {type(learner).__name__}. "
            f"Call {who}(learner, state, ...)."
        )
    if not isinstance(state, State):
        raise TypeError(
            f"{who}: the second argument must be a State, got {type(state).__name__}. "
            f"Begin with learner.init()."
        )
    check_not_spent(who, state)
    if not isinstance(callbacks, Iterable):
        cure = f"Put it in one: [{callbacks!r}]."
        if isinstance(callbacks, (int, float)):
            cure = f"Pass hypers by their names: lr={callbacks!r}."
        raise TypeError(f"{who}: callbacks must be a list, got {callbacks!r}. {cure}")


def with_recorder(callbacks: Sequence[object], compile: bool = False) -> list[object]:
    """The callbacks that take part in a run, compiled or not, with a Recorder among them."""
    if not any(isinstance(callback, Recorder) for callback in callbacks):
        callbacks = [Recorder(), *callbacks]
    return taking_part(callbacks, compile)


def evaluate(
    who: str,
    learner: Learner,
    state: State,
    data: Iterable[Tree] | None,
    *collectors: Collector,
) -> State:
    """The state after the validate scope, run on behalf of `who`, on other data if given; what
    collectors have remembered is in it.
    """
    check_arguments(who, learner, state)
    if data is not None:
        check_loader(f"{who}: data", data)
        learner = replace(learner, data=replace(learner.data, valid=data))
    if learner.data.valid is None:
        raise ValueError(
            f"{who}: the learner has no validation data. Pass data=..., or DataLoaders(train, "
            f"valid)."
        )
    everyone = with_recorder([*learner.callbacks, *collectors])
    # With `done`, the machine would resume the run. n_epoch=0 tells callbacks such as ShortEpoch
    # that this is not part of one.
    start = state.forget(RECORDER).replace(n_epoch=0, done=())
    for collector in collectors:
        start = start.forget(collector.name)
    work = stages.Work()
    work.targetless.wanted = not collectors
    # Do not stop at a signal: a mean over half of the data would look like one over all of it.
    return Run(learner, start, VALIDATE, everyone, work).to_end(stop=lambda: False)


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
        # A trace that is closed early closes the brackets of the run at once.
        running.close()
