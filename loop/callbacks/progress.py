"""Show how a run is doing: a bar and a table on a terminal and in a notebook, plain lines
elsewhere.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, TextIO

from functional_sgd.notebook import notebook
from loop.callback import Callback, Order
from loop.callbacks.parts.displays import Display, lines, live_table
from loop.callbacks.parts.ending import ENDED
from loop.callbacks.recorder import Recorder, recorded
from loop.history import number_text
from loop.state import State


@dataclass
class Shown:
    """What is open during a run: the display, whether a phase has its bar, and the clock."""

    display: Display
    begun: bool = False
    started: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True)
class Progress(Callback):
    """A row for every epoch, under a header; and, on a terminal or in a notebook, a bar with the
    smooth loss. A notebook has both in one output, which changes. In a run that counts steps, a row
    also says after which batch it was measured. A line under the table says who has ended the run
    early (TerminateOnNaN, EarlyStopping), or that a run that is resumed was complete already.

    `every` is how many batches pass between two looks at the loss (each waits for the device).
    Times are wall-clock seconds, shown and never kept: a state does not depend on the clock. Into a
    `file` go lines of text, from a notebook too.
    """

    every: int = 10
    file: TextIO | None = None  # standard output if None
    order: ClassVar[int] = Order.REPORT
    reports: ClassVar[bool] = True
    run_after: ClassVar[tuple[type, ...]] = (Recorder,)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"Progress: every must be at least 1, got {self.every}.")

    @contextmanager
    def around_fit(self, state: State) -> Iterator[Shown]:
        """Open the display, and close it whatever happens."""
        complete = bool(state.done) and state.done[0] >= state.n_epoch
        length = f"{state.n_epoch} epochs" if state.n_step is None else f"{state.n_step} steps"
        del state  # its tensors would live as long as the run
        with self._display() as display:
            if complete:
                display.say(f"nothing to do: the run of {length} is complete already")
            yield Shown(display)

    def _display(self) -> AbstractContextManager[Display]:
        cell = notebook() if self.file is None else None
        if cell is not None:
            return live_table(cell)
        # Look up sys.stdout now: it may have been redirected since this object was made.
        return lines(self.file or sys.stdout)

    def before_train(self, state: State) -> None:
        """Start the bar of a training phase."""
        self._start(state, f"epoch {state.epoch + 1}/{state.n_epoch}")

    def before_validate(self, state: State) -> None:
        """Start the bar of a validation phase."""
        self._start(state, "validate")

    def after_batch(self, state: State) -> None:
        """Move the bar."""
        shown = self._shown(state)
        if shown is None:
            return
        epoch = f"epoch {state.epoch + 1}/{state.n_epoch}"
        if not shown.begun:  # a run that is resumed within a phase
            phase = epoch if state.training else "validate"
            self._start(state, phase)
        what = None
        if shown.display.has_bar and state.training and state.iter % self.every == 0:
            what = f"{epoch} loss {float(recorded(state).smooth_loss):.4f}"
        shown.display.move(state.iter + 1, what)

    def after_epoch(self, state: State) -> None:
        """Show the row of the epoch."""
        shown = self._shown(state)
        if shown is None or not state.history.rows:
            return
        row = dict(state.history.rows[-1])
        if state.n_step is None:
            row.pop("train_iter", None)
        cells = {name: number_text(value) for name, value in row.items()}
        elapsed, shown.started = time.perf_counter() - shown.started, time.perf_counter()
        shown.display.add_row({**cells, "seconds": f"{elapsed:.1f}"})

    def after_cancel_fit(self, state: State) -> None:
        """Say who has ended the run, and why."""
        shown = self._shown(state)
        if shown is not None and ENDED in state.memory:
            shown.display.say(f"stopped by {state.memory[ENDED]}")

    def _start(self, state: State, what: str) -> None:
        shown = self._shown(state)
        if shown is not None:
            shown.display.start(what, state.n_iter)
            shown.begun = True

    def _shown(self, state: State) -> Shown | None:
        # None in `validate` and `predict`, which do not open around_fit.
        shown: Shown | None = state.resources.get(self.name)
        return shown
