"""Files as they are: read where they are regular files of a bounded size, and errors of the disk
that say which file.
"""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from safetensors import SafetensorError

_NUMBER = re.compile(r"os error (\d+)")  # as Rust, in which safetensors is written, tells of errno


@contextmanager
def regular(path: Path) -> Iterator[BufferedReader]:
    """A file that is open for reading. Raises OSError for what is no regular file: opening a pipe
    would wait for its writer.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(f"{path} is no regular file")
        yield file


def check_path(who: str, path: object, call: str) -> None:
    """Raise TypeError, on behalf of `who`, for what is no path; `call` is how it is called."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            f"{who}: expected a path, a str or Path, got {type(path).__name__}. Call {call}."
        )


def content(path: Path, most: int) -> bytes:
    """The bytes of a regular file. Raises OSError if there are more than `most`."""
    with regular(path) as file:
        found = file.read(most + 1)
    if len(found) > most:
        raise OSError(f"{path} has more than {most:,} bytes")
    return found


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Give an error of the disk that is raised in here its number and this path, if it has none."""
    try:
        yield
    except SafetensorError as error:
        found = _NUMBER.search(str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise
