"""Where Progress shows a run: lines of text, a bar on a terminal, or one table in a notebook."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, TextIO

from functional_sgd.notebook import html_table
from loop.history import column_names

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

_WIDTH = 12
_LATEST = 60  # rows of a text that is sent again and again
_PAUSE = 0.1  # seconds between two pictures of a bar; more often, a browser falls behind


class Display(Protocol):
    """What is open during a run, and shows it."""

    @property
    def has_bar(self) -> bool:
        """Whether anybody sees what is said beside the bar: without one, no loss is read."""

    def start(self, what: str, total: int | None) -> None:
        """Begin the bar of a phase of so many batches."""

    def move(self, done: int, what: str | None = None) -> None:
        """Move the bar: so many batches are done; `what`, if given, is said beside it from here."""

    def add_row(self, row: Mapping[str, str]) -> None:
        """Show the row of an epoch."""

    def say(self, text: str) -> None:
        """Show a line of text."""


@dataclass
class Lines:
    """A line for every row, under a header, and perhaps a bar."""

    console: "Console"
    bar: "Bar | None" = None
    task: "TaskID | None" = None
    header: list[str] = field(default_factory=list)

    @property
    def has_bar(self) -> bool:
        """On a terminal."""
        return self.bar is not None

    def start(self, what: str, total: int | None) -> None:
        """A new bar in place of the last one."""
        if self.bar is None:
            return
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = self.bar.add_task(what, total=total)

    def move(self, done: int, what: str | None = None) -> None:
        """Redrawn by rich, in a thread of its own."""
        if self.bar is not None:
            assert self.task is not None  # `start` comes first
            self.bar.update(self.task, completed=done, description=what)

    def add_row(self, row: Mapping[str, str]) -> None:
        """A line; before it the header, if it is another one."""
        if self.header != list(row):
            self.header = list(row)
            self.console.print(header(row))
        self.console.print(line(row))

    def say(self, text: str) -> None:
        """As it is."""
        self.console.print(text, markup=False)


class Handle(Protocol):
    """What IPython gives for an output that can be shown again."""

    def update(self, shown: object, /, *, raw: bool = False) -> None:
        """Show this in its place: an object, or, if raw, texts by their kind."""


@dataclass
class LiveTable:
    """One output of a notebook's cell: the table of the run, and under it the bar of a phase."""

    display: ModuleType  # IPython.display
    handle: "Handle | None" = None
    rows: list[Mapping[str, str]] = field(default_factory=list)
    what: str = ""  # nothing: there is no bar
    ended: str = ""  # where the run was when it ended
    said: list[str] = field(default_factory=list)  # under the table
    done: int = 0
    total: int | None = None
    started: float = 0.0
    drawn: float = 0.0

    @property
    def has_bar(self) -> bool:
        """Always."""
        return True

    def start(self, what: str, total: int | None) -> None:
        """A new bar in place of the last one."""
        self.what, self.done, self.total = what, 0, total
        self.started = time.perf_counter()
        self._draw()

    def move(self, done: int, what: str | None = None) -> None:
        """Drawn ten times a second at most."""
        self.done, self.what = done, what or self.what
        if time.perf_counter() - self.drawn >= _PAUSE:
            self._draw()

    def add_row(self, row: Mapping[str, str]) -> None:
        """Drawn at once."""
        self.rows.append(row)
        self._draw()

    def say(self, text: str) -> None:
        """Drawn at once."""
        self.said.append(text)
        self._draw()

    def close(self) -> None:
        """The table stays, the bar goes; a run without a row leaves how far it came."""
        self.ended = f"{self.what}, {self.done}/{self.total or '?'}" if self.what else ""
        self.what = ""
        # Do not open an output for a run that was cancelled before its first bar.
        if self.handle is not None:
            self._draw()

    def _draw(self) -> None:
        self.drawn = time.perf_counter()
        shown = {"text/plain": self._text(), "text/html": self._html()}
        if self.handle is None:
            self.handle = self.display.display(shown, raw=True, display_id=True)
        else:
            self.handle.update(shown, raw=True)

    def _text(self) -> str:
        """For whoever cannot show HTML: the last rows, since the whole is sent at every change."""
        if not self.rows:
            return "\n".join(filter(None, [self.ended, *self.said]))
        titles = column_names(self.rows)
        text = [header(titles)]
        for row in self.rows[-_LATEST:]:
            cells = {name: row.get(name, "-") for name in titles}
            text.append(line(cells))
        return "\n".join([*text, *self.said])

    def _html(self) -> str:
        titles = column_names(self.rows)
        rows = []
        for row in self.rows:
            cells = [row.get(name, "-") for name in titles]
            rows.append(cells)
        table = html_table(rows, titles, left=0) if rows else f"<div>{escape(self.ended)}</div>"
        said = "".join(f"<div>{escape(text)}</div>" for text in self.said)
        bar = self._bar() if self.what else ""
        return table + said + bar

    def _bar(self) -> str:
        # Without a length, the bar has no value: a browser then shows that something is going on.
        length = f' value="{self.done}" max="{self.total}"' if self.total else ""
        count = f"{self.done}/{self.total or '?'}"
        left = ""
        if self.total and self.done:
            seconds = (time.perf_counter() - self.started) * (self.total / self.done - 1)
            left = f", {seconds:.0f} s left"
        return f"<div><progress{length}></progress> {escape(self.what)}, {count}{left}</div>"


@contextmanager
def lines(file: TextIO) -> Iterator[Lines]:
    """Lines in a file, with a bar if it is a terminal."""
    # Imported here, for rich takes longer than everything else in the loop together.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    # In a notebook, rich would show every line in an output of its own, whatever the file.
    # soft_wrap: else rich breaks long rows at the terminal's width, or at 80 characters.
    console = Console(file=file, highlight=False, soft_wrap=True, force_jupyter=False)
    if not console.is_terminal:
        yield Lines(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        yield Lines(console, bar)


@contextmanager
def live_table(display: ModuleType) -> Iterator[LiveTable]:
    """A table in a notebook, whose bar goes however the run ends."""
    table = LiveTable(display)
    try:
        yield table
    finally:
        table.close()


def line(row: Mapping[str, str]) -> str:
    """Cells in columns as wide as their names.

    >>> line({"epoch": "0", "valid_loss": "0.250000"})
    '           0    0.250000'
    """
    return "".join(cell.rjust(max(_WIDTH, len(name) + 2)) for name, cell in row.items())


def header(names: Iterable[str]) -> str:
    """The names of columns, above such lines."""
    return line({name: name for name in names})
