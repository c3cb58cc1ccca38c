"""The training loop: an interpreter of the drawing in events.py, which passes a state through stages and callbacks.

It knows no callback. `steps` is the machine; running it to the end is `fit`, one transition at a time is `trace`.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import count
from typing import Any, TypeAlias

from loop import stages
from loop.callback import in_order, name_of
from loop.chance import global_generators_kept
from loop.events import EPOCH, EVENTS, FIT, SCOPES, STEP, TRAIN, TRAIN_BATCH, VALIDATE, Event, Scope, Stage
from loop.learner import Learner
from loop.signals import SIGNALS, Cancel, SignalError
from loop.state import State

Steps: TypeAlias = Generator[tuple[str, State], None, State]
Handler: TypeAlias = Callable[[State], State | None]


def steps(learner: Learner, state: State, root: Scope = FIT, callbacks: Sequence[Any] | None = None) -> Steps:
    """Run a scope from this state: yields (event, state) after every event, returns the last state.

    Handlers and brackets are looked up once, here. Raises what a callback, the model, the loss or a loader raises, with
    a note that says where, and `error.state`, the state after the last event that went well.
    """
    run = Run(learner.callbacks if callbacks is None else callbacks)
    return run.steps(root, state.at_rest().replace(learner=learner))


class Run:
    """The tables of one run, and where it is."""

    def __init__(self, callbacks: Sequence[Any]) -> None:
        ordered = in_order(callbacks)
        self.handlers = {event: _methods(ordered, event) for event in EVENTS}
        self.brackets = {scope: _methods(ordered, f"around_{scope}") for scope in SCOPES}
        self.work = stages.Work()
        self.open: list[str] = []  # the scopes that can be cancelled here
        self.last: State | None = None

    def steps(self, root: Scope, state: State) -> Steps:
        """The run itself."""
        self.last = state
        try:
            with global_generators_kept(stages.device_of(state)), stages.mode_kept(state):
                enter = stages.ENTER.get(root.name, _unchanged)
                state = yield from self._scope(root, enter(state))
        except Exception as error:
            _attach(error, self.last)
            raise
        return state.at_rest()

    def _scope(self, scope: Scope, state: State) -> Steps:
        """One bracket for every scope; whatever way it ends, what it lent is taken back."""
        fixed, lent, depth = state.learner, state.resources, len(self.open)

        def left(state: State) -> State:
            if state.learner is not fixed or state.resources is not lent:
                state = state.replace(learner=fixed, resources=lent)
            return stages.LEFT.get(scope.name, _unchanged)(state)

        try:
            with ExitStack() as stack:
                state = yield from self._inside(scope, self._open(scope, state, stack), depth)
        except Cancel as signal:
            signal.state = left(signal.state or state)
            raise
        finally:
            del self.open[depth:]
        return left(state)

    def _inside(self, scope: Scope, state: State, depth: int) -> Steps:
        """Before; the parts; the signal of the scope's name caught; after."""
        self.open.append(scope.name)
        try:
            state = yield from self._event(scope.before, state)
            state = yield from self._parts(scope, state)
        except Cancel as signal:
            if signal.scope != scope.name or signal.state is None:
                raise
            del self.open[depth:]
            state = yield from self._event(scope.cancelled, signal.state)
        del self.open[depth:]
        state = stages.LEAVE.get(scope.name, _unchanged)(state)
        return (yield from self._event(scope.after, state))

    def _parts(self, scope: Scope, state: State) -> Steps:
        for part in scope.parts:
            if isinstance(part, Stage):
                state = self._stage(part, state)
            elif isinstance(part, Event):
                state = yield from self._event(part.name, state)
            elif part.name in REPEATED:
                for enter in self._each(part, state):
                    state = yield from self._scope(part, enter(state))
            elif WHEN.get(part.name, _always)(state):
                enter = stages.ENTER.get(part.name, _unchanged)
                state = yield from self._scope(part, enter(state))
        return state

    def _each(self, scope: Scope, state: State) -> Iterator[Callable[[State], State]]:
        """What changes on entering a repeated scope, once for each time; an error in the loader says so."""
        entries = REPEATED[scope.name](state)
        for index in count():
            try:
                enter = next(entries)
            except StopIteration:
                return
            except Cancel as signal:
                self._check(signal, state if self.last is None else self.last, "the data loader raised {}")
                raise
            except Exception as error:
                error.add_note(f"loop: raised while fetching data, {self._where(state, index)}.")
                raise
            yield enter

    def _event(self, event: str, state: State) -> Steps:
        handlers = self.handlers[event]
        if handlers:
            state = state.replace(event=event)
            for name, handler in handlers:
                state = self._handle(name, handler, event, state)
        self.last = state
        yield event, state
        return state

    def _handle(self, name: str, handler: Handler, event: str, state: State) -> State:
        try:
            result = handler(state)
        except Cancel as signal:
            self._check(signal, state, f"callback {name!r} raised {{}} in {event}")
            raise
        except StopIteration as error:
            raise RuntimeError(f"callback {name!r} raised StopIteration in {event}.") from error
        except Exception as error:
            error.add_note(f"loop: raised by callback {name!r} in {event}, {self._where(state)}.")
            raise
        if result is None:
            return state
        if not isinstance(result, State):
            raise TypeError(
                f"callback {name!r} returned {type(result).__name__} from {event}: expected a State or None. "
                f"Return state.replace(...), or nothing for no change."
            )
        return _in_run(result, state)

    def _where(self, state: State, batch: int | None = None) -> str:
        """Where the run is, for a note."""
        batch = state.iter if batch is None else batch
        if FIT.name not in self.open:
            return f"batch {batch} of a validation"
        phases = {TRAIN.name: "training", VALIDATE.name: "validation"}
        phase = next((phases[name] for name in phases if name in self.open), None)
        return f"epoch {state.epoch}" if phase is None else f"{phase} batch {batch} of epoch {state.epoch}"

    def _check(self, signal: Cancel, state: State, what: str) -> None:
        """Give a signal a state to go on from. Raises SignalError if there is nothing that would catch it."""
        if signal.scope in self.open:
            signal.state = state if signal.state is None else _in_run(signal.state, state)
            return
        legal = " or ".join(SIGNALS[scope].__name__ for scope in self.open) or "no signal"
        raise SignalError(
            f"{what.format(type(signal).__name__)}, where nothing can catch it: "
            f"the open scopes are {', '.join(self.open) or 'none'}. Raise {legal} here."
        ) from signal

    def _stage(self, stage: Stage, state: State) -> State:
        try:
            state = getattr(self.work, stage.name)(state)
        except Cancel as signal:
            self._check(signal, state, f"[{stage.name}] raised {{}}")
            raise
        except Exception as error:
            error.add_note(f"loop: raised in [{stage.name}], {self._where(state)}; {stages.shapes(state)}.")
            raise
        return state

    def _open(self, scope: Scope, state: State, stack: ExitStack) -> State:
        """Enter the brackets that callbacks have around this scope; they close in reverse order, on every way out."""
        for name, around in self.brackets[scope.name]:
            try:
                resource = stack.enter_context(around(state))
            except Cancel as signal:
                self._check(signal, state, f"callback {name!r} raised {{}} in around_{scope.name}")
                raise
            except Exception as error:
                error.add_note(f"loop: raised by callback {name!r} in around_{scope.name}, {self._where(state)}.")
                raise
            state = state.replace(resources={**state.resources, name: resource})
        return state


