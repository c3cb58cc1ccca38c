"""What SIGCHLD's handler raises waits until a file is whole, or read."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import loop.disk.store
from loop import load, save
from loop.disk.undisturbed import undisturbed
from tests.loop.saving import identical, tiny


@pytest.fixture(autouse=True)
def angry() -> Iterator[Any]:
    """A handler like torch's, when one of a loader's processes has died."""

    def handler(number: int, frame: Any) -> None:
        raise RuntimeError("DataLoader worker is killed")

    before = signal.signal(signal.SIGCHLD, handler)
    yield handler
    signal.signal(signal.SIGCHLD, before)


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGCHLD)


def test_it_is_raised_at_the_end() -> None:
    done = []

    def work() -> None:
        with undisturbed():
            die()
            done.append(1)

    with pytest.raises(RuntimeError, match="is killed"):
        work()
    assert done == [1]


def test_it_is_not_raised_where_it_does_not_matter_any_more() -> None:
    with undisturbed() as waiting:
        die()
        waiting.clear()


def test_the_handler_is_put_back_whatever_happens(angry: Any) -> None:
    with pytest.raises(ZeroDivisionError), undisturbed():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGCHLD) is angry


def test_other_threads_have_no_handlers() -> None:
    found: list[Any] = []

    def work() -> None:
        with undisturbed() as waiting:
            found.append(waiting)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [[]]


def test_what_is_raised_while_reading_is_not_taken_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tiny(1), tmp_path / "a")
    read = loop.disk.store.read

    def disturbed(*arguments: Any) -> Any:
        die()
        return read(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop.disk.store, "read", disturbed)
        with pytest.raises(RuntimeError, match="is killed"):
            load(path)
    assert identical(load(path), tiny(1))
