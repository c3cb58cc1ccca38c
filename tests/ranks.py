"""Several processes with a gloo group, started once and used by many tests."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tests.processes import forking, take

PATIENCE = 120.0
"""Seconds that a function may take on a machine that is busy."""


class Ranks:
    """Processes that call functions at the same time, each with its rank.

    The first is started anew, so that its sets are in another order than those of the others, which
    are forked: what depends on that order may be another collective on each rank.
    """

    def __init__(self, world: int, folder: str) -> None:
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world):
            context: Any = forking() if rank else multiprocessing.get_context("spawn")
            ours, theirs = context.Pipe()
            arguments = (rank, world, str(Path(folder) / "store"), theirs, dict(os.environ))
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(*args)` returns on each rank. Raises AssertionError if one fails."""
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = []
        failures = []
        for rank, pipe in enumerate(self.pipes):
            try:
                assert pipe.poll(PATIENCE), f"rank {rank} does not answer"
                answer, failure = pipe.recv()
            except (AssertionError, EOFError) as error:
                self.close()
                raise AssertionError(f"rank {rank}: {error!r}; {failures}") from error
            answers.append(answer)
            if failure:
                failures.append(f"rank {rank}:\n{failure}")
        assert not failures, "\n".join(failures)
        return answers

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()


@contextmanager
def started(world: int) -> Iterator[Ranks]:
    """Processes for the time of a block."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = Ranks(world, folder)
        try:
            yield ranks
        finally:
            ranks.close()


def meet(rank: int, world: int, store: str, seconds: float) -> None:
    """Make this process one of a gloo group that finds itself by a file, and is that patient."""
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=seconds),
    )


def _serve(
    rank: int, world: int, store: str, pipe: Connection, environment: Mapping[str, str]
) -> None:
    take(environment)
    torch.set_num_threads(1)
    meet(rank, world, store, 60)
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((function(*args), ""))
        except Exception:
            pipe.send((None, traceback.format_exc()))
