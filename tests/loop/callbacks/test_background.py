"""Checkpoint(background=True): the run goes on while a thread writes."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import loop.disk.store
from loop import Checkpoint, State, fit, load, load_latest
from loop.disk.store import checkpoints
from tests.loop.helpers import full, on
from tests.loop.saving import identical, same

EPOCHS = 2
MINE = full()  # 3 training batches and 2 validation batches an epoch
START = MINE.init(seed=4)
PATIENCE = 30.0


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
def test_it_writes_the_states_that_it_would_write_at_once(donate: bool, tmp_path: Path) -> None:
    for name, background in (("now", False), ("behind", True)):
        keep = Checkpoint(tmp_path / name, batches=1, keep=99, background=background)
        fit(MINE, MINE.init(seed=4), EPOCHS, [keep], donate=donate)
    now, behind = (checkpoints(tmp_path / name) for name in ("now", "behind"))
    assert [path.name for path in behind] == [path.name for path in now]
    assert len(now) == 8
    assert all(same(load(one), load(other)) for one, other in zip(now, behind, strict=True))
    assert same(fit(MINE, START, EPOCHS, resume=tmp_path / "behind"), fit(MINE, START, EPOCHS))


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, list[Any]]]:
    """Writing waits for the event; the list gets the threads that write."""
    event, threads = threading.Event(), list[Any]()
    write: Callable[..., None] = loop.disk.store.write

    def waiting(*args: Any) -> None:
        threads.append(threading.current_thread())
        assert event.wait(PATIENCE)
        write(*args)

    monkeypatch.setattr(loop.disk.store, "write", waiting)
    yield event, threads
    event.set()


def test_the_run_goes_on_meanwhile(slow: tuple[threading.Event, list[Any]], tmp_path: Path) -> None:
    event, threads = slow

    def later(state: State) -> None:
        if state.train_iter == 1:
            assert not checkpoints(tmp_path)  # the state after the first batch is being written
            event.set()

    keep = Checkpoint(tmp_path, batches=1, keep=99, background=True)
    end = fit(MINE, START, 1, [keep, on("early", after_step=later)])
    assert [load(path).train_iter for path in checkpoints(tmp_path)] == [1, 2, 3, 3]
    assert threading.main_thread() not in threads
    assert identical(load_latest(tmp_path).params, end.params)


def test_the_last_state_is_waited_for_and_written(tmp_path: Path) -> None:
    def stop(state: State) -> None:
        if state.train_iter == 2:
            raise ZeroDivisionError

    keep = Checkpoint(tmp_path, batches=1, background=True)
    with pytest.raises(ZeroDivisionError):
        fit(MINE, START, EPOCHS, [keep, on("buggy", before_batch=stop)])
    assert load_latest(tmp_path).train_iter == 2


def test_what_goes_wrong_ends_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full_disk(*args: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(loop.disk.store, "write", full_disk)
    seen: list[int] = []
    keep = Checkpoint(tmp_path, batches=1, background=True)
    count = on("count", after_batch=lambda state: seen.append(state.train_iter))
    with pytest.raises(OSError, match="no space left"):
        fit(MINE, START, 5, [keep, count])
    assert len(seen) < 15
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_saved_is_an_error_at_once(tmp_path: Path) -> None:
    keep = Checkpoint(tmp_path, batches=1, background=True)
    put = on("odd", after_batch=lambda state: state.remember("odd", torch.nn.Linear(1, 1)))
    with pytest.raises(TypeError, match="odd"):
        fit(MINE, START, EPOCHS, [keep, put])
