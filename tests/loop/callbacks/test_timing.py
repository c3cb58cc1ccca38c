"""Timer and Profiler: what they count, on whatever way out, and that they change nothing."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from loop import CancelBatch, CancelFit, CancelTrain, Profiler, State, Timer, fit, trace, validate
from loop.callbacks.timing import PARTS, Times
from tests.loop.helpers import Kept, assert_same_run, learner, loaders, on, raise_once, raiser

MINE = learner()
START = MINE.init()


def clock() -> Any:
    """A clock that is a second later every time somebody looks at it."""
    ticks = count()
    return lambda: float(next(ticks))


def measured(epochs: int, *callbacks: Any, mine: Any = MINE) -> Times:
    """The times of a run, in looks at the clock: a part without parts in it takes 1."""
    kept: list[Times] = []
    fit(mine, mine.init(), epochs, [Timer(report=kept.append, clock=clock()), *callbacks])
    (times,) = kept
    return times


def test_every_part_is_counted() -> None:
    assert measured(2).counts == {
        **{"fit": 1, "epoch": 2, "train": 2, "validate": 2, "train batch": 6, "validate batch": 4},
        **{f"train [{stage}]": 6 for stage in ("predict", "loss", "gradients", "update")},
        **{f"validate [{stage}]": 4 for stage in ("predict", "loss")},
    }


def test_seconds_by_hand() -> None:
    """Four stages of 1 make a batch of 9 (two looks each, and the last); three of them a phase of
    31.
    """
    times = measured(1)
    assert times.seconds["train [predict]"] == 3
    assert times.seconds["train batch"] == 3 * 9
    assert times.seconds["train"] == 3 * 10 + 1
    assert times.seconds["validate batch"] == 2 * 5
    assert times.seconds["validate"] == 2 * 6 + 1
    assert times.seconds["epoch"] == 31 + 13 + 3
    assert times.seconds["fit"] == 47 + 2


def test_what_is_between_batches() -> None:
    rows = measured(1).rows()
    assert rows["train between"] == (3, 31 - 27)
    assert rows["validate between"] == (2, 13 - 10)


def test_rows_stand_in_the_order_of_a_run() -> None:
    assert tuple(measured(1).rows()) == tuple(
        part for part in PARTS if part not in ("validate [gradients]", "validate [update]")
    )


def test_the_table_by_hand() -> None:
    times = Times()
    for part, seconds in (("train batch", 0.25), ("train batch", 0.75), ("fit", 2.0)):
        times.add(part, seconds)
    assert str(times).splitlines() == [
        "part                   times     seconds     ms each",
        "fit                        1       2.000    2000.000",
        "train batch                2       1.000     500.000",
    ]


def test_it_is_printed_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    fit(MINE, START, 1, [Timer()])
    assert "train [update]             3" in capsys.readouterr().out


def test_times_are_those_of_the_clock() -> None:
    """Of the real one: batches are part of a phase, which is part of the run."""
    kept: list[Times] = []
    fit(MINE, START, 1, [Timer(report=kept.append)])
    seconds = kept[0].seconds
    assert (
        0 < seconds["train [predict]"] < seconds["train batch"] < seconds["train"] < seconds["fit"]
    )


@pytest.mark.parametrize("signal", [CancelBatch, CancelTrain, CancelFit])
def test_parts_that_are_cancelled_are_counted(signal: type[Exception]) -> None:
    times = measured(1, on(after_loss=raise_once(signal, at=1)))
    assert times.counts["train batch"] == (3 if signal is CancelBatch else 2)
    assert times.counts["train [gradients]"] == (2 if signal is CancelBatch else 1)
    assert times.counts["train"] == times.counts["epoch"] == times.counts["fit"] == 1


def test_an_error_is_reported_after() -> None:
    kept: list[Times] = []
    with pytest.raises(ZeroDivisionError):
        fit(
            MINE,
            START,
            1,
            [Timer(report=kept.append, clock=clock()), on(after_pred=raiser(ZeroDivisionError))],
        )
    assert kept[0].counts == {
        "train [predict]": 1,
        "train batch": 1,
        "train": 1,
        "epoch": 1,
        "fit": 1,
    }


def test_the_clock_is_not_in_the_state() -> None:
    kept = Kept(START)
    end = fit(MINE, START, 2, [Timer(report=lambda times: None)])
    assert_same_run(end, fit(MINE, START, 2))
    assert set(end.memory) == {"recorder"}
    kept.check()


def test_an_evaluation_is_not_measured() -> None:
    mine = learner(
        callbacks=[Timer(report=raiser(ZeroDivisionError), clock=raiser(ZeroDivisionError))]
    )
    assert validate(mine, START) == validate(MINE, START)


def test_other_handlers_count_in_the_scope_that_they_are_in() -> None:
    tick = clock()
    kept: list[Times] = []
    slow = on("slow", order=-500, before_batch=lambda state: [tick() for _ in range(100)] and None)
    fit(MINE, START, 1, [slow, Timer(report=kept.append, clock=tick)])
    assert kept[0].seconds["train batch"] == 3 * 109


def test_brackets_of_others_count_too() -> None:
    tick = clock()
    kept: list[Times] = []

    @contextmanager
    def slow(state: State) -> Iterator[None]:
        for _ in range(100):
            tick()
        yield

    fit(
        MINE,
        START,
        1,
        [on("slow", around_update=slow, around_epoch=slow), Timer(kept.append, clock=tick)],
    )
    assert kept[0].seconds["train [update]"] == 3 * 101
    assert kept[0].seconds["epoch"] == 47 + 3 * 100 + 100


def test_a_device_is_waited_for_only_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[Any] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waits.append)
    monkeypatch.setattr("loop.callbacks.timing.device_of", lambda state: torch.device("meta"))
    fit(MINE, START, 1, [Timer(report=lambda times: None)])
    assert waits == []
    kept: list[Times] = []
    fit(MINE, START, 1, [Timer(report=kept.append, wait=True)])
    assert len(waits) == 2 * sum(kept[0].counts.values())


def profiled(epochs: int, *callbacks: Any, **options: Any) -> list[str]:
    """What a Profiler reports of a run."""
    texts: list[str] = []
    fit(MINE, START, epochs, [Profiler(report=texts.append, **options), *callbacks])
    return texts


def calls(table: str) -> dict[str, int]:
    """Row -> number of calls."""
    rows = [line.split() for line in table.splitlines() if "%" in line and "CPU" not in line]
    return {row[0]: int(row[-1]) for row in rows}


def test_the_table_has_the_stages_of_the_recorded_batches() -> None:
    """Batches 2, 3 and 4 of training, with the validation between them, which is two batches."""
    (table,) = profiled(3, wait=1, warmup=1, active=3, rows=100)
    found = calls(table)
    assert found["ProfilerStep*"] == 3
    assert found["[gradients]"] == found["[update]"] == 3
    assert found["[predict]"] == found["[loss]"] == 3 + 2
    assert "aten::addmm" in found


def test_the_table_has_so_many_rows() -> None:
    (table,) = profiled(2, rows=3)
    assert len(calls(table)) == 3


def test_memory_is_a_column_if_asked() -> None:
    assert "CPU Mem" not in profiled(2)[0]
    assert "CPU Mem" in profiled(2, memory=True)[0]


def test_a_trace_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a" / "trace.json"
    assert profiled(2, path=path) == []
    names = [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]
    assert names.count("[update]") == 3


@pytest.mark.parametrize(("wait", "recorded"), [(2, 3), (3, 2), (4, 1)])
def test_a_run_that_ends_while_it_is_recorded(wait: int, recorded: int) -> None:
    (table,) = profiled(2, wait=wait, warmup=1, active=5, rows=100)
    assert calls(table)["[update]"] == recorded


@pytest.mark.parametrize("wait", [5, 6, 100])
def test_a_run_that_ends_before(wait: int) -> None:
    assert profiled(2, wait=wait, warmup=1) == [
        f"Profiler: nothing was recorded: the run has no more than {wait + 1} batches."
    ]


@pytest.fixture
def _idle() -> Iterator[None]:
    yield
    assert not torch.autograd._profiler_enabled()


@pytest.mark.usefixtures("_idle")
@pytest.mark.parametrize("at", range(5))
def test_the_profiler_is_off_after_an_error(at: int) -> None:
    with pytest.raises(ZeroDivisionError):
        profiled(2, on(after_loss=raise_once(ZeroDivisionError, at)), wait=0)


@pytest.mark.usefixtures("_idle")
def test_the_profiler_is_off_after_a_signal_and_after_a_trace() -> None:
    profiled(2, on(after_loss=raise_once(CancelFit, at=2)), wait=0)
    running = trace(MINE, START, 2, [Profiler(wait=0, report=lambda text: None)])
    seen = (event for event, _ in running if event == "after_step")
    next(seen), next(seen), next(seen)
    assert torch.autograd._profiler_enabled()
    running.close()


def test_profiling_changes_nothing() -> None:
    assert_same_run(fit(MINE, START, 2, [Profiler(report=lambda text: None)]), fit(MINE, START, 2))


def test_profiler_and_timer_in_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    fit(MINE, START, 2, [Timer(), Profiler()])
    assert "train [update]" in capsys.readouterr().out


def test_an_evaluation_is_not_profiled() -> None:
    mine = learner(data=loaders(), callbacks=[Profiler(report=raiser(ZeroDivisionError))])
    assert validate(mine, START) == validate(MINE, START)


@pytest.mark.parametrize(
    "options", [{"wait": -1}, {"warmup": 0}, {"active": 0}, {"rows": 0}, {"active": 1.5}]
)
def test_numbers_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"Profiler: {next(iter(options))} must be a whole number"):
        Profiler(**options)


def test_a_batch_cancelled_by_an_outer_signal_is_a_step_too() -> None:
    steps: list[int] = []

    def look(state: State) -> None:
        steps.append(state.resources["profiler"].step_num)

    fit(
        MINE,
        START,
        1,
        [
            Profiler(report=lambda text: None),
            on(after_loss=raise_once(CancelTrain), after_train=look),
        ],
    )
    assert steps == [1]
