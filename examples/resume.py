"""Train on handwritten digits so that nothing is lost: stop it or kill it, give the same command
again, and it goes on.

Ctrl-C ends it after the present batch: fit would then end the script with KeyboardInterrupt, but
`stop="return"` asks for the state, so that there is something to say. `--kill-at 30` lets it kill
itself (kill -9) after 30 batches of its own; give the command until it is done. The digest at the
end is that of a run which nobody has interrupted.
"""

import hashlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import tyro
from digits import digits, network
from torch import nn

from functional_sgd import adamw
from loop import (
    Callback,
    Checkpoint,
    CSVLogger,
    Learner,
    Progress,
    State,
    accuracy,
    fit_one_cycle,
    validate,
)


@dataclass(frozen=True)
class KillItself(Callback):
    """Say where the run begins, and end the process without any warning after so many batches."""

    after: int | None
    reports: ClassVar[bool] = True  # it has no say in what is learned: resuming without it is fine

    @contextmanager
    def around_fit(self, state: State) -> Iterator[int]:
        """Keep the number of the first batch for as long as this process runs."""
        done = state.train_iter
        print(f"goes on after batch {done}" if done else "begins", flush=True)
        yield state.train_iter

    def after_step(self, state: State) -> None:
        """Count this process's batches: nobody can catch this signal."""
        if self.after is not None and state.train_iter - state.resources[self.name] >= self.after:
            print(f"killed in batch {state.train_iter}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)


def digest(state: State) -> str:
    """The first 16 digits of the SHA-256 of all parameters and buffers: equal if every bit of them
    is.
    """
    sha = hashlib.sha256()
    for name, value in sorted({**state.params, **state.buffers}.items()):
        sha.update(name.encode())
        sha.update(value.cpu().numpy().tobytes())
    return sha.hexdigest()[:16]


def main(
    folder: Path = Path("digits_run"),
    epochs: int = 5,
    lr: float = 1e-2,
    every: int = 10,
    kill_at: int | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Train from the newest checkpoint in a folder, or from the beginning if there is none.

    Args:
        folder: Where checkpoints and the table of the run are kept. Remove it to begin anew.
        epochs: Passes over the training images.
        lr: The highest learning rate of the cycle.
        every: Batches from one checkpoint to the next; what a kill can cost.
        kill_at: Kill this process after so many batches. More than `every`, or it gets nowhere.
        seed: Decides the first weights, the order of the data, and the dropout.
        device: Where to train.
    """
    torch.manual_seed(seed)
    data, _, _ = digits()
    callbacks = [
        Progress(),
        CSVLogger(folder / "table.csv"),
        Checkpoint(folder, batches=every, seconds=60),
        KillItself(kill_at),
    ]
    learner = Learner(network(), data, nn.CrossEntropyLoss(), adamw(), [accuracy], callbacks)
    start = learner.init(seed, device)
    state = fit_one_cycle(learner, start, epochs, lr, resume=folder, stop="return")
    if state.stopped:
        print(f"{state.stopped} after batch {state.train_iter}: give the same command again")
    else:
        print(f"accuracy {validate(learner, state)['accuracy']:.3f}, digest {digest(state)}")


if __name__ == "__main__":
    tyro.cli(main)
