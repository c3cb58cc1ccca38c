"""Compile C with the system's compiler, once: results are kept on disk by content, safe against
races and damage.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

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


class NoCompiler(RuntimeError):
    """There is no working C compiler."""

    cure = "Install gcc or clang."


def load(source: str) -> ctypes.CDLL:
    """The compiled source, as a shared library. Raises NoCompiler if there is no compiler, or it
    fails.
    """
    compiler = find_compiler()
    flags = (*_FLAGS, *_EXACT, *_openmp(compiler))
    folder = cache_folder()
    name = hashlib.sha256("\0".join((source, compiler, *flags, *_machine())).encode()).hexdigest()[
        :32
    ]
    library, digest = folder / f"{name}.so", folder / f"{name}.sha256"
    if not _intact(library, digest):
        _compile(compiler, flags, source, library, digest)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise NoCompiler(f"the compiled kernel does not load: {error}") from error


@functools.lru_cache(maxsize=256)
def function_of(source: str, *argtypes: Any) -> Any:
    """The function `run` of a source, which takes arguments of these ctypes and returns nothing.
    Raises NoCompiler.
    """
    function = load(source).run
    function.argtypes, function.restype = argtypes, None
    return function


def find_compiler() -> str:
    """The path of the C compiler: $CC, or cc, gcc, clang. Raises NoCompiler if there is none."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        path = shutil.which(name) if name else None
        if path:
            return path
    raise NoCompiler("no C compiler was found ($CC, cc, gcc, clang)")


def cache_folder() -> Path:
    """Where kernels are kept: $FUNCTIONAL_SGD_CACHE, or functional_sgd in the user's cache or the
    temporary folder.
    """
    chosen = os.environ.get("FUNCTIONAL_SGD_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(chosen) if chosen else base / "functional_sgd"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only home, say
        folder = (
            Path(tempfile.gettempdir())
            / f"functional_sgd-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
        )
        folder.mkdir(exist_ok=True)
    return folder


def _compile(
    compiler: str, flags: tuple[str, ...], source: str, library: Path, digest: Path
) -> None:
    """Compile beside the target and rename, so that other processes see all of it or nothing."""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        code, built = Path(scratch) / "kernel.c", Path(scratch) / "kernel.so"
        code.write_text(source)
        command = [compiler, str(code), "-o", str(built), *flags, "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NoCompiler(f"{compiler} does not run: {error}") from error
        if done.returncode != 0 or not built.exists():
            raise NoCompiler(f"{compiler} failed: {done.stderr.strip()[:2000]}")
        mark = Path(scratch) / "mark"
        mark.write_text(_sha256(built))
        os.replace(built, library)
        os.replace(mark, digest)


def _intact(library: Path, digest: Path) -> bool:
    try:
        return digest.read_text() == _sha256(library)
    except (OSError, ValueError):  # not there, or not even text
        return False


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@functools.cache
def _openmp(compiler: str) -> tuple[str, ...]:
    """Flags for threads. Torch's own OpenMP library is linked if there is one, so that there is one
    pool of threads.
    """
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        return "-fopenmp", str(library)
    return ("-fopenmp",) if _accepts_openmp(compiler) else ("-fopenmp-simd",)


def _accepts_openmp(compiler: str) -> bool:
    command = [compiler, "-fopenmp", "-shared", "-fPIC", "-x", "c", "-", "-o", os.devnull]
    return (
        subprocess.run(
            command, input="int x;", capture_output=True, text=True, check=False
        ).returncode
        == 0
    )


@functools.cache
def _machine() -> tuple[str, ...]:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        flags = platform.processor()
    return platform.machine(), flags
