"""ShowGraph: one picture in a notebook, a file elsewhere, nothing where neither is asked for."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loop import CancelFit, EarlyStopping, History, ShowGraph, State, fit, trace, validate
from loop.callbacks import showing
from loop.plots import plot_losses
from tests.loop.helpers import Kept, assert_same_run, learner, on, raise_once, raiser

MINE = learner()
START = MINE.init()
PNG = b"\x89PNG\r\n\x1a\n"


class Notebook:
    """Stands in for IPython: what is shown, and what takes its place."""

    version_info = (9, 0)  # which matplotlib asks for

    def __init__(self, kernel: Any) -> None:
        self.shell = SimpleNamespace(kernel=kernel)
        self.shown: list[bytes] = []
        self.updates: list[bytes] = []

    def get_ipython(self) -> Any:
        """The shell."""
        return self.shell

    def display(self, figure: Any, display_id: bool) -> Any:
        """Show a picture, in a place that can be changed."""
        assert display_id is True
        self.shown.append(figure._repr_png_()[0])
        return SimpleNamespace(update=lambda other: self.updates.append(other._repr_png_()[0]))


def notebook(monkeypatch: pytest.MonkeyPatch, kernel: Any = "a kernel") -> Notebook:
    fake = Notebook(kernel)
    monkeypatch.setitem(sys.modules, "IPython", fake)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "IPython.display", fake)  # type: ignore[arg-type]
    return fake


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[History, int]]:
    """The histories that are drawn."""
    seen: list[tuple[History, int]] = []

    def draw(history: History, skip: int) -> Any:
        seen.append((history, skip))
        return plot_losses(history, skip)

    monkeypatch.setattr(showing, "plot_losses", draw)
    return seen


def test_a_notebook_has_one_picture_that_changes_with_every_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = notebook(monkeypatch)
    fit(MINE, START, 3, [ShowGraph()])
    assert (len(fake.shown), len(fake.updates)) == (1, 2)
    assert all(picture.startswith(PNG) for picture in (*fake.shown, *fake.updates))
    assert len({*fake.shown, *fake.updates}) == 3


def test_every_run_has_its_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = notebook(monkeypatch)
    fit(MINE, fit(MINE, START, 1, [ShowGraph()]), 2, [ShowGraph()])
    assert (len(fake.shown), len(fake.updates)) == (2, 1)


def test_it_shows_the_losses_of_the_history_so_far(
    monkeypatch: pytest.MonkeyPatch, drawn: list[tuple[History, int]]
) -> None:
    notebook(monkeypatch)
    end = fit(MINE, START, 2, [ShowGraph(skip=2)])
    assert [(len(history.losses), len(history.rows), skip) for history, skip in drawn] == [
        (3, 1, 2),
        (6, 2, 2),
    ]
    assert drawn[-1][0] == end.history


def test_a_terminal_shows_nothing(
    monkeypatch: pytest.MonkeyPatch, drawn: list[tuple[History, int]]
) -> None:
    fake = notebook(monkeypatch, kernel=None)
    fit(MINE, START, 1, [ShowGraph()])
    assert fake.shown == drawn == []


def test_a_script_shows_nothing(
    monkeypatch: pytest.MonkeyPatch, drawn: list[tuple[History, int]], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    fit(MINE, START, 1, [ShowGraph()])
    assert drawn == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("ending", "start"), [("png", PNG), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_a_path_gets_the_picture_after_every_epoch(
    ending: str, start: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "pictures" / f"losses.{ending}"
    seen: list[bytes] = []
    look = on(after_epoch=lambda state: seen.append(path.read_bytes()), order=100)
    fit(MINE, START, 2, [ShowGraph(path), look])
    assert all(content.startswith(start) for content in seen)
    assert seen[0] != seen[1]


def test_a_path_and_a_notebook(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = notebook(monkeypatch)
    fit(MINE, START, 1, [ShowGraph(str(tmp_path / "losses.png"))])
    assert len(fake.shown) == 1
    assert (tmp_path / "losses.png").read_bytes().startswith(PNG)


def test_there_is_nothing_to_draw_without_a_loss(tmp_path: Path) -> None:
    fit(MINE, START, 1, [ShowGraph(tmp_path / "a.png", skip=3)])
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = notebook(monkeypatch)
    validate(learner(callbacks=[ShowGraph()]), fit(MINE, START, 1))
    assert fake.shown == []


def test_showing_changes_nothing(tmp_path: Path) -> None:
    kept = Kept(START)
    assert_same_run(fit(MINE, START, 2, [ShowGraph(tmp_path / "a.png")]), fit(MINE, START, 2))
    kept.check()


def test_a_run_that_ends_early_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = notebook(monkeypatch)
    fit(MINE, START, 2, [ShowGraph(), on(after_loss=raise_once(CancelFit, at=6))])
    with pytest.raises(ZeroDivisionError):
        fit(MINE, START, 2, [ShowGraph(), on(after_epoch=raiser(ZeroDivisionError), order=100)])
    running = trace(MINE, START, 1, [ShowGraph()])
    states: list[State] = [state for event, state in running if event == "before_train"]
    assert "show_graph" in states[0].resources
    assert "show_graph" not in states[0].at_rest().resources
    assert (len(fake.shown), len(fake.updates)) == (3, 0)


@pytest.mark.parametrize("path", ["losses", "losses.txt", Path("losses.PNGG")])
def test_a_path_is_one_of_a_picture(path: str | Path) -> None:
    with pytest.raises(ValueError, match=r"ShowGraph: path must end in one of .*\.png"):
        ShowGraph(path)


@pytest.mark.parametrize("skip", [-1, 0.5])
def test_skip_is_a_number_of_batches(skip: Any) -> None:
    with pytest.raises(ValueError, match="ShowGraph: skip"):
        ShowGraph(skip=skip)


def test_the_epoch_that_early_stopping_ends_is_drawn(
    drawn: list[tuple[History, int]], tmp_path: Path
) -> None:
    end = fit(MINE, START, 5, [ShowGraph(tmp_path / "losses.png"), EarlyStopping(min_delta=1e9)])
    assert [len(history.rows) for history, _ in drawn] == [1, 2]
    assert len(end.history.rows) == 2
