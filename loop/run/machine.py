"""The training loop: an interpreter of the drawing in events.py, which passes a state through
stages and callbacks.

It knows no callback. `Run.steps` is the machine; running it to the end is `fit`, one transition at
a time is `trace`.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import FrozenInstanceError
from typing import Any, TypeAlias

from loop.callback import COMMITTED, OVERWRITTEN, in_order, name_of
from loop.learner import Learner
from loop.run import stages
from loop.run.brackets import opened
from loop.run.chance import global_generators_kept
from loop.run.events import (
    EVENTS,
    FIT,
    SCOPES,
    STAGES,
    TRAIN,
    VALIDATE,
    Event,
    Scope,
    Stage,
)
from loop.run.passes import Feed
from loop.run.returned import accepted
from loop.run.running import LentModels, running
from loop.run.scopes import BORDERS, Change
from loop.run.shapes import shapes as shapes_in
from loop.run.signals import SIGNALS, Cancel, SignalError
from loop.state import State

Transitions: TypeAlias = Generator[tuple[str, State], None, None]
Steps: TypeAlias = Generator[tuple[str, State], None, State]
Method: TypeAlias = tuple[str, Callable[[State], Any]]


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
        callbacks: Sequence[object] | None = None,
        work: stages.Work | None = None,
    ) -> None:
        if callbacks is None:
            callbacks = learner.callbacks
        ordered = in_order(callbacks)
        self.learner, self.root = learner, root
        self.handlers = {event: _methods(ordered, event) for event in EVENTS}
        self.brackets = {name: _methods(ordered, f"around_{name}") for name in (*SCOPES, *STAGES)}
        self.observers = _methods(ordered, COMMITTED)
        self.forgetters = _methods(ordered, OVERWRITTEN)
        self.work = stages.Work() if work is None else work
        self.open: list[str] = []  # the scopes that can be cancelled here
        self.path: list[int] = []  # of every scope that can be resumed: how much of it is done
        self.ahead = list(state.done)  # the path to go on from, as far as it is not yet entered
        self.state = self.committed = state.at_rest().replace(
            learner=learner, donated=state.donated
        )
        self.spent = False  # whether a step has overwritten the committed state
        self.fetching = False  # whether a loader is at work, which may never come back
        # bool() is False: until `to_end` says otherwise, nothing asks the run to stop.
        self.stop: Callable[[], bool] = bool  # says whether to end at the next event
        self.failure: Exception | None = None  # what failed when it had said so
        self.feed = Feed()
        self.lent = LentModels()
        # Last, since it reads the tables and the state; a compiled batch takes some handlers over.
        self.work.join(self)

    def steps(self) -> Steps:
        """The run itself: yields (event, state) after every event, returns the last state.

        Raises what a callback, the model, the loss or a loader raises, with a note that says where,
        and `error.state`, the latest committed state; None if a step has overwritten that.
        """
        try:
            with running(self.learner.model), global_generators_kept(stages.device_of(self.state)):
                self._enter(BORDERS[self.root.name].enter)
                yield from self._scope(self.root)
        except Exception as error:
            if self.spent:
                error.add_note(_NO_STATE)
            state = None if self.spent else self.committed.at_rest()
            # KeyboardInterrupt and SystemExit, which do not come here, get theirs in interrupt.py.
            error.state = state  # type: ignore[attr-defined]
            raise
        finally:
            self.lent.put_back()
            self.feed.close()
            self.work.close()
        # The end of a run is in no run: it can be trained further, and not resumed.
        return self.state.at_rest().replace(done=(), frozen=(), begun_with={})

    def to_end(self, stop: Callable[[], bool]) -> State:
        """The last state; or the committed one where `stop()` said so between two events, with
        every bracket closed.

        A batch whose step has overwritten the committed state is done to its end first.
        """
        steps, self.stop = self.steps(), stop
        try:
            while True:
                next(steps)
                if stop() and not self.spent:
                    steps.close()
                    return self.committed.at_rest()
        except StopIteration as end:
            result: State = end.value
            return result

    def _scope(self, scope: Scope) -> Transitions:
        """A scope between its borders. Whatever way it ends, what it lent is taken back."""
        border, over, depth = BORDERS[scope.name], False, len(self.open)
        learner, resources = self.state.learner, self.state.resources
        model = None if learner is None else learner.model

        def left(state: State) -> State:
            if state.learner is not learner:
                self.lent.put_back(model)
            if state.learner is not learner or state.resources is not resources:
                state = state.replace(learner=learner, resources=resources)
            return border.left(state)

        try:
            with self.brackets_of(scope.name, lend=True):
                yield from self._inside(scope)
                # Before after_x, so that its handlers find the batch, or the epoch, counted.
                self.state, over = border.over(self.state), True
                if not scope.whole:
                    self.work.over(scope.name)
                yield self._event(scope.after)
        except Cancel as signal:
            # It is for a scope further out, which goes on from the state that it carries.
            # A scope that had ended when the signal came counts as any other; one that was cut
            # short says what of it counts.
            state = self.state if signal.state is None else signal.state
            if not over:
                state = border.broken(state)
            signal.state = left(state)
            raise
        finally:
            # Scopes that are done as a whole have no entry in the path and are innermost, so this
            # scope's entry is number `depth`.
            del self.path[depth:]
            if scope.whole:
                self.work.leave()
        self.state = left(self.state)

    def _inside(self, scope: Scope) -> Transitions:
        """before_x and the parts; if the signal of the scope's name ends them, after_cancel_x."""
        depth = len(self.open)
        self.open.append(scope.name)
        try:
            if self.ahead:  # the run is resumed in here, so the state has passed before_x
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
                else:
                    yield from self._inner(scope, index, part)
        except Cancel as signal:
            if signal.scope != scope.name or signal.state is None:
                raise
            del self.open[depth:]  # from here on, only the scopes around can be cancelled
            self.state = signal.state
            yield self._event(scope.cancelled)
        finally:
            del self.open[depth:]

    def _inner(self, scope: Scope, index: int, part: Scope) -> Transitions:
        """A scope that is part of another: as often as its row says, or not at all.

        The path counts what is done of `scope`: times of a repeated part, else parts.
        """
        border = BORDERS[part.name]
        if part.repeat and border.each is not None:
            for change in self._each(border.each):
                self._enter(change)
                yield from self._scope(part)
                self.path[-1] += 1
                self._commit()
        elif not scope.whole and index < self.path[-1]:
            return  # done before the run was resumed
        elif border.when(self.state):
            self._enter(border.enter)
            yield from self._scope(part)
            if not scope.whole:
                self.path[-1] = index + 1
                self._commit()
        else:
            # The run was stopped within a validation for which there is no data any more.
            self.ahead.clear()

    def _each(self, each: Callable[[State, int, Feed], Iterator[Change]]) -> Iterator[Change]:
        """What changes on entering a repeated scope, once for each time; an error in the loader
        says so.
        """
        # Step by step, not in a for loop: `fetching` must be true while the loader is at work, and
        # only then.
        changes = each(self.state, self.path[-1], self.feed)
        while True:
            self.fetching = True
            try:
                change = next(changes)
            except StopIteration:
                return
            except Exception as error:
                self._explain(error, "while fetching data", self.path[-1])
                raise
            finally:
                self.fetching = False
            yield change

    def _enter(self, change: Change) -> None:
        """The fields that change on entering a scope; on entering one again, it is where it was."""
        now = self.state
        self.state = change(now)
        if self.ahead:
            self.state = self.state.replace(iter=now.iter, pct_train=now.pct_train)

    def _event(self, event: str) -> tuple[str, State]:
        """Pass the state through the callbacks."""
        handlers = self.handlers[event]
        # Without handlers `done` may stay: where it is not empty, nothing has been learned or
        # counted since the commit.
        if handlers:
            self.state = self.state.replace(event=event, done=())
            for name, handler in handlers:
                self._handle(name, handler, event)
        return event, self.state

    def _handle(self, name: str, handler: Callable[[State], Any], event: str) -> None:
        try:
            result = handler(self.state)
            if result is None:
                return
            if not isinstance(result, State):
                raise TypeError(
                    f"callback {name!r} returned {type(result).__name__} from {event}: expected a "
                    f"State or None. Return state.replace(...), or nothing for no change."
                )
            said = f"callback {name!r} returned from {event}"
            self.state = self._accepted(said, result)
        # The run is a generator, which a StopIteration would end without a word.
        except StopIteration as error:
            raise RuntimeError(f"callback {name!r} raised StopIteration in {event}.") from error
        except Exception as error:
            self._explain(error, f"by callback {name!r} in {event}")
            raise

    def _stage(self, stage: Stage) -> None:
        with self.brackets_of(stage.name):
            try:
                # Said before the step, since it may fail half way.
                if self.state.donated and stage.name == "update":
                    self._spend()
                self.state = getattr(self.work, stage.name)(self.state)
            except Exception as error:
                self._explain(error, f"in [{stage.name}]", shapes=True)
                raise

    def _spend(self) -> None:
        """From here to the next commit, there is no state to go on from."""
        self.spent = True
        for _, forget in self.forgetters:
            forget(self.state)

    def handlers_of(self, place: str) -> Sequence[Method]:
        """Who handles an event, or has a bracket ("around_...")."""
        if place in self.handlers:
            return self.handlers[place]
        return self.brackets[place.removeprefix("around_")]

    def brackets_of(self, name: str, lend: bool = False) -> AbstractContextManager[object]:
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
        # Who goes on from a state has the learner of the command: not one that a callback has put
        # in its place for a while.
        resumable = self.root is FIT and self.state.learner is self.learner
        done = tuple(self.path) if resumable else ()
        self.state = self.committed = self.state.replace(done=done)
        self.spent = False
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
        """What becomes of an exception: an error gets a note, a signal the state to go on from."""
        if isinstance(error, Cancel):
            self._route(error, where)
            return
        # What fails once the run is to stop is not worth raising: it is over anyway.
        self.failure = error if spare and self.stop() else None
        known = f"; {shapes_in(self.state)}" if shapes else ""
        error.add_note(f"loop: raised {where}, {self._where(batch)}{known}.")
        if isinstance(error, FrozenInstanceError):
            error.add_note(_FROZEN)

    def _route(self, signal: Cancel, where: str) -> None:
        """Check that a signal can be caught, and have it carry a state of this run."""
        if signal.scope not in self.open:
            legal = " or ".join(SIGNALS[scope].__name__ for scope in self.open) or "no signal"
            raise SignalError(
                f"{type(signal).__name__} was raised {where}, where nothing can catch it: "
                f"the open scopes are {', '.join(self.open) or 'none'}. Raise {legal} here."
            ) from signal
        carried = signal.state
        if carried is None:
            signal.state = self.state
        else:
            said = f"{type(signal).__name__}, raised {where}, carries"
            signal.state = self._accepted(said, carried)

    def _accepted(self, said: str, state: State) -> State:
        """A state that a callback has given. It may be with another learner."""
        state = accepted(said, state, self.state)
        if state.learner is not self.state.learner:
            model = stages.learner_of(state).model
            if model is not self.learner.model:
                self.lent.note(model)
        return state

    def _where(self, batch: int | None = None) -> str:
        """Where the run is, for a note."""
        batch = self.state.iter if batch is None else batch
        if self.root is not FIT:
            return f"batch {batch} of a validation"
        epoch = f"epoch {self.state.epoch}"
        for scope, phase in ((TRAIN, "training"), (VALIDATE, "validation")):
            if scope.name in self.open:
                return f"{phase} batch {batch} of {epoch}"
        return epoch


_NO_BRACKETS = nullcontext()

_FROZEN = (
    "loop: states and callbacks are not written to. Return state.replace(name=value); what a "
    "callback remembers is state.remember(self.name, value)."
)
_NO_STATE = (
    "loop: there is no error.state: fit(donate=True) had begun to overwrite it. Go on from the "
    "last checkpoint: fit(..., resume=folder)."
)


def _methods(callbacks: Iterable[object], place: str) -> tuple[Method, ...]:
    found: list[Method] = []
    for callback in callbacks:
        method = getattr(callback, place, None)
        if callable(method):
            found.append((name_of(callback), method))
    return tuple(found)
