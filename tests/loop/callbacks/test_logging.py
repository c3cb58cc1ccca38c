"""Files that a run writes: their lines, when they are there, resuming, and that files are
closed.
"""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loop import (
    CancelEpoch,
    CancelFit,
    CSVLogger,
    DataLoaders,
    History,
    JSONLLogger,
    State,
    fit,
    fit_one_cycle,
    predict,
    trace,
    validate,
)
from loop.callbacks.parts.written import (
    common_start,
    csv_text,
    json_line,
    lines_up_to,
    rows_of_others,
)
from tests.loop.helpers import (
    Kept,
    assert_same_run,
    batches,
    full,
    learner,
    loaders,
    on,
    raise_once,
    raiser,
)

MINE = learner()
START = MINE.init()
Make = Callable[..., Any]
BOTH = pytest.mark.parametrize("make", [CSVLogger, JSONLLogger])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log"


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def number(cell: str) -> float | None:
    return float(cell) if cell else None


def test_csv_is_the_table_of_the_history_to_the_last_bit(path: Path) -> None:
    end = fit(MINE, START, 3, [CSVLogger(path)])
    assert [{name: number(cell) for name, cell in row.items()} for row in table(path)] == list(
        end.history.rows
    )
    assert path.read_text().splitlines()[0] == "epoch,train_iter,train_loss,valid_loss"
    assert path.read_text().count("\n") == 4


def test_csv_text_by_hand() -> None:
    rows = [{"epoch": 0, "a": 0.1 + 0.2}, {"epoch": 1, "a": None, 'b "c", d': 1e-30}]
    assert csv_text(rows) == 'epoch,a,"b ""c"", d"\n0,0.30000000000000004,\n1,,1e-30\n'
    assert csv_text([]) == ""


def test_what_was_not_measured_is_an_empty_cell(path: Path) -> None:
    fit(MINE, START, 1, [CSVLogger(path), on(before_epoch=raiser(CancelEpoch))])
    assert table(path) == [{"epoch": "0", "train_iter": "0", "train_loss": "", "valid_loss": ""}]


def test_a_row_is_in_the_file_when_the_epoch_ends(path: Path) -> None:
    seen: list[int] = []
    look = on(after_epoch=lambda state: seen.append(len(table(path))), order=100)
    fit(MINE, START, 3, [look, CSVLogger(path)])
    assert seen == [1, 2, 3]


def test_folders_are_made(tmp_path: Path) -> None:
    fit(MINE, START, 1, [CSVLogger(str(tmp_path / "a" / "b" / "log.csv"))])
    assert len(table(tmp_path / "a" / "b" / "log.csv")) == 1


def test_one_run_after_the_other_is_one_table(path: Path) -> None:
    end = fit(MINE, fit(MINE, START, 2, [CSVLogger(path)]), 1, [CSVLogger(path)])
    assert len(end.history.rows) == 3
    assert path.read_text() == csv_text(end.history.rows)


def test_a_new_state_begins_a_new_table(path: Path) -> None:
    fit(MINE, START, 5, [CSVLogger(path)])
    end = fit(MINE, START, 1, [CSVLogger(path)])
    assert path.read_text() == csv_text(end.history.rows)


def test_append_keeps_what_others_wrote(path: Path) -> None:
    first = fit(MINE, START, 2, [CSVLogger(path)])
    again = fit(MINE, START, 1, [CSVLogger(path, append=True)], lr=0.5)
    longer = fit(MINE, again, 1, [CSVLogger(path, append=True)])
    assert path.read_text() == csv_text([*first.history.rows, *longer.history.rows])


def test_append_to_a_table_with_other_columns(path: Path) -> None:
    path.write_text("epoch,note\n7,good\n")
    fit(MINE, START, 1, [CSVLogger(path, append=True)])
    assert [(row["epoch"], row["note"]) for row in table(path)] == [("7", "good"), ("0", "")]
    assert list(table(path)[0]) == ["epoch", "note", "train_iter", "train_loss", "valid_loss"]


def test_append_to_something_else(path: Path) -> None:
    path.write_text("a,b\n1,2,3\n")
    with pytest.raises(
        ValueError, match="CSVLogger: cannot append to .* more cells than the header"
    ):
        fit(MINE, START, 1, [CSVLogger(path, append=True)])
    assert path.read_text() == "a,b\n1,2,3\n"


