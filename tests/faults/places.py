"""What the tests of faults share: how often, and disks that are small."""

import json
import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.processes import python

LONG = os.environ.get("FAULTS") == "long"


def times(short: int, long: int) -> int:
    """How often to try, in the suite and in `make faults`."""
    return long if LONG else short


def in_process(*arguments: object, script: str = "script", **environment: str) -> Any:
    """What a function of a script of this folder returns in a new process."""
    env = {**os.environ, **environment}
    process = python("-m", f"tests.faults.{script}", *arguments, env=env, timeout=3600)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@contextmanager
def limited(size: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes: the system's write fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def small_disk(place: Path, options: str) -> Iterator[Path]:
    """A disk in memory, mounted with these options; skips the test where that is not allowed."""
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)
