"""The training loop: an interpreter of the drawing in events.py, which passes a state through
stages and callbacks.

It knows no callback. `Run.steps` is the machine; running it to the end is `fit`, one transition at
a time is `trace`.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

from loop.callback import COMMITTED, in_order, name_of
from loop.learner import Learner
from loop.run import stages
from loop.run.brackets import opened
from loop.run.chance import global_generators_kept
from loop.run.events import (
    EPOCH,
    EVENTS,
    FIT,
    SCOPES,
    STAGES,
    STEP,
    TRAIN,
    TRAIN_BATCH,
    VALIDATE,
    Event,
    Scope,
    Stage,
)
from loop.run.signals import SIGNALS, Cancel, SignalError
from loop.state import State

Transitions: TypeAlias = Generator[tuple[str, State], None, None]
Steps: TypeAlias = Generator[tuple[str, State], None, State]
Method: TypeAlias = tuple[str, Callable[[State], Any]]
Entry: TypeAlias = Callable[[State], State]


class Run:
    """One run of a scope: its tables, and where it is.

    The state at hand is `state`. `committed` is the latest from which the run can go on: nothing of
    a batch is in it. If the state given is such a one (`done` says where it is), the run goes on
    from there: the scopes that were open are entered again without their before_x, which the state
    has passed already.
    """

    def __init__(
        self,
        learner: Learner,
        state: State,
        root: Scope = FIT,
        callbacks: Sequence[Any] | None = None,
        work: stages.Work | None = None,
    ) -> None:
        ordered = in_order(learner.callbacks if callbacks is None else callbacks)
        self.learner, self.root = learner, root
        self.handlers = {event: _methods(ordered, event) for event in EVENTS}
        self.brackets = {name: _methods(ordered, f"around_{name}") for name in (*SCOPES, *STAGES)}
        self.observers = _methods(ordered, COMMITTED)
        self.work = stages.Work() if work is None else work
        self.open: list[str] = []  # the scopes that can be cancelled here
        self.path: list[int] = []  # of every scope that can be resumed: how much of it is done
        self.ahead = list(
            state.done
        )  # the path to go on from, as far as it has not been entered yet
        self.state = self.committed = state.at_rest().replace(learner=learner)
        self.stop: Callable[[], bool] = bool  # says whether to end at the next event
        self.failure: Exception | None = None  # what failed when it had said so
        self.work.join(self)

    def steps(self) -> Steps:
        """The run itself: yields (event, state) after every event, returns the last state.

        Raises what a callback, the model, the loss or a loader raises, with a note that says where,
        and `error.state`, the latest committed state.
        """
        try:
            with global_generators_kept(stages.device_of(self.state)), stages.mode_kept(self.state):
                self._enter(stages.ENTER.get(self.root.name, _unchanged))
                yield from self._scope(self.root)
        except Exception as error:
            error.state = self.committed.at_rest()  # type: ignore[attr-defined]
            raise
        return self.state.at_rest().replace(done=(), frozen=(), begun_with={})

    def to_end(self, stop: Callable[[], bool]) -> State:
        """The last state; or the committed one where `stop()` said so between two events, with
        every bracket closed.
        """
        running, self.stop = self.steps(), stop
        try:
            while True:
                next(running)
                if stop():
                    running.close()
                    return self.committed.at_rest()
        except StopIteration as end:
            result: State = end.value
            return result

    def _scope(self, scope: Scope) -> Transitions:
        """One bracket for every scope: before; the parts; the signal of the scope's name caught;
        after.

        Whatever way it ends, what it lent is taken back.
        """
        fixed, lent, depth = self.state.learner, self.state.resources, len(self.open)
        try:
            with self.brackets_of(scope.name, lend=True):
                self.open.append(scope.name)
                try:
                    if self.ahead:
                        self.path.append(self.ahead.pop(0))
                    else:
                        yield self._event(scope.before)
                        if not scope.whole:
                            self.path.append(0)
                            self._commit()
                    for index, part in enumerate(scope.parts):
                        if isinstance(part, Stage):
                            self._stage(part)
                        elif isinstance(part, Event):
                            yield self._event(part.name)
                        elif part.name in REPEATED:
                            for entry in self._each(part):
                                self._enter(entry)
                                yield from self._scope(part)
                                self.path[-1] += 1
                                self._commit()
                        elif self._begins(scope, index, part):
                            yield from self._scope(part)
                            if not scope.whole:
                                self.path[-1] = index + 1
                                self._commit()
                except Cancel as signal:
                    if signal.scope != scope.name or signal.state is None:
                        raise
                    del self.open[depth:]
                    self.state = signal.state
                    yield self._event(scope.cancelled)
                finally:
                    del self.open[depth:]
                self._enter(stages.LEAVE.get(scope.name, _unchanged))
                yield self._event(scope.after)
        except Cancel as signal:
            signal.state = _left(
                scope, self.state if signal.state is None else signal.state, fixed, lent
            )
            raise
        finally:
            del self.path[depth:]
        self.state = _left(scope, self.state, fixed, lent)

    def handlers_of(self, place: str) -> Sequence[Method]:
        """Who handles an event, or has a bracket ("around_...")."""
        return (
            self.handlers[place]
            if place in self.handlers
            else self.brackets[place.removeprefix("around_")]
        )

    def _begins(self, scope: Scope, index: int, part: Scope) -> bool:
        """Whether this part of a scope is to be run, and if so, what changes on entering it."""
        if not scope.whole and index < self.path[-1]:
            return False
        if not WHEN.get(part.name, _always)(self.state):
            self.ahead.clear()
            return False
        self._enter(stages.ENTER.get(part.name, _unchanged))
        return True

    def _each(self, scope: Scope) -> Iterator[Entry]:
        """What changes on entering a repeated scope, once for each time; an error in the loader
        says so.
        """
        entries = REPEATED[scope.name](self.state, self.path[-1])
        while True:
            try:
                entry = next(entries)
            except StopIteration:
                return
            except Exception as error:
                self._explain(error, "while fetching data", self.path[-1])
                raise
            yield entry

    def _enter(self, entry: Entry) -> None:
        """The fields that change on entering or leaving a scope; on entering one again, it is where
        it was.
        """
        now = self.state
        self.state = entry(now)
        if self.ahead:
            self.state = self.state.replace(iter=now.iter, pct_train=now.pct_train)

    def _event(self, event: str) -> tuple[str, State]:
        """Pass the state through the callbacks."""
        handlers = self.handlers[event]
        if handlers:
            self.state = self.state.replace(event=event, done=())
            for name, handler in handlers:
                self._handle(name, handler, event)
        return event, self.state

    def _handle(self, name: str, handler: Callable[[State], Any], event: str) -> None:
        try:
            result = handler(self.state)
        except StopIteration as error:
            raise RuntimeError(f"callback {name!r} raised StopIteration in {event}.") from error
        except Exception as error:
            self._explain(error, f"by callback {name!r} in {event}")
            raise
        if result is None:
            return
        if not isinstance(result, State):
            raise TypeError(
                f"callback {name!r} returned {type(result).__name__} from {event}: expected a "
                f"State or None. "
                f"Return state.replace(...), or nothing for no change."
            )
        self.state = _in_run(result, self.state)

    def _stage(self, stage: Stage) -> None:
        with self.brackets_of(stage.name):
            try:
                self.state = getattr(self.work, stage.name)(self.state)
            except Exception as error:
                self._explain(error, f"in [{stage.name}]", shapes=True)
                raise

    def brackets_of(self, name: str, lend: bool = False) -> AbstractContextManager[Any]:
        """The brackets that callbacks have around this; they close in reverse order, on every way
        out.
        """
        if not self.brackets[name]:
            return _NO_BRACKETS
        stack, self.state = opened(
            self.brackets[name], f"around_{name}", self.state, self._explain, lend
        )
        return stack

    def _commit(self) -> None:
        """From here the run can be resumed, if it runs with its own learner."""
        resumable = self.root is FIT and self.state.learner is self.learner
        self.state = self.committed = self.state.replace(done=tuple(self.path) if resumable else ())
        if self.observers and resumable:
            for name, observe in self.observers:
                try:
                    observe(self.committed)
                except Exception as error:
                    self._explain(error, f"by callback {name!r} in {COMMITTED}")
                    raise

    def _explain(
        self,
        error: Exception,
        where: str,
        batch: int | None = None,
        shapes: bool = False,
        spare: bool = True,
    ) -> None:
        """Give an error a note on where it happened, and a signal the state to go on from.

        Raises SignalError for a signal that nothing would catch.
        """
        if not isinstance(error, Cancel):
            self.failure = error if spare and self.stop() else None
            known = f"; {stages.shapes(self.state)}" if shapes else ""
            error.add_note(f"loop: raised {where}, {self._where(batch)}{known}.")
        elif error.scope in self.open:
            error.state = self.state if error.state is None else _in_run(error.state, self.state)
        else:
            legal = " or ".join(SIGNALS[scope].__name__ for scope in self.open) or "no signal"
            raise SignalError(
                f"{type(error).__name__} was raised {where}, where nothing can catch it: "
                f"the open scopes are {', '.join(self.open) or 'none'}. Raise {legal} here."
            ) from error

    def _where(self, batch: int | None = None) -> str:
        """Where the run is, for a note."""
        batch = self.state.iter if batch is None else batch
        if self.root is not FIT:
            return f"batch {batch} of a validation"
        phases = {TRAIN.name: "training", VALIDATE.name: "validation"}
        phase = next((phases[name] for name in phases if name in self.open), None)
        return (
            f"epoch {self.state.epoch}"
            if phase is None
            else f"{phase} batch {batch} of epoch {self.state.epoch}"
        )


REPEATED: dict[str, Callable[[State, int], Iterator[Entry]]] = {
    EPOCH.name: stages.epochs,
    TRAIN_BATCH.name: stages.batches,
}

WHEN: dict[str, Callable[[State], bool]] = {
    VALIDATE.name: stages.has_validation_data,
    STEP.name: stages.has_gradients,
}

_NO_BRACKETS = nullcontext()


def _methods(callbacks: Iterable[Any], place: str) -> tuple[Method, ...]:
    found = ((name_of(callback), getattr(callback, place, None)) for callback in callbacks)
    return tuple((name, method) for name, method in found if callable(method))


def _left(scope: Scope, state: State, learner: Learner | None, resources: Any) -> State:
    """The state after a scope, whatever way it ended."""
    if state.learner is not learner or state.resources is not resources:
        state = state.replace(learner=learner, resources=resources)
    return stages.LEFT.get(scope.name, _unchanged)(state)


def _in_run(result: State, state: State) -> State:
    """A state that a callback wants next, as part of this run: where the run is, is not for
    callbacks to say.
    """
    if result.learner is not None and all(
        getattr(result, name) == getattr(state, name) for name in _PROGRESS
    ):
        return result
    progress = {name: getattr(state, name) for name in _PROGRESS}
    learner = state.learner if result.learner is None else result.learner
    return result.replace(learner=learner, resources=state.resources, **progress)


_PROGRESS = ("epoch", "n_epoch", "iter", "n_iter", "pct_train", "training")


def _unchanged(state: State) -> State:
    return state


def _always(state: State) -> bool:
    return True
