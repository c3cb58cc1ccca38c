"""Python processes that need not import torch: they are forked from a server that has done so once.

Importing torch, pictures and data sets takes some five seconds, most examples and scripts less. The
server is one process for each of those that share the tests; it does nothing but import, so no
thread of it holds a lock when it forks, and no test has been there before.
"""

import contextlib
import functools
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


@functools.cache
def forking() -> BaseContext:
    """Where processes are forked from the server; without such, they are started anew."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.imported"])
    with contextlib.chdir(ROOT):  # where `tests` and the packages are found first
        forkserver.ensure_running()
    return context


def python(
    *arguments: object,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """What `python ARGUMENTS...` does and prints: [-W error] and a script, -m module or -c code.

    It is a process of its own, with its own modules, signals, folder and environment. Where it
    matters how the interpreter starts and what is imported then, call subprocess.run.
    """
    command = [*map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        texts = [Path(folder) / name for name in ("stdout", "stderr")]
        given = (command, str(cwd), {**(os.environ if env is None else env)}, [*map(str, texts)])
        process: Any = forking().Process(target=_interpret, args=given)  # type: ignore[attr-defined]
        process.start()
        process.join(timeout)
        late = process.is_alive()
        if late:
            process.kill()
            process.join()
        out, err = (text.read_text() if text.exists() else "" for text in texts)
    if late:
        raise subprocess.TimeoutExpired(command, timeout, out, err)
    return subprocess.CompletedProcess(command, process.exitcode, out, err)


def take(environment: Mapping[str, str]) -> None:
    """Make this the environment of the process, since the server has that of the first test; and
    start others as Python does by default, not as this one was started.
    """
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # type: ignore[arg-type]


def _interpret(command: list[str], cwd: str, environment: dict[str, str], texts: list[str]) -> None:
    for number, text in enumerate(texts, start=1):
        file = os.open(text, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        os.dup2(file, number)
        os.close(file)
    take(environment)
    os.chdir(cwd)
    if command[:2] == ["-W", "error"]:
        warnings.simplefilter("error")
        command = command[2:]
    match command:
        case "-m", name, *more:
            sys.argv, sys.path = [name, *more], [cwd, *sys.path]
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        case "-c", code, *more:
            sys.argv, sys.path = ["-c", *more], [cwd, *sys.path]
            exec(code, {"__name__": "__main__"})
        case name, *_:
            sys.argv, sys.path = command, [str(Path(name).parent), *sys.path]
            runpy.run_path(name, run_name="__main__")
