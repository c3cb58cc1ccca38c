"""Progress in a notebook: one output, with the table of the run, and a bar while it runs."""

import io
import itertools
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from loop import CancelFit, DataLoaders, EarlyStopping, Progress, TerminateOnNaN, fit, trace
from loop.callbacks.parts import displays
from tests.functional_sgd.test_notebook import cells
from tests.loop.helpers import assert_same_run, batches, learner, on, raise_once, raiser

MINE = learner()
START = MINE.init()


class Cell:
    """The output of a cell: what is shown there, one after the other, in how many places."""

    def __init__(self) -> None:
        self.places = 0
        self.pages: list[dict[str, str]] = []

    def get_ipython(self) -> Any:
        """A shell with a kernel."""
        return SimpleNamespace(kernel="a kernel")

    def display(self, page: dict[str, str], raw: bool, display_id: bool) -> Any:
        """Show a page in a new place, which can be changed."""
        assert raw
        assert display_id
        self.places += 1
        self.pages.append(page)
        return self

    def update(self, page: dict[str, str], raw: bool) -> None:
        """Show a page in the place of the last one."""
        assert raw
        self.pages.append(page)

    def bars(self) -> list[str]:
        """What was said beside the bar, in order."""
        said = [re.findall("</progress> (.*?)</div>", page["text/html"]) for page in self.pages]
        return [text for texts in said for text in texts]


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Cell:
    fake: Any = Cell()
    monkeypatch.setitem(sys.modules, "IPython", fake)
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    monkeypatch.setattr(displays, "_PAUSE", 0)
    return fake  # type: ignore[no-any-return]


def test_a_run_is_one_output(cell: Cell) -> None:
    fit(MINE, START, 3, [Progress()])
    assert cell.places == 1


def test_every_run_has_its_own(cell: Cell) -> None:
    fit(MINE, fit(MINE, START, 1, [Progress()]), 1, [Progress()])
    assert cell.places == 2


def test_in_the_end_there_is_the_table_alone(cell: Cell) -> None:
    history = fit(MINE, START, 3, [Progress()]).history
    last = cell.pages[-1]
    titles, *rows = cells(last["text/html"])
    assert titles == ["epoch", "train_loss", "valid_loss", "seconds"]
    assert [row[:2] for row in rows] == [
        [str(row["epoch"]), f"{row['train_loss']:.6f}"] for row in history.rows
    ]
    assert "<progress" not in last["text/html"]
    assert [line.split() for line in last["text/plain"].splitlines()] == [titles, *rows]


def test_rows_are_shown_as_they_come(cell: Cell) -> None:
    fit(MINE, START, 3, [Progress()])
    counts = [page["text/html"].count("<tr>") for page in cell.pages]
    assert counts == sorted(counts)
    assert {*counts} == {0, 2, 3, 4}


def test_the_bar_counts_batches_and_tells_the_loss(cell: Cell) -> None:
    smooth = fit(MINE, START, 1, [Progress(every=2)]).history.smooth_losses()
    said = [re.sub(r", \d+ s left$", "", text) for text in cell.bars()]
    assert [text for text, _ in itertools.groupby(said)] == [
        "epoch 1/1, 0/3",
        f"epoch 1/1 loss {smooth[0]:.4f}, 1/3",
        f"epoch 1/1 loss {smooth[0]:.4f}, 2/3",
        f"epoch 1/1 loss {smooth[2]:.4f}, 3/3",
        "validate, 0/2",
        "validate, 1/2",
        "validate, 2/2",
    ]
    assert cell.bars()[1].endswith(" s left")


def test_pages_are_not_drawn_faster_than_they_can_be_seen(
    cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(displays, "_PAUSE", 3600)
    fit(MINE, START, 2, [Progress()])
    assert len(cell.pages) == 2 * (1 + 1 + 1) + 1  # two phases and a row an epoch, and the end


@pytest.mark.parametrize("event", ["before_train", "after_loss", "after_validate", "after_fit"])
def test_no_bar_is_left_after_an_error(cell: Cell, event: str) -> None:
    with pytest.raises(ZeroDivisionError):
        fit(MINE, START, 1, [Progress(), on(**{event: raiser(ZeroDivisionError)})])
    assert "<progress" not in "".join(page["text/html"] for page in cell.pages[-1:])


def test_no_bar_is_left_after_a_signal(cell: Cell) -> None:
    fit(MINE, START, 1, [Progress(), on(after_loss=raise_once(CancelFit))])
    assert "<progress" not in cell.pages[-1]["text/html"]


def test_a_run_that_ends_in_its_first_epoch_says_how_far_it_came(cell: Cell) -> None:
    fit(MINE, START, 1, [Progress(), on(after_loss=raise_once(CancelFit, at=2))])
    assert cell.pages[-1]["text/plain"].startswith("epoch 1/1")
    assert cell.pages[-1]["text/plain"].endswith(", 2/3")
    assert cell.pages[-1]["text/plain"] in cell.pages[-1]["text/html"]


def test_a_line_under_the_table_says_who_has_stopped_the_run(cell: Cell) -> None:
    fit(MINE, START, 5, [Progress(), EarlyStopping(min_delta=1e9)])
    page = cell.pages[-1]
    assert page["text/plain"].splitlines()[-1].startswith("stopped by EarlyStopping after epoch 1:")
    assert "<div>stopped by EarlyStopping after epoch 1:" in page["text/html"]


def test_so_does_a_run_without_a_row(cell: Cell) -> None:
    mine = learner(loss=lambda pred, y: pred.mean() * float("nan"))
    fit(mine, START, 5, [Progress(), TerminateOnNaN()])
    first, second = cell.pages[-1]["text/plain"].splitlines()
    assert first == "epoch 1/5, 0/3"
    assert second == "stopped by TerminateOnNaN at batch 0 of epoch 0: the loss is nan"


def test_no_bar_is_left_after_a_trace_is_closed(cell: Cell) -> None:
    running = trace(MINE, START, 1, [Progress()])
    next(event for event, _ in running if event == "after_step")
    running.close()
    assert "<progress" not in cell.pages[-1]["text/html"]


def test_a_run_cancelled_before_it_has_begun_shows_nothing(cell: Cell) -> None:
    fit(MINE, START, 1, [Progress(), on(before_fit=raiser(CancelFit))])
    assert cell.pages == []


def test_a_loader_that_does_not_know_its_length_has_a_bar_without_a_value(cell: Cell) -> None:
    class Unknown:
        def __iter__(self) -> object:
            return iter(batches(3, seed=1))

    mine = learner(data=DataLoaders(Unknown()))  # type: ignore[arg-type]
    fit(mine, mine.init(), 1, [Progress()])
    assert "<progress></progress>" in cell.pages[0]["text/html"]
    assert cell.bars()[-1].endswith("3/?")


def test_a_file_gets_lines(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)  # as rich finds in a real kernel
    file = io.StringIO()
    fit(MINE, START, 1, [Progress(file=file)])
    assert "valid_loss" in file.getvalue()
    assert cell.pages == []


def test_showing_changes_nothing(cell: Cell) -> None:
    shown = fit(MINE, START, 2, [Progress()])
    assert cell.pages
    assert_same_run(shown, fit(MINE, START, 2))
