"""Checkpoint: when it writes, what it keeps, and what happens when it cannot."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import loop.disk.store
from loop import CancelFit, Checkpoint, State, fit, load, load_latest, lr_find, predict, validate
from loop.disk.store import checkpoints
from tests.loop.helpers import assert_same_run, full, on, raiser
from tests.loop.saving import same

EPOCHS = 2
MINE = full()  # 3 training batches and 2 validation batches an epoch
START = MINE.init(seed=4)


@pytest.fixture(scope="module")
def end() -> State:
    """Of the run that nothing interrupts."""
    return fit(MINE, START, EPOCHS)


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
    press = on(
        "press",
        after_pred=lambda state: os.kill(os.getpid(), number) if state.train_iter == 4 else None,
    )
    stopped = fit(MINE, START, EPOCHS, [Checkpoint(tmp_path), press], stop="return")
    assert written(tmp_path) == [(1,), (1, 0, 1)]
    assert same(load_latest(tmp_path), stopped.replace(stopped=""))
    assert same(fit(MINE, START, EPOCHS, resume=tmp_path), end)


def test_a_run_that_is_stopped_before_it_begins_leaves_nothing(tmp_path: Path, end: State) -> None:
    press = on(before_fit=lambda state: os.kill(os.getpid(), signal.SIGINT))
    fit(MINE, START, EPOCHS, [Checkpoint(tmp_path), press], stop="return")
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
        fit(MINE, START, EPOCHS, [on("buggy", **{event: bug}), Checkpoint(tmp_path)])
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
        fit(MINE, START, EPOCHS, [Checkpoint(tmp_path), on(after_loss=press_twice)])
    assert same(fit(MINE, START, EPOCHS, resume=tmp_path), end)


def test_validate_predict_and_lr_find_leave_the_folder_alone(tmp_path: Path) -> None:
    mine = full(callbacks=[Checkpoint(tmp_path / "run", batches=1, seconds=1e-9)])
    validate(mine, START)
    predict(mine, START)
    lr_find(mine, START, iterations=3)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_an_error_before_the_first_event(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("in the way")
    watch = on("watch", before_fit=lambda state: pytest.fail("the run has begun"))
    with pytest.raises(OSError, match=r"file") as caught:
        fit(MINE, START, EPOCHS, [Checkpoint(tmp_path / "file" / "run"), watch])
    assert "by callback 'checkpoint' in around_fit, epoch 0" in caught.value.__notes__[0]


def in_the_way(folder: Path, batch: int) -> Any:
    """A callback that puts a file in the place of the folder while the run goes on."""

    def replace(state: State) -> None:
        if state.train_iter == batch:
            folder.rmdir()
            folder.write_text("in the way")

    return on("replace", 0, after_loss=replace)


def test_a_folder_that_is_gone_is_an_error_that_says_who(tmp_path: Path, end: State) -> None:
    folder = tmp_path / "run"
    with pytest.raises(OSError) as caught:  # noqa: PT011
        fit(MINE, START, EPOCHS, [Checkpoint(folder), in_the_way(folder, 1)])
    assert "by callback 'checkpoint' in around_fit, closing, epoch 0" in caught.value.__notes__[0]
    assert "by callback 'checkpoint' in committed, epoch 0" in caught.value.__context__.__notes__[0]  # type: ignore[union-attr]
    assert_same_run(fit(MINE, caught.value.state, EPOCHS, resume=True), end)  # type: ignore[attr-defined]


def test_a_stopped_run_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    press = on(
        "press",
        after_pred=lambda state: (
            os.kill(os.getpid(), signal.SIGINT) if state.train_iter == 1 else None
        ),
    )
    with pytest.raises(OSError):  # noqa: PT011
        fit(MINE, START, EPOCHS, [Checkpoint(folder), press, in_the_way(folder, 0)])


@pytest.mark.parametrize("event", ["before_fit", "before_epoch", "after_batch", "after_train"])
def test_memory_that_cannot_be_saved_is_an_error_as_soon_as_it_is_there(
    tmp_path: Path, event: str
) -> None:
    batches: list[int] = []
    watch = on("watch", after_loss=lambda state: batches.append(state.train_iter))
    bad = on("bad", **{event: lambda state: state.remember("bad", {1, 2})})
    with pytest.raises(TypeError, match=r"save: memory\['bad'\] is of type set") as caught:
        fit(MINE, START, EPOCHS, [Checkpoint(tmp_path, epochs=9), bad, watch])
    assert len(batches) == {"after_batch": 1, "after_train": 3}.get(event, 0)
    assert "callback 'checkpoint' in committed" in str(caught.value.__context__.__notes__)  # type: ignore[union-attr]


def test_a_loaders_process_that_dies_while_it_writes_is_told_of_when_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch's handler of SIGCHLD does, wherever the program is."""
    dying(monkeypatch)
    with pytest.raises(RuntimeError, match="DataLoader worker is killed"):
        fit(MINE, START, EPOCHS, [Checkpoint(tmp_path)])
    assert written(tmp_path) == [(1,)]


def test_a_loaders_process_that_dies_while_the_last_is_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying(monkeypatch)
    press = on("press", after_loss=raiser(CancelFit))
    fit(MINE, START, EPOCHS, [Checkpoint(tmp_path, epochs=9), press])
    assert written(tmp_path) == [(0, 0, 0)]


def dying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a child process end while a checkpoint is written, and torch's handler hear of it."""

    def handler(number: int, frame: Any) -> None:
        raise RuntimeError("DataLoader worker is killed by signal: Killed.")

    def write(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGCHLD)
        really(*arguments)

    really = loop.disk.store.write
    monkeypatch.setattr(loop.disk.store, "write", write)
    before = signal.signal(signal.SIGCHLD, handler)
    _PUT_BACK.append(before)


_PUT_BACK: list[Any] = []


@pytest.fixture(autouse=True)
def _handler_put_back() -> Iterator[None]:
    yield
    while _PUT_BACK:
        signal.signal(signal.SIGCHLD, _PUT_BACK.pop())


def test_it_writes_although_another_callback_fails_to_close(tmp_path: Path, end: State) -> None:
    class Closing:
        def __enter__(self) -> None: ...

        __exit__ = raiser(OSError("disk full"))

    with pytest.raises(OSError, match="disk full"):
        fit(
            MINE,
            START,
            EPOCHS,
            [on("other", around_train=lambda state: Closing()), Checkpoint(tmp_path)],
        )
    assert written(tmp_path) == [(0, 0, 3)]
    assert same(fit(MINE, START, EPOCHS, resume=tmp_path), end)
