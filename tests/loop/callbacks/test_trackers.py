"""Numbers for trackers: what a state reports, when it is read, and who gets it."""

import importlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loop import (
    CancelBatch,
    CancelFit,
    History,
    JSONLLogger,
    TensorBoardLogger,
    TrackerLogger,
    accuracy,
    fit,
    fit_one_cycle,
    predict,
    trace,
    validate,
)
from loop.callbacks import logging
from loop.callbacks.parts.written import numbers_of
from tests.loop.helpers import (
    Kept,
    assert_same_run,
    learner,
    loaders,
    losses,
    on,
    raise_once,
    raiser,
)

MINE = learner()
START = MINE.init()


def test_numbers_of_a_batch_are_its_loss_and_hypers() -> None:
    hyper = {
        "lr": {"head": torch.tensor(0.5), "body": [0.25, 0.125]},
        "steps": 3,
        "mode": "fast",
        "none": None,
    }
    state = START.replace(
        xb=(torch.ones(2),), loss=torch.tensor(2.0, requires_grad=True), hyper=hyper
    )
    kept = Kept(state)
    found = numbers_of(state)
    assert found == {
        "loss": 2.0,
        "lr/body/0": 0.25,
        "lr/body/1": 0.125,
        "lr/head": 0.5,
        "steps": 3.0,
    }
    assert {type(value) for value in found.values()} == {float}
    kept.check()


def test_equal_values_of_a_tree_are_reported_once() -> None:
    """A rate for every parameter, of which there are hundreds: one number for each layer group."""
    rates = {f"body.{index}": 0.1 for index in range(200)} | {"head.0": 0.5, "head.1": 0.5}
    state = START.replace(xb=(), loss=torch.tensor(2.0), hyper={"lr": rates})
    assert numbers_of(state) == {"loss": 2.0, "lr/body.0": 0.1, "lr/head.0": 0.5}


def test_of_many_different_values_only_the_ends_are_reported() -> None:
    rates = {f"layer.{index}": 0.5 + index for index in range(200)}
    state = START.replace(xb=(), loss=torch.tensor(2.0), hyper={"lr": rates})
    assert numbers_of(state) == {"loss": 2.0, "lr/lowest": 0.5, "lr/highest": 199.5}


def test_numbers_of_an_epoch_are_its_row() -> None:
    rows = (
        {"epoch": 0, "valid_loss": 9.0},
        {"epoch": 1, "train_iter": 6, "train_loss": 0.5, "valid_loss": None},
    )
    assert numbers_of(START.replace(history=History(rows=rows))) == {
        "epoch": 1.0,
        "train_loss": 0.5,
    }


def test_a_new_state_has_nothing_to_report() -> None:
    assert numbers_of(START) == {}


def test_several_elements_are_no_number() -> None:
    hyper = {"lr": torch.ones(2), "one": torch.ones(1, 1), "few": torch.tensor(3)}
    assert numbers_of(START.replace(xb=(), hyper=hyper)) == {"one": 1.0, "few": 3.0}


class Wandb:
    """Takes what wandb.log takes: steps never go back, and what comes for one step is one entry."""

    def __init__(self) -> None:
        self.entries: dict[int, dict[str, Any]] = {}

    def log(
        self, data: dict[str, Any], step: int | None = None, commit: bool | None = None
    ) -> None:
        """Log."""
        assert step is not None
        assert not self.entries or step >= max(self.entries)
        assert not set(data) & set(self.entries.get(step, {}))
        self.entries.setdefault(step, {}).update(data)


class Mlflow:
    """Takes what mlflow.log_metrics takes: floats, by names of certain letters."""

    def __init__(self) -> None:
        self.metrics: list[tuple[str, float, int]] = []

    def log_metrics(
        self,
        metrics: dict[str, float],
        step: int | None = None,
        synchronous: bool | None = None,
        run_id: str = "",
    ) -> None:
        """Log."""
        assert step is not None
        for name, value in metrics.items():
            assert type(value) is float
            assert all(letter.isalnum() or letter in "_-. /" for letter in name)
            self.metrics.append((name, value, step))


