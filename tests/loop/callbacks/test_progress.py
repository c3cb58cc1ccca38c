"""What Progress shows, on a terminal and elsewhere, and that it goes away."""

import io
import re
import threading
from pathlib import Path

import pytest

from loop import (
    CancelEpoch,
    CancelFit,
    Checkpoint,
    DataLoaders,
    EarlyStopping,
    Progress,
    State,
    accuracy,
    fit,
    trace,
    validate,
)
from loop.callbacks.parts.displays import line
from tests.comparing import assert_same
from tests.loop.helpers import (
    assert_same_run,
    batches,
    learned,
    learner,
    loaders,
    on,
    raise_once,
    raiser,
)


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "FORCE_COLOR",
        "NO_COLOR",
        "TTY_COMPATIBLE",
        "TTY_INTERACTIVE",
        "COLUMNS",
        "JUPYTER_COLUMNS",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


MINE = learner()
START = MINE.init()


def shown(epochs: int, *callbacks: object, file: io.StringIO | None = None) -> list[str]:
    file = io.StringIO() if file is None else file
    fit(MINE, START, epochs, [Progress(file=file), *callbacks])
    return file.getvalue().splitlines()


def test_a_header_and_a_line_for_every_epoch() -> None:
    lines = shown(3)
    assert lines[0].split() == ["epoch", "train_loss", "valid_loss", "seconds"]
    assert [line.split()[0] for line in lines[1:]] == ["0", "1", "2"]


def test_the_lines_are_the_rows_of_the_history() -> None:
    row = fit(MINE, START, 1).history.rows[0]
    assert shown(1)[1].split()[:3] == ["0", f"{row['train_loss']:.6f}", f"{row['valid_loss']:.6f}"]


def test_rows_of_a_run_in_steps_say_after_which_batch_they_were_measured() -> None:
    file = io.StringIO()
    fit(MINE, START, steps=5, steps_per_epoch=2, callbacks=[Progress(file=file)])
    cells = [line.split()[:2] for line in file.getvalue().splitlines()]
    assert cells == [["epoch", "train_iter"], ["0", "2"], ["1", "4"], ["2", "5"]]


def test_columns_stand_under_their_names() -> None:
    lines = shown(1)
    ends = [[found.end() for found in re.finditer(r"\S+", line)] for line in lines]
    assert ends[0] == ends[1]


def test_plain_lines_have_no_control_characters() -> None:
    assert "\x1b" not in "".join(shown(2))


def test_a_column_that_was_not_measured_is_a_dash() -> None:
    assert shown(1, on(before_epoch=raiser(CancelEpoch)))[1].split()[1:3] == ["-", "-"]


def test_every_run_has_its_header() -> None:
    file = io.StringIO()
    fit(MINE, fit(MINE, START, 1, [Progress(file=file)]), 1, [Progress(file=file)])
    assert file.getvalue().count("train_loss") == 2


def test_long_names_have_wide_columns() -> None:
    assert line({"a_name_longer_than_that": "1.000000"}) == "1.000000".rjust(25)


def test_standard_output_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    fit(MINE, START, 1, [Progress()])
    assert "valid_loss" in capsys.readouterr().out


def test_showing_changes_nothing() -> None:
    assert_same_run(fit(MINE, START, 2, [Progress(file=io.StringIO())]), fit(MINE, START, 2))


def test_a_terminal_gets_a_bar_and_the_same_table() -> None:
    terminal = Terminal()
    shown(2, file=terminal)
    text = terminal.getvalue()
    assert "━" in text
    assert text.count("valid_loss") == 1


def test_the_last_line_says_who_has_stopped_the_run_and_why() -> None:
    lines = shown(5, EarlyStopping(min_delta=1e9))
    value = fit(MINE, START, 1).history.rows[0]["valid_loss"]
    assert lines[-1] == (
        f"stopped by EarlyStopping after epoch 1: valid_loss has not got better than {value:.6f} "
        f"(patience=1, min_delta=1000000000.0)"
    )


def test_a_run_that_nobody_gives_a_reason_for_ends_with_its_rows() -> None:
    assert shown(2, on(after_batch=raise_once(CancelFit, at=7)))[-1].split()[0] == "0"


def test_a_run_that_is_complete_says_so_when_it_is_resumed(tmp_path: Path) -> None:
    fit(MINE, START, 2, [Checkpoint(tmp_path)])
    file = io.StringIO()
    fit(MINE, START, 2, [Progress(file=file)], resume=tmp_path)
    assert file.getvalue() == "nothing to do: the run of 2 epochs is complete already\n"


