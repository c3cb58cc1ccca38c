"""Write a run down outside the state: tables in files, and numbers for experiment trackers.

A file is a function of the state: it never has a line that the state does not know of, and never
one twice. So a run that goes on from a checkpoint goes on with its file, wherever the file had got
to when the earlier run stopped.
"""

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from loop.callback import Callback, Order
from loop.callbacks.parts.written import (
    common_start,
    csv_text,
    json_line,
    lines_up_to,
    numbers_of,
    rows_of_others,
)
from loop.callbacks.recorder import Recorder
from loop.state import State


@dataclass
class Table:
    """An open file, and the rows in it that come before those of the run."""

    file: BinaryIO
    before: Sequence[Mapping[str, object]]

    def show(self, rows: Sequence[Mapping[str, object]]) -> None:
        """Have these rows in the file, after those of before."""
        _become(self.file, csv_text([*self.before, *rows]))


@dataclass(frozen=True)
class CSVLogger(Callback):
    """Keep the table of the history in a file: a header, and a line for every epoch, on the disk
    when the epoch ends.

    The file has the rows of the state's whole history, so a run that goes on from a state, of this
    or another process, goes on with the table: rows are never missing or there twice, and those of
    epochs that the state does not know (it was saved before them) are dropped. What else the file
    had is lost, unless `append`: then rows that other histories wrote stay, in front. Where columns
    change, the header is written again, with all of them.

    Raises ValueError when the run starts if there is something else than a table to append to.
    `validate` and `predict` leave the file alone.
    """

    path: str | Path
    append: bool = False
    order: ClassVar[int] = Order.REPORT
    reports: ClassVar[bool] = True
    run_after: ClassVar[tuple[type, ...]] = (Recorder,)

    @contextmanager
    def around_fit(self, state: State) -> Iterator[Table]:
        """Open the file, and close it whatever happens."""
        with _opened(self.path) as file:
            try:
                before = rows_of_others(_text(file), state.history.rows) if self.append else []
            except ValueError as error:
                raise ValueError(
                    f"CSVLogger: cannot append to {self.path}: {error}. Give another path."
                ) from error
            table = Table(file, before)
            # Drop rows that are unknown to this state at once, not when the first epoch ends.
            table.show(state.history.rows)
            del state  # its tensors would live as long as the run
            yield table

    def after_epoch(self, state: State) -> None:
        """Write the row."""
        table: Table | None = state.resources.get(self.name)
        if table is not None:
            table.show(state.history.rows)


@dataclass(frozen=True)
class JSONLLogger(Callback):
    """Write a JSON object a line: for every epoch its row, and after every n batches their
    train_iter, loss and hypers.

    `every` is that n, 0 for none; the loss of other batches is not read. A line of an epoch has the
    key "epoch". Where a number is not finite, or was not measured, there is null.

    A run that goes on from a state goes on with the file: lines of batches and epochs that the
    state has not come to are dropped, so a new state begins a new file. Raises ValueError for a
    negative `every`, and when the run starts if the file is another kind of file. `validate` and
    `predict` leave it alone.
    """

    path: str | Path
    every: int = 1
    order: ClassVar[int] = Order.REPORT
    reports: ClassVar[bool] = True
    run_after: ClassVar[tuple[type, ...]] = (Recorder,)

    def __post_init__(self) -> None:
        _check_every("JSONLLogger", self.every)

    @contextmanager
    def around_fit(self, state: State) -> Iterator[BinaryIO]:
        """Open the file, and close it whatever happens."""
        with _opened(self.path) as file:
            try:
                lines = lines_up_to(io.StringIO(_text(file)), state.train_iter, state.history.rows)
            # UnicodeDecodeError, for bytes that are no text, is a ValueError too.
            except ValueError as error:
                raise ValueError(
                    f"JSONLLogger: {self.path} is not its log: {error}. Give another path."
                ) from error
            _become(file, "".join(lines))
            del state  # its tensors would live as long as the run
            yield file

    def after_batch(self, state: State) -> None:
        """Write a line now and then."""
        file: BinaryIO | None = state.resources.get(self.name)
        if file is not None and _due(state, self.every):
            file.write(json_line({"train_iter": state.train_iter, **numbers_of(state)}).encode())
            # No fsync, which would wait for the disk in every batch. The next row syncs these too.
            file.flush()

    def after_epoch(self, state: State) -> None:
        """Write the row."""
        file: BinaryIO | None = state.resources.get(self.name)
        if file is not None and state.history.rows:
            file.write(json_line(state.history.rows[-1]).encode())
            _sync(file)


