"""Directories that are whole or not there, whatever ends the process that writes them and whoever
else writes there.
"""

import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PROCESS = secrets.token_hex(4)  # with the process id: no other process, before or after, has both
_SCRATCH = re.compile(r"\.saving-(?P<host>.*)-(?P<pid>\d+)-(?P<process>[0-9a-f]{8})-[0-9a-f]{8}")
_DAY = 86_400.0


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """An empty directory in `folder` (made if need be), to be filled and put in its place; what is
    left is removed.

    What dead processes have left in the folder is removed too, before.
    """
    make(folder)
    for left in folder.glob(".saving-*"):
        if _is_dead(left):
            discard(left)
    new = folder / _scratch_name()
    new.mkdir()
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


def put(new: Path, path: Path) -> None:
    """Move a whole directory to its place in the same (locked) folder, on the disk before this
    returns.

    What is there is moved to `aside(path)` first and removed afterwards, so that one of the two is
    always whole.
    """
    if path.exists():
        discard(aside(path))
        path.rename(aside(path))
        # Before the next rename, so that after a loss of power one of the two is there.
        sync(path.parent)
    new.rename(path)
    sync(path.parent)
    discard(aside(path))


def aside(path: Path) -> Path:
    """Where the directory at `path` is while another takes its place."""
    return path.parent / f".{path.name}.replaced"  # with_name refuses "."


def find(path: Path) -> Path:
    """The directory at `path`, or the one that was moved aside if the new one has not come. Raises
    FileNotFoundError
    """
    for place in (path, aside(path), path):  # once more, as it may have come meanwhile
        if place.is_dir():
            return place
    raise FileNotFoundError(f"{path} is not there: expected a directory. Check the path.")


def discard(path: Path) -> None:
    """Remove a directory, if it is there; nobody sees half of it under its name."""
    grave = path.with_name(_scratch_name())
    with suppress(FileNotFoundError):
        path.rename(grave)
        shutil.rmtree(grave, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes and threads that lock the folder waiting; a lock ends with its process.

    Where the system or its file system has no locks, nobody waits.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a directory, is on the disk."""
    if path.is_dir() and os.name != "posix":  # there, directories cannot be opened
        return
    # Windows brings to the disk only what is open for writing.
    flags = os.O_RDONLY if os.name == "posix" else os.O_RDWR
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make(folder: Path) -> None:
    """Make a folder, and the folders it is in, if they are not there."""
    if not folder.is_dir():
        make(folder.parent)
        folder.mkdir(exist_ok=True)
        # Or a loss of power could take the name away, and with it all that is in the folder.
        sync(folder.parent)


def _scratch_name() -> str:
    return f".saving-{_host()}-{os.getpid()}-{_PROCESS}-{secrets.token_hex(4)}"


def _host() -> str:
    """Where a process id means one process: a machine, and on it a namespace, as containers may
    share its name.
    """
    with suppress(OSError):
        return f"{platform.node()}-{Path('/proc/self/ns/pid').stat().st_ino}"
    return platform.node()


def _is_dead(path: Path) -> bool:
    """Whether the process that made a scratch directory is surely gone; of another host's, after a
    day.
    """
    found = _SCRATCH.fullmatch(path.name)
    if found is None:
        return False
    if found["host"] != _host():
        with suppress(FileNotFoundError):
            return time.time() - path.stat().st_mtime > _DAY
        return False
    pid = int(found["pid"])
    return found["process"] != _PROCESS if pid == os.getpid() else not _is_alive(pid)


def _is_alive(pid: int) -> bool:
    if os.name != "posix":  # there, signal 0 would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        # PermissionError: it is there, and another user's.
        return True
    return True