def test_a_run_in_steps_that_is_complete_says_how_many(tmp_path: Path) -> None:
    fit(MINE, START, steps=4, callbacks=[Checkpoint(tmp_path)])
    file = io.StringIO()
    fit(MINE, START, steps=4, callbacks=[Progress(file=file)], resume=tmp_path)
    assert file.getvalue() == "nothing to do: the run of 4 steps is complete already\n"


def tasks(every: int) -> list[tuple[str, float, float | None]]:
    """What the bar says after every batch: (description, how many are done, of how many)."""
    seen = []

    def look(state: State) -> None:
        (task,) = state.resources["progress"].display.bar.tasks
        seen.append((task.description, task.completed, task.total))

    fit(MINE, START, 1, [Progress(every=every, file=Terminal()), on(after_batch=look, order=100)])
    return seen


def test_the_bar_counts_the_batches_of_each_phase() -> None:
    assert [task[1:] for task in tasks(every=1)] == [(1, 3), (2, 3), (3, 3), (1, 2), (2, 2)]


def test_the_bar_says_the_smooth_loss() -> None:
    smooth = fit(MINE, START, 1).history.smooth_losses()
    texts = [f"epoch 1/1 loss {loss:.4f}" for loss in smooth]
    assert [task[0] for task in tasks(every=1)] == [*texts, "validate", "validate"]


def test_the_smooth_loss_is_looked_at_now_and_then() -> None:
    smooth = fit(MINE, START, 1).history.smooth_losses()
    texts = [f"epoch 1/1 loss {smooth[index]:.4f}" for index in (0, 0, 2)]
    assert [task[0] for task in tasks(every=2)][:3] == texts


def test_showing_on_a_terminal_changes_nothing() -> None:
    assert_same(
        learned(fit(MINE, START, 1, [Progress(file=Terminal())])), learned(fit(MINE, START, 1))
    )


def assert_gone(terminal: Terminal, threads: list[threading.Thread]) -> None:
    """The bar's thread ends and the cursor is visible again."""
    text = terminal.getvalue()
    for thread in set(threading.enumerate()) - set(threads):
        thread.join(timeout=10)
        assert not thread.is_alive()
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") >= 0


def test_the_bar_is_gone_after_the_run() -> None:
    terminal, threads = Terminal(), threading.enumerate()
    shown(1, file=terminal)
    assert_gone(terminal, threads)


@pytest.mark.parametrize("event", ["before_train", "after_loss", "after_validate", "after_fit"])
def test_the_bar_is_gone_after_an_error(event: str) -> None:
    terminal, threads = Terminal(), threading.enumerate()
    with pytest.raises(ZeroDivisionError):
        shown(1, on(**{event: raiser(ZeroDivisionError)}), file=terminal)
    assert_gone(terminal, threads)


def test_the_bar_is_gone_after_a_signal() -> None:
    terminal, threads = Terminal(), threading.enumerate()
    shown(1, on(after_loss=raise_once(CancelFit)), file=terminal)
    assert_gone(terminal, threads)


def test_the_bar_is_gone_after_a_trace_is_closed() -> None:
    terminal, threads = Terminal(), threading.enumerate()
    running = trace(MINE, START, 1, [Progress(file=terminal)])
    next(event for event, _ in running if event == "after_step")
    running.close()
    assert_gone(terminal, threads)


@pytest.mark.parametrize("every", [0, -1])
def test_a_look_at_every_so_many_batches(every: int) -> None:
    with pytest.raises(ValueError, match="Progress: every"):
        Progress(every=every)


@pytest.mark.parametrize("file", [io.StringIO(), Terminal()])
def test_a_run_cancelled_before_it_has_begun(file: io.StringIO) -> None:
    fit(MINE, START, 1, [Progress(file=file), on(before_fit=raiser(CancelFit))])
    assert "valid_loss" not in file.getvalue()


def test_a_loader_that_does_not_know_its_length_has_a_bar_too() -> None:
    class Unknown:
        def __iter__(self) -> object:
            return iter(batches(3, seed=1))

    terminal = Terminal()
    mine = learner(data=DataLoaders(Unknown()))
    fit(mine, mine.init(), 1, [Progress(file=terminal)])
    assert "train_loss" in terminal.getvalue()


def test_validate_shows_nothing() -> None:
    terminal = Terminal()
    mine = learner(data=loaders(), callbacks=[Progress(file=terminal)], metrics=[accuracy_of_first])
    validate(mine, START)
    assert terminal.getvalue() == ""


def accuracy_of_first(pred: object, y: object) -> object:
    """A metric."""
    return accuracy(pred, y[:, 0])  # type: ignore[arg-type, index]
