"""What does the loop cost? A small network, where a batch is so quick that the loop around it
shows.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
import tyro
from common import race, save, say, show, spread
from loop_contenders import Absent, Contender, Ours, Plain, Task
from loop_peers import FastAI, Ignite, Keras, Lightning

REFERENCE = "PyTorch"
PACKAGES = ("torch", "numpy", "optree", "fastai", "lightning", "pytorch-ignite", "keras")

CONTENDERS: dict[str, Callable[[Task], Contender]] = {
    REFERENCE: Plain,
    "PyTorch, nothing recorded": lambda task: Plain(task, records=False),
    "PyTorch, fused AdamW": lambda task: Plain(task, fused=True),
    "PyTorch, compiled model, fused AdamW": lambda task: Plain(task, compiled=True, fused=True),
    "ours": Ours,
    "ours, compile=True": lambda task: Ours(task, compile=True),
    "fastai": FastAI,
    "fastai, torch's AdamW": lambda task: FastAI(task, torchs=True),
    "Lightning": Lightning,
    "ignite": Ignite,
    "Keras on torch": Keras,
}

ABOUT = """\
Everybody trains a 64-64-10 network with AdamW and one cycle of lr and momentum, with a smooth loss
of the training, loss and accuracy of the validation once an epoch, and no bar, on batches of 64,
shuffled in memory. A fit has {epochs} epochs of {batches} training and {valid_batches} validation
batches. What is measured is the time from the beginning of the first epoch to that of the last,
divided by the number of training batches between them: a share of the validation is in it. Start:
from the call to the first batch. In every round each contender trains once, from the same weights,
with another seed; {rounds} rounds. The garbage collector is on: who makes the garbage pays.

Where nothing else is said, AdamW is torch's default, a loop over the parameters on the CPU. Ours is
`fuse(adamw())`; fastai and Keras have their own. Keras measures the accuracy of the training
batches as well, and is compiled anew for every fit, as its optimizer is a part of it.
"""

HEADER = [
    "microseconds a batch",
    "10 %",
    "median",
    "90 %",
    "minus PyTorch",
    "times PyTorch",
    "start, ms",
    "accuracy",
]


class Entry:
    """A contender, and what its rounds have taken."""

    def __init__(self, task: Task, contender: Contender) -> None:
        self.task, self.contender = task, contender
        self.batch: list[float] = []
        self.ready: list[float] = []
        self.accuracy: list[float] = []

    def __call__(self) -> None:
        task = self.task
        task.train.began.clear()
        task.valid.began.clear()
        torch.manual_seed(len(self.accuracy))
        started = time.perf_counter()
        self.accuracy.append(self.contender.fit())
        began = task.train.began[-task.epochs :]  # Keras looks at a batch in advance
        if len(began) != task.epochs or len(task.valid.began) < task.epochs:
            raise RuntimeError(
                f"loop_overhead: {type(self.contender).__name__} has not trained {task.epochs} "
                f"epochs."
            )
        self.batch.append((began[-1] - began[0]) / (task.steps - task.batches))
        self.ready.append(began[0] - started)


def entries(task: Task, only: tuple[str, ...]) -> tuple[dict[str, Entry], list[str]]:
    """Those chosen who can train; and why the others cannot."""
    entered, left_out = {}, []
    for name in (only and (REFERENCE, *only)) or CONTENDERS:
        try:
            entered[name] = Entry(task, CONTENDERS[name](task))
        except Absent as reason:
            left_out.append(f"{name} ({reason})")
    return entered, left_out


def table(title: str, task: Task, rounds: int, only: tuple[str, ...], warmup: int = 2) -> str:
    """Microseconds of each, and how many times plain PyTorch's."""
    entered, left_out = entries(task, only)
    race(entered, rounds, warmup, collector=True)
    times = {name: spread(entry.batch[warmup:]) for name, entry in entered.items()}
    plain = times[REFERENCE].median
    rows = []
    for name, took in times.items():
        entry, more = entered[name], 1e6 * (took.median - plain)
        cells = [
            *(f"{1e6 * value:,.0f}" for value in took),
            f"{more:+,.0f}",
            f"{took.median / plain:.2f}",
        ]
        rows.append(
            [
                name,
                *cells,
                f"{1e3 * np.median(entry.ready[warmup:]):,.1f}",
                f"{np.mean(entry.accuracy):.3f}",
            ]
        )
    text = show(title, HEADER, rows)
    return text + "\n" + say(f"Left out: {', '.join(left_out)}.") if left_out else text


def main(
    rounds: int = 21,
    epochs: int = 3,
    batches: int = 200,
    valid_batches: int = 20,
    threads: int = 1,
    only: tuple[str, ...] = (),
    save_results: bool = False,
) -> None:
    """Race training loops on an MLP, 64-64-10, and on the same with BatchNorm and Dropout.

    Args:
        rounds: How often each contender trains.
        epochs: The length of a fit; the last epoch is not measured, so at least 2.
        batches: Training batches of an epoch.
        valid_batches: Validation batches of an epoch.
        threads: Of torch; 0 leaves it as it is.
        only: Enter these only, and plain PyTorch.
        save_results: Write the tables into results/.
    """
    if epochs < 2 or (unknown := {*only} - CONTENDERS.keys()):
        raise SystemExit(
            "epochs must be 2 or more."
            if epochs < 2
            else f"unknown: {unknown}; known: {[*CONTENDERS]}"
        )
    if threads:
        torch.set_num_threads(threads)
    text = say(
        ABOUT.format(epochs=epochs, batches=batches, valid_batches=valid_batches, rounds=rounds)
    )
    for norm, title in (
        (False, "Linear, ReLU, Linear"),
        (True, "Linear, BatchNorm, ReLU, Dropout, Linear"),
    ):
        text += "\n" + table(title, Task(norm, epochs, batches, valid_batches), rounds, only)
    if save_results:
        save("loop_overhead", text, PACKAGES)


if __name__ == "__main__":
    tyro.cli(main)