def test_wandb_gets_batches_and_epochs() -> None:
    wandb = Wandb()
    end = fit_one_cycle(MINE, START, 2, lr=0.1, callbacks=[TrackerLogger(wandb.log, every=1)])
    assert sorted(wandb.entries) == [1, 2, 3, 4, 5, 6]
    assert [wandb.entries[step]["loss"] for step in range(1, 7)] == losses(end)
    assert [wandb.entries[step]["lr"] for step in range(1, 7)] == list(end.history.hypers["lr"])
    for step, row in zip((3, 6), end.history.rows, strict=True):
        assert {
            name: wandb.entries[step][name] for name in ("epoch", "train_loss", "valid_loss")
        } == {name: value for name, value in row.items() if name != "train_iter"}
    assert set(wandb.entries[2]) == {"loss", "lr", "mom"}


def test_mlflow_gets_floats_by_lawful_names() -> None:
    mlflow = Mlflow()
    fit(MINE, START, 1, [TrackerLogger(mlflow.log_metrics, every=2)], lr={"weight": 0.1, "bias": 1})
    assert [(name, step) for name, _, step in mlflow.metrics] == [
        *[("loss", 2), ("mom", 2), ("lr/bias", 2), ("lr/weight", 2)],
        *[("epoch", 3), ("train_loss", 3), ("valid_loss", 3)],
    ]


@pytest.mark.parametrize(("every", "steps"), [(0, []), (2, [2, 4, 6]), (4, [4]), (10, [])])
def test_batches_are_counted_over_runs(every: int, steps: list[int]) -> None:
    seen: list[int] = []
    log = TrackerLogger(
        lambda numbers, step: seen.append(step) if "loss" in numbers else None, every
    )
    fit(MINE, fit(MINE, START, 1, [log]), 1, [log])
    assert seen == steps


def test_a_tracker_hears_nothing_of_an_evaluation() -> None:
    mine = learner(callbacks=[TrackerLogger(raiser(ZeroDivisionError), every=1)])
    validate(mine, START)
    predict(mine, START)


def test_a_batch_without_a_loss_is_passed_over() -> None:
    seen: list[int] = []
    log = TrackerLogger(lambda numbers, step: seen.append(step), every=1)
    fit(
        learner(data=loaders(valid=None)),
        START,
        1,
        [log, on(after_pred=raise_once(CancelBatch, at=1))],
    )
    assert seen == [1, 3, 3]


def test_an_error_of_a_tracker_says_where_it_came_from() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        fit(MINE, START, 1, [TrackerLogger(raiser(ZeroDivisionError), every=2)])
    assert any(
        "'tracker_logger' in after_batch, training batch 1 of epoch 0" in note
        for note in caught.value.__notes__
    )