def test_rows_of_others_end_where_the_history_last_began() -> None:
    text = csv_text(
        [
            {"epoch": 0, "a": 1.0},
            {"epoch": 1, "a": None},
            {"epoch": 0, "a": 1.0},
            {"epoch": 1, "a": 3.0},
        ]
    )
    assert len(rows_of_others(text, [{"epoch": 0, "a": 1.0}])) == 2
    assert len(rows_of_others(text, [{"epoch": 1, "a": None, "b": None}])) == 1
    assert len(rows_of_others(text, [{"epoch": 0, "a": 2.0}])) == 4
    assert len(rows_of_others(text, [])) == 4
    assert rows_of_others("", []) == []


def test_a_column_that_comes_later_is_in_the_header(path: Path) -> None:
    plain = learner(data=loaders(valid=None))
    middle = fit(plain, plain.init(), 1, [CSVLogger(path)])
    end = fit(MINE, middle, 1, [CSVLogger(path)])
    assert path.read_text() == csv_text(end.history.rows)
    assert [row["valid_loss"] != "" for row in table(path)] == [False, True]


def test_a_callback_that_takes_an_epoch_back_takes_its_row_back(path: Path) -> None:
    def back(state: State) -> State | None:
        return state.replace(history=START.history) if state.epoch == 1 else None

    end = fit(MINE, START, 4, [on(after_epoch=back, order=55), CSVLogger(path)])
    assert len(end.history.rows) == 2
    assert path.read_text() == csv_text(end.history.rows)


def committed_states(callbacks: list[Any], seen: Callable[[State], None]) -> State:
    mine = full()
    return fit_one_cycle(
        mine, mine.init(), 3, lr=0.01, callbacks=[*callbacks, on("watch", committed=seen)]
    )


@BOTH
@pytest.mark.parametrize("file_left_at", ["this state", "the end", "nowhere"])
def test_a_resumed_run_goes_on_with_the_file(make: Make, file_left_at: str, path: Path) -> None:
    """From every state that a run can be resumed from, and wherever the file had got to."""
    seen: list[tuple[State, str]] = []
    committed_states([make(path)], lambda state: seen.append((state, path.read_text())))
    whole = path.read_text()
    mine = full()
    assert len({state.done for state, _ in seen}) > 15
    for state, text in seen[:: 1 if file_left_at == "this state" else 3]:
        path.write_text({"this state": text, "the end": whole, "nowhere": ""}[file_left_at])
        if state.done and not (make is JSONLLogger and file_left_at == "nowhere"):
            fit_one_cycle(mine, state, 3, lr=0.01, callbacks=[make(path)], resume=True)
            assert path.read_text() == whole, state.done


@BOTH
def test_a_log_that_begins_late_has_no_line_twice(make: Make, path: Path) -> None:
    """The state has more rows than the file; a run fails when the row is written, but not yet
    committed.
    """
    with pytest.raises(KeyError) as caught:
        fit(
            MINE,
            fit(MINE, START, 2),
            1,
            [make(path), on("failing", 99, after_epoch=raiser(KeyError()))],
        )
    fit(MINE, caught.value.state, 1, [make(path)], resume=True)  # type: ignore[attr-defined]
    lines = path.read_text().splitlines()
    assert len(lines) == len({*lines})


@BOTH
def test_a_file_that_was_cut_off_in_a_line_is_mended(make: Make, path: Path) -> None:
    middle = fit(MINE, START, 1, [make(path)])
    whole = path.read_text()
    path.write_text(whole + '{"train_iter": 4, "lo')
    fit(MINE, middle, 0, [make(path)])
    assert path.read_text() == whole


@BOTH
def test_logging_changes_nothing(make: Make, path: Path) -> None:
    kept = Kept(START)
    assert_same_run(fit(MINE, START, 2, [make(path)]), fit(MINE, START, 2))
    kept.check()


@BOTH
def test_evaluation_leaves_the_file_alone(make: Make, path: Path) -> None:
    end = fit(MINE, START, 2, [make(path)])
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    mine = replace(MINE, callbacks=(make(path),))
    validate(mine, end)
    predict(mine, START)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


@BOTH
def test_evaluation_makes_no_file(make: Make, path: Path) -> None:
    validate(replace(MINE, callbacks=(make(path),)), START)
    assert not path.exists()


def opened(files: list[Any]) -> Any:
    """A callback that gets hold of the logger's file."""

    def look(state: State) -> None:
        (resource,) = (value for name, value in state.resources.items() if name.endswith("logger"))
        files.append(getattr(resource, "file", resource))
        assert not files[-1].closed

    return on("look", before_fit=look, order=-1)


@BOTH
@pytest.mark.parametrize(
    "event", ["before_fit", "before_train", "after_loss", "after_step", "after_epoch", "after_fit"]
)
def test_the_file_is_closed_after_an_error(make: Make, event: str, path: Path) -> None:
    files: list[Any] = []
    with pytest.raises(ZeroDivisionError):
        fit(MINE, START, 1, [make(path), opened(files), on(**{event: raiser(ZeroDivisionError)})])
    assert files[0].closed


