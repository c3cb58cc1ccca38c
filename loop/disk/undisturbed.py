"""Write and read in peace: what another process's end raises waits until that is done."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def undisturbed() -> Iterator[list[Any]]:
    """Let SIGCHLD wait while this is open; the list gets what comes, and its handler is called at
    the end for what is still in it.

    torch's handler raises an error, wherever the program is, when a loader's process has died: in
    the middle of a save that has nothing to do with it. In another thread than the main one no
    handler runs.
    """
    waiting: list[Any] = []
    heard: Any = None
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        heard = signal.getsignal(signal.SIGCHLD)
    if not callable(heard):
        yield waiting
        return

    def later(number: int, frame: FrameType | None) -> None:
        waiting.append((number, frame))

    signal.signal(signal.SIGCHLD, later)
    try:
        yield waiting
    finally:
        signal.signal(signal.SIGCHLD, heard)
    # Once is enough: torch's handler looks at every process of its loaders.
    for number, frame in waiting[:1]:
        heard(number, frame)
