"""The training loop: an interpreter of the drawing in events.py, which passes a state through stages and callbacks.

It knows no callback. `steps` is the machine; running it to the end is `fit`, one transition at a time is `trace`.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, TypeAlias

from loop import stages
from loop.callback import in_order, name_of
from loop.chance import global_generators_kept
from loop.events import EPOCH, EVENTS, FIT, SCOPES, STEP, TRAIN_BATCH, VALIDATE, Event, Scope, Stage
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
    return run.steps(root, state.replace(learner=learner))


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
        return state.without_batch().replace(learner=None, event="", training=False)

    def _scope(self, scope: Scope, state: State) -> Steps:
        """One bracket for every scope: before; the parts; the signal of its name caught; after; everything closed."""
        fixed, lent, depth = state.learner, state.resources, len(self.open)
        with ExitStack() as stack:
            state = self._open(scope, state, stack)
            self.open.append(scope.name)
            try:
                state = yield from self._event(scope.before, state)
                state = yield from self._parts(scope, state)
            except Cancel as signal:
                if signal.scope != scope.name or signal.state is None:
                    raise
                del self.open[depth:]
                state = signal.state if scope.name in _INSIDE_BATCH else signal.state.without_batch()
                state = yield from self._event(scope.cancelled, state)
            finally:
                del self.open[depth:]
            state = stages.LEAVE.get(scope.name, _unchanged)(state)
            state = yield from self._event(scope.after, state)
        if state.learner is not fixed or state.resources is not lent:
            state = state.replace(learner=fixed, resources=lent)
        return state.without_batch() if scope.name == "batch" else state

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
        while True:
            try:
                enter = next(entries)
            except StopIteration:
                return
            except Cancel as signal:
                raise self._checked(signal, self.last or state, "the data loader raised {}") from signal.__cause__
            except Exception as error:
                error.add_note(f"loop: raised while fetching data, {_where(self.last or state)}.")
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
            raise self._checked(signal, state, f"callback {name!r} raised {{}} in {event}") from signal.__cause__
        except StopIteration as error:
            raise RuntimeError(f"callback {name!r} raised StopIteration in {event}.") from error
        except Exception as error:
            error.add_note(f"loop: raised by callback {name!r} in {event}, {_where(state)}.")
            raise
        if result is None:
            return state
        if not isinstance(result, State):
            raise TypeError(
                f"callback {name!r} returned {type(result).__name__} from {event}: expected a State or None. "
                f"Return state.replace(...), or nothing for no change."
            )
        return _in_run(result, state)

    def _checked(self, signal: Cancel, state: State, what: str) -> Exception:
        """The signal, with a state to go on from; or an error, if there is nothing that would catch it."""
        if signal.scope in self.open:
            signal.state = _in_run(signal.state or state, state)
            return signal
        legal = " or ".join(SIGNALS[scope].__name__ for scope in self.open) or "no signal"
        return SignalError(
            f"{what.format(type(signal).__name__)}, where nothing can catch it: "
            f"the open scopes are {', '.join(self.open) or 'none'}. Raise {legal} here."
        )

    def _stage(self, stage: Stage, state: State) -> State:
        try:
            state = getattr(self.work, stage.name)(state)
        except Cancel as signal:
            raise self._checked(signal, state, f"[{stage.name}] raised {{}}") from signal.__cause__
        except Exception as error:
            error.add_note(f"loop: raised in [{stage.name}], {_where(state)}; {stages.shapes(state)}.")
            raise
        return state

    def _open(self, scope: Scope, state: State, stack: ExitStack) -> State:
        """Enter the brackets that callbacks have around this scope; they close in reverse order, on every way out."""
        for name, around in self.brackets[scope.name]:
            try:
                resource = stack.enter_context(around(state))
            except Exception as error:
                error.add_note(f"loop: raised by callback {name!r} in around_{scope.name}, {_where(state)}.")
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

_INSIDE_BATCH = ("batch", "backward", "step")


def drain(running: Steps, stop: Callable[[], bool]) -> State:
    """Run to the end, or until `stop()` says so between two events; then every bracket is closed first."""
    state: State | None = None
    try:
        while True:
            _, state = next(running)
            if stop():
                running.close()
                return state.without_batch().replace(learner=None, resources={}, event="", training=False)
    except StopIteration as end:
        result: State = end.value
        return result


def _methods(callbacks: Iterable[Any], place: str) -> tuple[tuple[str, Any], ...]:
    found = ((name_of(callback), getattr(callback, place, None)) for callback in callbacks)
    return tuple((name, method) for name, method in found if callable(method))


def _where(state: State) -> str:
    if state.n_epoch == 0:
        return f"batch {state.iter} of a validation"
    return f"{'training' if state.training else 'validation'} batch {state.iter} of epoch {state.epoch}"


def _attach(error: Exception, state: State | None) -> None:
    if state is not None:
        error.state = state.without_batch().replace(learner=None, resources={}, event="")  # type: ignore[attr-defined]


def _in_run(result: State, state: State) -> State:
    """A state from outside the run (one kept from before, say) becomes part of it."""
    if result.learner is not None:
        return result
    return result.replace(learner=state.learner, resources=state.resources, training=state.training)


def _unchanged(state: State) -> State:
    return state


def _always(state: State) -> bool:
    return True
