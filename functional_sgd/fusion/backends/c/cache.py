"""The folder that compiled code is kept in and run from: one that nobody else can write to."""

import atexit
import os
import shutil
import stat
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def cache_folder() -> Path:
    """Where kernels are kept: $FUNCTIONAL_SGD_CACHE, or functional_sgd in the user's cache.

    Libraries in there are run, so it must be the user's own (or root's), closed to others, and so
    must the folders it is in. Else, or if it cannot be made, it is a private temporary folder that
    ends with the process, and a warning says why. Raises OSError if there is no room for that.
    """
    try:
        folder = _chosen_folder()
        _make_private(folder)
        _check_owned(folder)
    except (OSError, RuntimeError) as error:
        return temporary_folder(str(error))
    return folder


def _chosen_folder() -> Path:
    chosen = os.environ.get("FUNCTIONAL_SGD_CACHE")
    if chosen:
        return Path(chosen).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache").absolute() / "functional_sgd"


def _make_private(folder: Path) -> None:
    """Make a folder, and those it is in if need be, for this user only, whatever the umask."""
    # lexists, since a link that leads nowhere is somebody's, and no place for a folder.
    if not os.path.lexists(folder):
        _make_private(folder.parent)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)


def _check_owned(folder: Path) -> None:
    """Raise OSError if another user could put something into a folder, or in its place."""
    if os.name != "posix":  # there, the user's folders are closed to others
        return
    # Links are resolved: what matters is who can write where they lead.
    real = folder.resolve()
    _check_closed(real, real.lstat(), _OTHERS)
    for parent in real.parents:
        found = parent.lstat()
        sticky = found.st_mode & stat.S_ISVTX  # there, nobody can rename what is another's
        open_bits = 0 if sticky else stat.S_IWOTH
        _check_closed(parent, found, open_bits)


def _check_closed(path: Path, found: os.stat_result, open_bits: int) -> None:
    if not stat.S_ISDIR(found.st_mode):
        raise OSError(f"{path} is no folder")
    if found.st_uid not in (0, os.geteuid()):
        raise OSError(f"{path} belongs to another user (uid {found.st_uid})")
    if found.st_mode & open_bits:
        mode = stat.S_IMODE(found.st_mode)
        raise OSError(f"others can write to {path} (mode {mode:04o}): empty it, and chmod 700 it")


def is_closed(found: os.stat_result) -> bool:
    """Whether what is there is this user's, or root's, and nobody else can write to it."""
    if os.name != "posix":
        return True
    return found.st_uid in (0, os.geteuid()) and not found.st_mode & _OTHERS


def temporary_folder(reason: str) -> Path:
    """A folder of this process alone, and a warning that says why. Raises OSError if there is no
    room for one either.
    """
    global _temporary
    if _temporary is None or not _temporary.is_dir():
        _temporary = Path(tempfile.mkdtemp(prefix="functional_sgd-"))  # mode 0700
        atexit.register(_remove, _temporary, os.getpid())
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"fuse: compiled code is not kept: {reason}. This process keeps its own in "
            f"{_temporary}, and every process compiles anew, which takes seconds. Set "
            f"FUNCTIONAL_SGD_CACHE to a folder of yours.",
            stacklevel=6,
        )
    return _temporary


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # and not a child that was forked of it
        shutil.rmtree(folder, ignore_errors=True)


_warned: set[str] = set()
_temporary: Path | None = None
