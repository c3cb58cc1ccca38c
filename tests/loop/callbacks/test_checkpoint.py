"""Checkpoint: when it writes, what it keeps, and what happens when it cannot."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from loop import Checkpoint, State, fit, load, load_latest, lr_find, predict, validate
from loop.disk.store import checkpoints
from tests.loop.helpers import assert_same_run, full, only, raiser
from tests.loop.saving import identical

EPOCHS = 2
MINE = full()  # 3 training batches and 2 validation batches an epoch
START = MINE.init(seed=4)


@pytest.fixture(scope="module")
def end() -> State:
    """Of the run that nothing interrupts."""
    return fit(MINE, START, EPOCHS)


def same(found: State, expected: State) -> bool:
    """Whether two states are equal in every field, bit for bit."""
    return identical(vars(found), vars(expected))


def written(folder: Path) -> list[tuple[int, ...]]:
    """What was done in each checkpoint."""
    return [load(path).done for path in checkpoints(folder)]


class Clock:
    """A time.monotonic that a callback moves on by a second at every batch."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def after_batch(self, state: State) -> None:
        self.now += 1


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        (1, [(0, 0, 1), (0, 0, 2), (0, 0, 3), (1, 0, 1), (1, 0, 2), (1, 0, 3), (2,)]),
        (2, [(0, 0, 2), (1, 0, 1), (1, 0, 3), (2,)]),
        (4, [(1, 0, 1), (2,)]),
        (100, [(2,)]),
    ],
)
def test_it_writes_after_so_many_training_batches_and_at_the_end(
    batches: int, expected: list[tuple[int, ...]], tmp_path: Path
) -> None:
    fit(MINE, START, EPOCHS, [Checkpoint(tmp_path, batches=batches, epochs=None, keep=99)])
    assert written(tmp_path) == expected


@pytest.mark.parametrize(("epochs", "expected"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (7, [5])])
def test_it_writes_after_so_many_epochs_and_the_last(
    epochs: int, expected: list[int], tmp_path: Path
) -> None:
    fit(MINE, START, 5, [Checkpoint(tmp_path, epochs=epochs, keep=99)])
    assert written(tmp_path) == [(epoch,) for epoch in expected]


def test_it_writes_when_so_many_seconds_have_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock says 1, 2, 3 after training batches, 4, 5 after validation batches, and so on."""
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    fit(MINE, START, EPOCHS, [Checkpoint(tmp_path, epochs=None, seconds=2.5, keep=99), clock])
    assert written(tmp_path) == [(0, 0, 3), (1, 0, 1), (1, 1, 1), (2,)]


def test_batches_epochs_and_seconds_go_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    fit(MINE, START, EPOCHS, [Checkpoint(tmp_path, batches=2, epochs=1, seconds=3, keep=99), clock])
    assert written(tmp_path) == [(0, 0, 2), (0, 1, 2), (1,), (1, 0, 1), (1, 0, 3), (2,)]


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_stay(keep: int, tmp_path: Path) -> None:
    fit(MINE, START, EPOCHS, [Checkpoint(tmp_path, batches=1, keep=keep)])
    assert written(tmp_path) == [(1, 0, 2), (1, 0, 3), (2,)][-keep:]
    assert len(list(tmp_path.iterdir())) == keep


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(epochs=None), "nothing says when"),
        (dict(batches=0), "batches must be above 0, got 0"),
        (dict(epochs=-1), "epochs must be above 0, got -1"),
        (dict(seconds=0.0), "seconds must be above 0, got 0.0"),
        (dict(keep=0), "keep must be above 0, got 0"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Checkpoint: {message}"):
        Checkpoint("folder", **settings)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_writes_when_the_run_is_stopped(number: int, tmp_path: Path, end: State) -> None:
    press = only(
        "press",
        after_pred=lambda state: os.kill(os.getpid(), number) if state.train_iter == 4 else None,
    )
    stopped = fit(MINE, START, EPOCHS, [Checkpoint(tmp_path), press])
    assert written(tmp_path) == [(1,), (1, 0, 1)]
    assert same(load_latest(tmp_path), stopped.replace(stopped=""))
    assert same(fit(MINE, START, EPOCHS, resume=tmp_path), end)


def test_a_run_that_is_stopped_before_it_begins_leaves_nothing(tmp_path: Path, end: State) -> None:
    fit(
        MINE,
        START,
        EPOCHS,
        [Checkpoint(tmp_path), only(before_fit=lambda state: os.kill(os.getpid(), signal.SIGINT))],
    )
    assert written(tmp_path) == []
    assert same(fit(MINE, START, EPOCHS, resume=tmp_path), end)


@pytest.mark.parametrize(
    "event", ["before_batch", "after_loss", "after_step", "after_validate", "committed"]
)
def test_it_writes_when_a_callback_fails_and_the_run_goes_on_without_the_bug(
    event: str, tmp_path: Path, end: State
) -> None:
    def bug(state: State) -> None:
        if state.train_iter >= 4:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        fit(MINE, START, EPOCHS, [only("buggy", **{event: bug}), Checkpoint(tmp_path)])
    assert f"callback 'buggy' in {event}" in caught.value.__notes__[0]
    kept = load_latest(tmp_path)
    assert kept.train_iter == (6 if event == "after_validate" else 4)
    assert same(kept, caught.value.state)  # type: ignore[attr-defined]
    assert same(fit(MINE, START, EPOCHS, resume=tmp_path), end)


def test_a_second_ctrl_c_leaves_a_checkpoint_too(tmp_path: Path, end: State) -> None:
    def press_twice(state: State) -> None:
        if state.train_iter == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(MINE, START, EPOCHS, [Checkpoint(tmp_path), only(after_loss=press_twice)])
    assert same(fit(MINE, START, EPOCHS, resume=tmp_path), end)


def test_validate_predict_and_lr_find_leave_the_folder_alone(tmp_path: Path) -> None:
    mine = full(callbacks=[Checkpoint(tmp_path / "run", batches=1, seconds=1e-9)])
    validate(mine, START)
    predict(mine, START)
    lr_find(mine, START, iterations=3)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_an_error_that_says_who(
    tmp_path: Path, end: State
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError) as caught:  # noqa: PT011
        fit(MINE, START, EPOCHS, [Checkpoint(tmp_path / "file" / "run")])
    assert "by callback 'checkpoint' in around_fit, closing, epoch 0" in caught.value.__notes__[0]
    assert "by callback 'checkpoint' in committed, epoch 0" in caught.value.__context__.__notes__[0]  # type: ignore[union-attr]
    assert_same_run(fit(MINE, caught.value.state, EPOCHS, resume=True), end)  # type: ignore[attr-defined]


def test_a_stopped_run_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    press = only(
        "press",
        after_pred=lambda state: (
            os.kill(os.getpid(), signal.SIGINT) if state.train_iter == 1 else None
        ),
    )
    with pytest.raises(OSError):  # noqa: PT011
        fit(MINE, START, EPOCHS, [Checkpoint(tmp_path / "file" / "run"), press])


def test_it_writes_although_another_callback_fails_to_close(tmp_path: Path, end: State) -> None:
    class Closing:
        def __enter__(self) -> None: ...

        __exit__ = raiser(OSError("disk full"))

    with pytest.raises(OSError, match="disk full"):
        fit(
            MINE,
            START,
            EPOCHS,
            [only("other", around_train=lambda state: Closing()), Checkpoint(tmp_path)],
        )
    assert written(tmp_path) == [(0, 0, 3)]
    assert same(fit(MINE, START, EPOCHS, resume=tmp_path), end)
