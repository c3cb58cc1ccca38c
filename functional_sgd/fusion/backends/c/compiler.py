"""Compile C with the system's compiler, once: results are kept on disk by content, in a folder that
nobody else can write to.

What fuse needs of this: `function_of(source, ...)` is the compiled function, or raises NoCompiler,
which costs nothing while `error.retry_at` (a time.monotonic) has not come.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from functional_sgd.fusion.backends.c.cache import cache_folder, is_closed, temporary_folder

# -fno-math-errno lets gcc vectorise roots, -fno-trapping-math comparisons. Neither changes a
# result; without them AdamW and Rprop are scalar code.
_FLAGS = (
    "-O3",
    "-march=native",
    "-std=c11",
    "-fPIC",
    "-shared",
    "-fno-math-errno",
    "-fno-trapping-math",
)
_EXACT = ("-ffp-contract=off",)  # every operation rounds as torch's own would

PATIENCE = 60.0
"""Seconds that a compiler may take; a kernel takes half a second."""

_PAUSE = 60.0  # seconds before another try, at least; and a hundred times what the last one took
_HOUR = 3600.0
_SCRATCH = ".compiling-"


class NoCompiler(RuntimeError):
    """There is no compiled code now: why, what helps (`cure`), and when another try is worth its
    time (`retry_at`, a time.monotonic).
    """

    cure = "Install gcc or clang."
    retry_at = 0.0


class _Fails(NoCompiler):
    cure = "It is tried again later."


class _Refused(_Fails):
    """Of this source only: others may do."""


def load(source: str) -> ctypes.CDLL:
    """The compiled source, as a shared library. Raises NoCompiler if there is no compiler, or it
    fails; at once, if it has failed with this source a short time ago.
    """
    here = _surroundings()
    # None stands for any source: a refused source fails alone, other failures hold for all.
    for key in ((here, source), (here, None)):
        if key in _failed and time.monotonic() < _failed[key].retry_at:
            raise _again(_failed[key])
    start = time.monotonic()
    try:
        return _library(source)
    except NoCompiler as error:
        now = time.monotonic()
        # However long a try takes, retries cost about a hundredth of the time.
        error.retry_at = now + max(_PAUSE, 100 * (now - start))
        if len(_failed) >= 256:
            _failed.clear()
        refused = source if isinstance(error, _Refused) else None
        _failed[here, refused] = error
        raise


@functools.lru_cache(maxsize=256)
def function_of(source: str, *argtypes: type) -> Callable[..., None]:
    """The function `run` of a source, which takes arguments of these ctypes and returns nothing.
    Raises NoCompiler.
    """
    function = load(source).run
    function.argtypes, function.restype = argtypes, None
    return function


def find_compiler() -> tuple[str, ...]:
    """The command of the C compiler: $CC, which may have arguments ("ccache gcc"), or cc, gcc,
    clang. Raises NoCompiler if there is none.
    """
    try:
        chosen = shlex.split(os.environ.get("CC", ""))
    except ValueError:  # a quotation mark that is not closed
        chosen = []
    candidates = (chosen, *_USUAL) if chosen else _USUAL
    for name, *arguments in candidates:
        path = shutil.which(name)
        if path:
            return path, *arguments
    raise NoCompiler("no C compiler was found ($CC, cc, gcc, clang)")


_USUAL = (["cc"], ["gcc"], ["clang"])


def _library(source: str) -> ctypes.CDLL:
    compiler = find_compiler()
    flags = (*_FLAGS, *_EXACT, *_openmp(compiler))
    try:
        folder = cache_folder()
        try:
            library = _built(compiler, flags, source, folder)
        except OSError as error:  # a full disk, no inodes, a folder that is only read
            reason = f"{folder} cannot be written: {error.strerror or error}"
            library = _built(compiler, flags, source, temporary_folder(reason))
    except OSError as error:
        raise _Fails(f"there is no place for compiled code: {error}") from error
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise _Refused(f"the compiled kernel does not load: {error}") from error


def _built(compiler: Sequence[str], flags: Sequence[str], source: str, folder: Path) -> Path:
    """The library in this folder, whose name is a digest of all that it depends on."""
    parts = "\0".join((source, *compiler, *flags, *_machine()))
    name = hashlib.sha256(parts.encode()).hexdigest()[:32]
    library, digest = folder / f"{name}.so", folder / f"{name}.sha256"
    if not _intact(library, digest):
        _compile(compiler, flags, source, library, digest)
    return library


def _compile(
    compiler: Sequence[str], flags: Sequence[str], source: str, library: Path, digest: Path
) -> None:
    """Compile beside the target and rename, so that other processes see all of it or nothing.

    Raises OSError where the folder cannot be written, and NoCompiler.
    """
    with _scratch(library.parent) as scratch:
        code, built, mark = scratch / "kernel.c", scratch / "kernel.so", scratch / "mark"
        code.write_text(source)
        done = _run([*compiler, str(code), "-o", str(built), *flags, "-lm"])
        if done.returncode != 0 or not built.exists():
            raise _Refused(f"{shlex.join(compiler)} failed: {done.stderr.strip()[:2000]}")
        built.chmod(0o700)
        mark.write_text(_sha256(built))
        mark.chmod(0o600)
        # The digest goes last: until it matches, the library is treated as damaged.
        os.replace(built, library)
        os.replace(mark, digest)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A new folder in this one. Those that killed processes have left go after an hour."""
    for left in folder.glob(f"{_SCRATCH}*"):
        with suppress(OSError):
            if time.time() - left.lstat().st_mtime > _HOUR:
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        prefix=_SCRATCH, dir=folder, ignore_cleanup_errors=True
    ) as name:
        yield Path(name)


