"""Ctrl-C and SIGTERM during a run: heard by a handler, acted upon between two events.

The rule. The run ends at the next event; or at once while a loader is at work, since it may hang,
and nothing is half done then. Its brackets close, so a Checkpoint writes the state of the latest
whole batch. Then `fit` raises what the signal stands for, KeyboardInterrupt for SIGINT and
SystemExit(143) for SIGTERM, with this state as its `state`: one Ctrl-C ends a script of several
fits. Where the caller wants to go on, `fit(..., stop="return")` returns the state instead. Fits
inside one another hear the same signal, and each ends like this, the innermost first.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

from loop.run.machine import Run
from loop.state import State

STOPS = ("raise", "return")
"""What `fit` can do once a signal has ended it."""


@dataclass
class Agreement:
    """A stop that several processes agree on: a callback lends one as a resource of the run.

    `listener` has heard what this process has got. The callback tells the other processes of it,
    and sets `number` at the same batch in all of them; only then the run ends. A signal that comes
    to one of them after the last such moment is not the run's, which ends alike in all: once it is
    over, whoever handled signals before gets it.
    """

    listener: "Listener | None" = None
    number: int | None = None

    @property
    def heard(self) -> int | None:
        """The signal that this process has got."""
        return None if self.listener is None else self.listener.heard


class Listener:
    """A handler that keeps the first SIGINT or SIGTERM; a second one interrupts at once."""

    def __init__(self) -> None:
        self.heard: int | None = None
        self.runs: list[Run] = []  # the innermost last
        self.process = os.getpid()  # a loader's processes inherit handlers
        self.raised: BaseException | None = None  # by the innermost fit, because of it
        self.agreement: Agreement | None = None  # of the innermost run
        self._before: dict[int, Any] = {}

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.heard is not None:
            raise _exit_by(number)
        self.heard = number
        # torch's handler of SIGCHLD raises an error, anywhere, when a loader's process is gone;
        # but that process may just have got the signal too.
        child = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        if callable(child):
            self._before[signal.SIGCHLD] = child
            signal.signal(signal.SIGCHLD, _quiet(child))
        # On several ranks the others would wait for this one, so the run goes on to the agreed end.
        # A loader's process, forked while `fetching` was true, leaves it to the main one.
        alone = self.runs and agreement_of(self.runs[-1]) is None
        if alone and self.runs[-1].fetching and os.getpid() == self.process:
            self.raised = _exit_by(number)
            raise self.raised

    def has_heard(self) -> bool:
        """Whether the run is to end."""
        self.agreement = agreement = agreement_of(self.runs[-1]) if self.runs else None
        if agreement is None:
            return self.heard is not None
        agreement.listener = self
        if agreement.number is None:
            return False
        self.heard = self.heard or agreement.number
        return True

    def listen(self) -> None:
        """Replace the handlers, except one that ignores the signal or was set outside of Python.

        The former is how nohup and shells say that a signal is not meant for this process; the
        latter is not known to Python, which could not put it back.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.getsignal(number)
            if before is not None and before != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self)

    def put_back(self) -> None:
        """Have the handlers as they were."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def agreement_of(run: Run) -> Agreement | None:
    """What a callback has lent to a run that several processes have together."""
    for one in run.state.resources.values():
        if isinstance(one, Agreement):
            return one
    return None


@contextmanager
def listening() -> Iterator[Listener]:
    """A listener: that of the fit around this one, if there is one.

    In another thread than the main one, Python cannot listen to signals, and nothing is heard.
    """
    if threading.current_thread() is not threading.main_thread():
        yield Listener()
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        outer = signal.getsignal(number)
        if isinstance(outer, Listener):
            yield outer
            return
    listener = Listener()
    listener.listen()
    try:
        yield listener
    finally:
        listener.put_back()


def run_to_end(run: Run, stop: str = "raise") -> State:
    """The last state of a run, or what the rule says if a signal has ended it.

    What fails between the signal and the next event is not raised: the loader's processes may have
    got the signal too.
    """
    with listening() as listener:
        listener.runs.append(run)
        try:
            state = run.to_end(listener.has_heard)
        except BaseException as error:
            # What the signal has made fail is its doing; all else is the run's own error, signal or
            # not.
            ended = error is run.failure or error is listener.raised
            # A step that had begun to overwrite the committed state has left none to return.
            if not ended or run.spent:
                raise
            state = run.committed.at_rest()
        finally:
            listener.runs.remove(run)
        number, agreement = listener.heard, listener.agreement
        if number is None:
            return state
        if agreement is None or agreement.number is not None:
            state = state.replace(stopped=signal.Signals(number).name)
            if stop == "return":
                return state
            listener.raised = _exit_by(number, state)
            raise listener.raised from None
    # The signal came when the ranks had already agreed on how the run ends: see Agreement.
    if not listener.runs:  # else the fit around this one has heard it, too
        signal.raise_signal(number)
    return state


def _exit_by(number: int, state: State | None = None) -> BaseException:
    """What ends a process that got this signal; the state of the run is on it, if it is known."""
    if number == signal.SIGINT:
        where = "" if state is None else f" after {state.train_iter} batches"
        error: BaseException = KeyboardInterrupt(
            f"fit was stopped by SIGINT{where}. The state is on this error: sys.last_value.state "
            f'where nobody has caught it. Pass stop="return" to get it instead.'
        )
    else:
        error = SystemExit(128 + number)
    error.state = state  # type: ignore[attr-defined]
    return error


def _quiet(handler: Callable[..., Any]) -> Callable[..., None]:
    """The handler of a signal, without its RuntimeError."""

    def handle(*details: object) -> None:
        with suppress(RuntimeError):
            handler(*details)

    return handle