@BOTH
@pytest.mark.parametrize(
    "event", ["before_fit", "before_epoch", "after_pred", "after_batch", "after_validate"]
)
def test_the_file_is_closed_after_a_signal(make: Make, event: str, path: Path) -> None:
    files: list[Any] = []
    fit(
        MINE, START, 1, [make(path), opened(files), on(**{event: raise_once(CancelFit)}, order=100)]
    )
    assert files[0].closed


@BOTH
def test_the_file_is_closed_after_a_trace(make: Make, path: Path) -> None:
    files: list[Any] = []
    running = trace(MINE, START, 1, [make(path), opened(files)])
    next(event for event, _ in running if event == "after_step")
    running.close()
    assert files[0].closed


def test_jsonl_has_a_line_for_every_batch_and_epoch(path: Path) -> None:
    end = fit(MINE, START, 2, [JSONLLogger(path)])
    losses = [float(loss) for loss in end.history.losses]
    lines = [
        {"train_iter": at, "loss": loss, "lr": 0.1, "mom": 0.9}
        for at, loss in enumerate(losses, start=1)
    ]
    assert entries(path) == [*lines[:3], end.history.rows[0], *lines[3:], end.history.rows[1]]


@pytest.mark.parametrize(
    ("every", "expected"), [(0, []), (1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (4, [4])]
)
def test_jsonl_every_so_many_batches(every: int, expected: list[int], path: Path) -> None:
    fit(MINE, START, 2, [JSONLLogger(path, every)])
    assert [entry["train_iter"] for entry in entries(path) if "epoch" not in entry] == expected
    assert [entry["epoch"] for entry in entries(path) if "epoch" in entry] == [0, 1]


def test_a_batch_is_in_the_file_when_it_ends(path: Path) -> None:
    seen: list[int] = []
    fit(
        MINE,
        START,
        1,
        [
            JSONLLogger(path),
            on(after_batch=lambda state: seen.append(len(entries(path))), order=100),
        ],
    )
    assert seen == [1, 2, 3, 3, 3]


def test_json_has_null_where_there_is_no_number(path: Path) -> None:
    data = batches(1, seed=1)
    mine = learner(data=DataLoaders([(data[0][0] * float("inf"), data[0][1])], data))
    fit(mine, mine.init(), 1, [JSONLLogger(path)])
    assert "NaN" not in path.read_text()
    assert [entry.get("loss", "-") for entry in entries(path)] == [None, "-"]
    assert (
        json_line({"a": float("-inf"), "b": None, "c": True})
        == '{"a": null, "b": null, "c": true}\n'
    )


def test_lines_up_to_by_hand() -> None:
    lines = [
        '{"train_iter": 1}\n',
        '{"train_iter": 1, "epoch": 0}\n',
        '{"train_iter": 2}\n',
        '{"train_iter": 2, "ep',
    ]
    rows = [{"epoch": 0, "train_iter": 1}]
    assert lines_up_to(lines, train_iter=1, rows=rows) == lines[:2]
    assert lines_up_to(lines, train_iter=1, rows=[]) == lines[:1]
    assert lines_up_to(lines, train_iter=5, rows=rows) == lines[:3]
    assert lines_up_to([*lines[:2], lines[1]], train_iter=1, rows=rows) == lines[:2]
    assert lines_up_to(lines, train_iter=0, rows=[]) == []


def test_what_two_texts_begin_with() -> None:
    text = bytes(range(9))
    for size in range(10):
        assert common_start(text, text[:size]) == common_start(text[:size], text) == size
        assert common_start(text, text[:size] + b"x" * 9) == size


@pytest.mark.parametrize("text", ["epoch,train_iter\n", "[1]\n", '{"epoch": 1}\n', "3\n"])
def test_jsonl_does_not_overwrite_something_else(text: str, path: Path) -> None:
    path.write_text(text)
    with pytest.raises(ValueError, match="JSONLLogger: .* is not its log"):
        fit(MINE, START, 1, [JSONLLogger(path)])
    assert path.read_text() == text


@pytest.mark.parametrize("every", [-1, 1.5, None])
def test_every_is_a_number_of_batches(every: Any, path: Path) -> None:
    with pytest.raises(ValueError, match="JSONLLogger: every"):
        JSONLLogger(path, every)


def test_without_a_history_there_are_no_rows(path: Path) -> None:
    fit(MINE, START.replace(history=History()), 0, [CSVLogger(path)])
    assert path.read_text() == ""