REPEATED: dict[str, Callable[[State], Iterator[Callable[[State], State]]]] = {
    EPOCH.name: stages.epochs,
    TRAIN_BATCH.name: stages.batches,
}

WHEN: dict[str, Callable[[State], bool]] = {
    VALIDATE.name: stages.has_validation_data,
    STEP.name: stages.has_gradients,
}


def drain(running: Steps, stop: Callable[[], bool]) -> State:
    """Run to the end, or until `stop()` says so between two events; then every bracket is closed first."""
    state: State | None = None
    try:
        while True:
            _, state = next(running)
            if stop():
                running.close()
                return state.at_rest()
    except StopIteration as end:
        result: State = end.value
        return result


def _methods(callbacks: Iterable[Any], place: str) -> tuple[tuple[str, Any], ...]:
    found = ((name_of(callback), getattr(callback, place, None)) for callback in callbacks)
    return tuple((name, method) for name, method in found if callable(method))


def _attach(error: Exception, state: State | None) -> None:
    if state is not None:
        error.state = state.at_rest()  # type: ignore[attr-defined]


def _in_run(result: State, state: State) -> State:
    """A state that a callback wants next, as part of this run: where the run is, is not for callbacks to say."""
    if result.learner is not None and all(getattr(result, name) == getattr(state, name) for name in _PROGRESS):
        return result
    progress = {name: getattr(state, name) for name in _PROGRESS}
    learner = state.learner if result.learner is None else result.learner
    return result.replace(learner=learner, resources=state.resources, **progress)


_PROGRESS = ("epoch", "n_epoch", "iter", "n_iter", "pct_train", "training")


def _unchanged(state: State) -> State:
    return state


def _always(state: State) -> bool:
    return True
