"""Groups of forked processes, some of which are killed. They are forked from a process that has
imported all that they need, since that takes longer than all that they do.
"""

import json
import os
import select
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch._dynamo  # DTensor imports it when it is first used, which takes seconds

from tests.ranks import meet

PATIENCE = 60.0
"""Seconds after which a rank that should have said something, or ended, is a failure."""

LONELY = 3
"""The exit code of a rank that finds out that another one is gone."""

Say = Callable[[str], object]


class Group:
    """Forked processes with a gloo group. Each does `work(rank, say)`; what it says is read here,
    line by line.
    """

    def __init__(self, world: int, work: Callable[[int, Say], Any]) -> None:
        self.store = Path(tempfile.mkdtemp()) / "store"
        self.pipes: list[int] = []
        self.children: list[int] = []
        self.lines: list[list[str]] = [[] for _ in range(world)]
        self.rests = [b""] * world
        for rank in range(world):
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                for pipe in (*self.pipes, reading):  # or nobody finds out that the reader is gone
                    os.close(pipe)
                _be_rank(rank, world, self.store, work, writing)
            os.close(writing)
            self.pipes.append(reading)
            self.children.append(child)

    def hear(self, rank: int) -> bool:
        """Read what a rank says next; False if it has ended."""
        ready, _, _ = select.select([self.pipes[rank]], [], [], PATIENCE)
        assert ready, f"rank {rank} says nothing for {PATIENCE} s; so far {self.lines}"
        found = os.read(self.pipes[rank], 1 << 16)
        *lines, self.rests[rank] = (self.rests[rank] + found).split(b"\n")
        self.lines[rank] += [line.decode() for line in lines]
        return bool(found)

    def wait_for(self, rank: int, word: str) -> str:
        """The first line of a rank that begins with a word."""
        while True:
            for line in self.lines[rank]:
                if line.startswith(word):
                    return line
            assert self.hear(rank), f"rank {rank} has ended without {word!r}: {self.lines}"

    def kill(self, rank: int) -> None:
        """As `kill -9` does."""
        os.kill(self.children[rank], signal.SIGKILL)

    def end(self) -> list[int]:
        """Wait until all have ended, by themselves; exit codes, or minus the numbers of signals."""
        codes = []
        for rank, child in enumerate(self.children):
            while self.hear(rank):
                pass
            os.close(self.pipes[rank])
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        shutil.rmtree(self.store.parent)
        return codes


def _be_rank(
    rank: int, world: int, store: Path, work: Callable[[int, Say], Any], pipe: int
) -> NoReturn:
    """What a forked process does; it never comes back."""
    code = 1
    try:
        meet(rank, world, str(store), PATIENCE / 2)
        work(rank, lambda line: os.write(pipe, f"{line}\n".encode()))
        code = 0
    except RuntimeError as error:
        gone = any(word in str(error) for word in ("Connection", "peer", "Socket"))
        code = LONELY if gone else 1
        if not gone:
            traceback.print_exc()
    except SystemExit as error:
        code = int(str(error.code))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def told(code: int) -> str:
    """An exit code in a word."""
    words = {0: "done", LONELY: "lonely", -signal.SIGKILL: "killed", 143: "stopped"}
    return words.get(code, f"code {code}")


def be_strict() -> None:
    """One thread, and warnings are errors."""
    warnings.simplefilter("error", UserWarning)
    warnings.filterwarnings("ignore", "Learner: the loss does not depend on")
    torch.set_num_threads(1)


def main(functions: Mapping[str, Callable[..., Any]]) -> None:
    """Do what the command line says, and print what has become of it."""
    be_strict()
    os.fsync = lambda handle: None  # it is processes that are killed here, not the machine
    print(json.dumps(functions[sys.argv[1]](*sys.argv[2:])))