def _run(command: Sequence[str], text: str = "") -> "subprocess.CompletedProcess[str]":
    """Run a compiler to its end, but not for ever. Raises NoCompiler if it cannot, or is killed.

    It is a group of processes by itself: Ctrl-C, which a terminal sends to the whole group of this
    one, does not reach it, and what it has started is ended with it.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise _Fails(f"{shlex.join(command[:2])} does not run: {error}") from error
    try:
        out, err = process.communicate(text, timeout=PATIENCE)
    except subprocess.TimeoutExpired as error:
        raise _Fails(
            f"the compiler {command[0]} does not come to an end, after {PATIENCE:.0f} s"
        ) from error
    finally:
        # Ctrl-C interrupts this process and not the compiler, which must not be left running.
        if process.poll() is None:
            _end(process)
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        raise _Fails(f"the compiler {command[0]} was ended by {name}")
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _end(process: "subprocess.Popen[str]") -> None:
    """End a compiler, and what it has started."""
    with suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.communicate()


def _intact(library: Path, digest: Path) -> bool:
    """Whether a library is there, as it was written, and closed to others."""
    try:
        # lstat, so that links are refused: their targets may belong to somebody else.
        for found in (library.lstat(), digest.lstat()):
            if not stat.S_ISREG(found.st_mode) or not is_closed(found):
                return False
        return digest.read_text() == _sha256(library)
    except (OSError, ValueError):  # not there, or not even text
        return False


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@functools.cache
def _openmp(compiler: tuple[str, ...]) -> tuple[str, ...]:
    """Flags for threads. Torch's own OpenMP library is linked if there is one, so that there is one
    pool of threads.
    """
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        return "-fopenmp", str(library)
    command = [*compiler, "-fopenmp", "-shared", "-fPIC", "-x", "c", "-", "-o", os.devnull]
    # -fopenmp-simd needs no OpenMP library, and still obeys the simd pragmas.
    return ("-fopenmp",) if _run(command, "int x;").returncode == 0 else ("-fopenmp-simd",)


@functools.cache
def _machine() -> tuple[str, ...]:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        flags = platform.processor()
    return platform.machine(), flags


def _surroundings() -> tuple[str | None, ...]:
    """What a failure may be due to: where one of these is another, it is tried at once."""
    names = ("CC", "PATH", "FUNCTIONAL_SGD_CACHE", "XDG_CACHE_HOME", "HOME", "TMPDIR")
    return tuple(map(os.environ.get, names))


def _again(error: NoCompiler) -> NoCompiler:
    """The same error, without the frames that it has been through."""
    same = type(error)(*error.args)
    same.retry_at = error.retry_at
    return same


_failed: dict[tuple[tuple[str | None, ...], str | None], NoCompiler] = {}