class Reads(TorchDispatchMode):
    """Count how often a tensor is read as a number, for which a device would be waited for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def reads(*callbacks: Any) -> int:
    with Reads() as mode:
        fit(MINE, START, 4, callbacks)
    return mode.count


LOGGERS: list[Callable[[int, Path], Any]] = [
    lambda every, path: TrackerLogger(lambda numbers, step: None, every),
    lambda every, path: JSONLLogger(path / "log", every),
]


@pytest.mark.parametrize("make", LOGGERS)
@pytest.mark.parametrize(("every", "times"), [(0, 0), (1, 12), (5, 2), (100, 0)])
def test_a_loss_is_read_for_the_batches_that_are_written_and_no_other(
    make: Callable[[int, Path], Any], every: int, times: int, tmp_path: Path
) -> None:
    assert reads(make(every, tmp_path)) - reads() == times


@pytest.mark.parametrize("log", [None, "wandb", {}])
def test_log_is_a_function(log: Any) -> None:
    with pytest.raises(TypeError, match="TrackerLogger: log must be a function"):
        TrackerLogger(log)


@pytest.mark.parametrize(
    "make", [lambda every: TrackerLogger(print, every), lambda every: TensorBoardLogger("", every)]
)
def test_every_is_a_number_of_batches(make: Callable[[Any], Any]) -> None:
    for every in (-1, 0.5, None):
        with pytest.raises(ValueError, match="Logger: every must be a number of batches"):
            make(every)


def test_without_tensorboard_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        TensorBoardLogger("runs")


@pytest.fixture
def scalars(tmp_path: Path) -> Callable[[], dict[str, list[tuple[int, float]]]]:
    """What TensorBoard would show of a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what tensorboard imports
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        importlib.import_module("torch.utils.tensorboard")

    def read() -> dict[str, list[tuple[int, float]]]:
        events = accumulator.EventAccumulator(str(tmp_path))
        events.Reload()
        return {
            tag: [(entry.step, entry.value) for entry in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
        }

    return read


Scalars = Callable[[], dict[str, list[tuple[int, float]]]]


def test_tensorboard_shows_losses_hypers_and_rows(tmp_path: Path, scalars: Scalars) -> None:
    end = fit(MINE, START, 2, [TensorBoardLogger(tmp_path, every=1)])
    found = scalars()
    assert set(found) == {"loss", "lr", "mom", "epoch", "train_loss", "valid_loss"}
    assert found["loss"] == [*enumerate(losses(end), start=1)]
    assert found["valid_loss"] == [
        (row["train_iter"], pytest.approx(row["valid_loss"])) for row in end.history.rows
    ]


def test_tensorboard_shows_two_runs_as_one(tmp_path: Path, scalars: Scalars) -> None:
    """And hides what the state from which the second run begins has not come to."""
    middle = fit(MINE, START, 1, [TensorBoardLogger(tmp_path, every=1)])
    fit(MINE, middle, 2, [TensorBoardLogger(tmp_path, every=1)], lr=0.7)
    end = fit(MINE, middle, 1, [TensorBoardLogger(tmp_path, every=1)])
    assert scalars()["loss"] == [*enumerate(losses(end), start=1)]
    assert [step for step, _ in scalars()["valid_loss"]] == [3, 6]


def test_tensorboard_changes_nothing(tmp_path: Path, scalars: Scalars) -> None:
    assert_same_run(fit(MINE, START, 2, [TensorBoardLogger(tmp_path)]), fit(MINE, START, 2))


class Writer:
    """A SummaryWriter that writes nothing."""

    def __init__(self, log_dir: str, purge_step: int) -> None:
        self.closed, self.steps = False, [purge_step]

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Take note."""
        assert not self.closed
        self.steps.append(step)

    def close(self) -> None:
        """Close."""
        self.closed = True


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> list[Writer]:
    made: list[Writer] = []

    def make(log_dir: str, purge_step: int) -> Writer:
        made.append(Writer(log_dir, purge_step))
        return made[-1]

    monkeypatch.setattr(logging, "_summary_writer", lambda: make)
    return made


@pytest.mark.parametrize(
    "event", ["before_fit", "after_loss", "after_step", "after_epoch", "after_fit"]
)
def test_the_writer_is_closed_after_an_error(event: str, writers: list[Writer]) -> None:
    with pytest.raises(ZeroDivisionError):
        fit(MINE, START, 1, [TensorBoardLogger("runs"), on(**{event: raiser(ZeroDivisionError)})])
    assert [writer.closed for writer in writers] == [True]


def test_the_writer_is_closed_after_a_signal_and_after_a_trace(writers: list[Writer]) -> None:
    fit(MINE, START, 1, [TensorBoardLogger("runs"), on(after_loss=raise_once(CancelFit))])
    running = trace(MINE, START, 1, [TensorBoardLogger("runs")])
    next(event for event, _ in running if event == "after_step")
    running.close()
    assert [writer.closed for writer in writers] == [True, True]


def test_tensorboard_hears_nothing_of_an_evaluation(writers: list[Writer]) -> None:
    validate(
        learner(
            callbacks=[TensorBoardLogger("runs")], metrics=[lambda pred, y: accuracy(pred, y[:, 0])]
        ),
        START,
    )
    assert writers == []