@dataclass(frozen=True)
class TensorBoardLogger(Callback):
    """Write scalars for TensorBoard: after every n batches their loss and hypers, and for every
    epoch its row.

    The step is train_iter, so runs that follow each other are one curve; what a directory has of
    steps that the state has not come to is hidden. `every` is that n, 0 for none; the loss of other
    batches is not read.

    Raises ImportError if tensorboard is not installed, ValueError for a negative `every`.
    """

    log_dir: str | Path
    every: int = 10
    order: ClassVar[int] = Order.REPORT
    reports: ClassVar[bool] = True
    run_after: ClassVar[tuple[type, ...]] = (Recorder,)

    def __post_init__(self) -> None:
        _check_every("TensorBoardLogger", self.every)
        # Fail now, not in the run, if tensorboard is missing.
        _summary_writer()

    @contextmanager
    def around_fit(self, state: State) -> Iterator[Any]:
        """Open a writer, and close it whatever happens."""
        # TensorBoard hides this step and later ones. The state has reached train_iter itself.
        writer = _summary_writer()(str(self.log_dir), purge_step=state.train_iter + 1)
        del state  # its tensors would live as long as the run
        try:
            yield writer
        finally:
            writer.close()

    def after_batch(self, state: State) -> None:
        """Write a batch's scalars now and then."""
        if _due(state, self.every):
            self._write(state)

    def after_epoch(self, state: State) -> None:
        """Write the scalars of the row."""
        self._write(state)

    def _write(self, state: State) -> None:
        writer = state.resources[self.name]
        for name, value in numbers_of(state).items():
            writer.add_scalar(name, value, state.train_iter)


@dataclass(frozen=True)
class TrackerLogger(Callback):
    """Hand numbers to an experiment tracker: `log({"loss": 0.7, "lr": 0.1}, step)`.

    `log` is `wandb.log`, `mlflow.log_metrics`, `trackio.log`, or any other function of a dict and a
    step, which is train_iter. It is called after every n batches with their loss and hypers, and
    after every epoch with its row; a run of the tracker is for you to begin and to end. `every` is
    that n, 0 for none; the loss of other batches is not read.

    Raises TypeError if log is not a function, ValueError for a negative `every`.

    >>> TrackerLogger(log=lambda numbers, step: print(step, numbers), every=100).name
    'tracker_logger'
    """

    log: Callable[[dict[str, float], int], object]
    every: int = 10
    order: ClassVar[int] = Order.REPORT
    reports: ClassVar[bool] = True
    run_after: ClassVar[tuple[type, ...]] = (Recorder,)

    def __post_init__(self) -> None:
        _check_every("TrackerLogger", self.every)
        if not callable(self.log):
            raise TypeError(
                f"TrackerLogger: log must be a function (numbers, step), got {self.log!r}. Try "
                f"wandb.log."
            )

    def after_batch(self, state: State) -> None:
        """Hand over a batch's numbers now and then."""
        if _due(state, self.every):
            self.log(numbers_of(state), state.train_iter)

    def after_epoch(self, state: State) -> None:
        """Hand over the numbers of the row."""
        self.log(numbers_of(state), state.train_iter)


def _due(state: State, every: int) -> bool:
    """Whether a training batch is one that is written down: it has a loss, and train_iter is a
    multiple of every.
    """
    if every == 0 or not state.training or state.loss is None:
        return False
    return state.train_iter % every == 0


def _check_every(who: str, every: int) -> None:
    if not isinstance(every, int) or every < 0:
        raise ValueError(f"{who}: every must be a number of batches, or 0 for none, got {every!r}.")


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "TensorBoardLogger: tensorboard is not installed. Install it: pip install tensorboard."
        ) from error
    return SummaryWriter


def _opened(path: str | Path) -> BinaryIO:
    """A file to read and to append to, made if need be, with its folders."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # Not w+b, which would empty the file before it is read.
    return Path(path).open("a+b")


def _text(file: BinaryIO) -> str:
    file.seek(0)
    return file.read().decode()


def _become(file: BinaryIO, text: str) -> None:
    """Have this text in a file; what it begins with already is not written again."""
    file.seek(0)
    old, new = file.read(), text.encode()
    same = common_start(old, new)
    # In append mode every write goes to the end, so the end moves to the first difference.
    file.truncate(same)
    file.write(new[same:])
    _sync(file)


def _sync(file: BinaryIO) -> None:
    """Have what was written on the disk."""
    file.flush()
    os.fsync(file.fileno())
