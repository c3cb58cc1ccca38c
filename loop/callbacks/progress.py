"""Show how a run is doing: a bar and a table on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TextIO

from loop.callback import Callback, Order
from loop.callbacks.recorder import Recorder, recorded
from loop.state import State

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

_WIDTH = 12


@dataclass
class Display:
    """What is open during a run: the console, perhaps a bar, and the clock."""

    console: "Console"
    bar: "Bar | None"
    task: Any = None
    started: float = field(default_factory=time.perf_counter)
    header: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Progress(Callback):
    """A row for every epoch, under a header; and, on a terminal, a bar with the smooth loss.

    `every` is how many batches pass between two looks at the loss (each waits for the device).
    Times are wall-clock seconds, shown and never kept: a state does not depend on the clock.
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
    def around_fit(self, state: State) -> Iterator[Display]:
        """Open the display, and close it whatever happens."""
        # Imported here, for rich takes longer than everything else in the loop together.
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        del state  # its tensors would live as long as the run
        console = Console(file=self.file or sys.stdout, highlight=False, soft_wrap=True)
        if not console.is_terminal:
            yield Display(console, None)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Bar(*columns, console=console, transient=True) as bar:
            yield Display(console, bar)

    def before_train(self, state: State) -> None:
        """Start the bar of a training phase."""
        self._start(state, f"epoch {state.epoch + 1}/{state.n_epoch}")

    def before_validate(self, state: State) -> None:
        """Start the bar of a validation phase."""
        self._start(state, "validate")

    def after_batch(self, state: State) -> None:
        """Move the bar."""
        display = self._display(state)
        if display is None or display.bar is None:
            return
        if display.task is None:  # a run that is resumed within a phase
            self._start(
                state, f"epoch {state.epoch + 1}/{state.n_epoch}" if state.training else "validate"
            )
        if state.training and state.iter % self.every == 0:
            loss = float(recorded(state).smooth_loss)
            display.bar.update(
                display.task, description=f"epoch {state.epoch + 1}/{state.n_epoch} loss {loss:.4f}"
            )
        display.bar.update(display.task, completed=state.iter + 1)

    def after_epoch(self, state: State) -> None:
        """Print the row of the epoch."""
        display = self._display(state)
        if display is None or not state.history.rows:
            return
        row = {
            name: value for name, value in state.history.rows[-1].items() if name != "train_iter"
        }
        elapsed, display.started = time.perf_counter() - display.started, time.perf_counter()
        if display.header != list(row):
            display.header = list(row)
            display.console.print("".join(name.rjust(_width(name)) for name in (*row, "seconds")))
        display.console.print(format_row(row) + f"{elapsed:.1f}".rjust(_width("seconds")))

    def _start(self, state: State, what: str) -> None:
        display = self._display(state)
        if display is not None and display.bar is not None:
            if display.task is not None:
                display.bar.remove_task(display.task)
            display.task = display.bar.add_task(what, total=state.n_iter)

    def _display(self, state: State) -> Display | None:
        display: Display | None = state.resources.get(self.name)
        return display


def format_row(row: Mapping[str, Any]) -> str:
    """A row of numbers in columns as wide as their names.

    >>> format_row({"epoch": 0, "valid_loss": 0.25, "accuracy": None})
    '           0    0.250000           -'
    """
    return "".join(_cell(value).rjust(_width(name)) for name, value in row.items())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.6f}"


def _width(name: str) -> int:
    return max(_WIDTH, len(name) + 2)
