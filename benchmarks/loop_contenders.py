"""What loop_overhead.py lets everybody train, and the first who do: plain PyTorch, and ours. The
others: loop_peers.py.

Each contender has `fit()`: a training from always the same weights, which returns the accuracy on
the validation data.
"""

import inspect
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import functional_sgd as fs
import loop

WIDTH, CLASSES, BATCH = 64, 10, 64
BETA = 0.98  # of the smooth loss


class Absent(Exception):
    """Why a contender cannot start here."""


class Contender(Protocol):
    """Somebody who can train."""

    def fit(self) -> float:
        """Train; returns the accuracy after the last epoch."""


class Timed:
    """Batches in memory, of which every pass writes down when it began."""

    def __init__(self, tensors: tuple[Tensor, ...], shuffle: bool = False) -> None:
        self.batches = loop.Batches(tensors, BATCH, shuffle)
        self.began: list[float] = []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        self.began.append(time.perf_counter())
        return iter(self.batches)

    def set_position(self, seed: int, epoch: int, skip: int = 0) -> None:
        """As the batches do it."""
        self.batches.set_position(seed, epoch, skip)


@dataclass(frozen=True)
class Task:
    """A small network, data for it, and how long and how fast it is to learn."""

    norm: bool  # with BatchNorm and Dropout
    epochs: int = 3
    batches: int = 200
    valid_batches: int = 20
    lr: float = 3e-3
    wd: float = 0.01
    train: Timed = field(init=False)
    valid: Timed = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        teacher = torch.randn(WIDTH, CLASSES, generator=generator)
        for name, batches in (("train", self.batches), ("valid", self.valid_batches)):
            x = torch.randn(batches * BATCH, WIDTH, generator=generator)
            object.__setattr__(
                self, name, Timed((x, (x @ teacher).argmax(1)), shuffle=name == "train")
            )

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.epochs * self.batches

    def network(self) -> nn.Sequential:
        """64-64-10, always with the same weights."""
        torch.manual_seed(0)
        first, last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        if self.norm:
            return nn.Sequential(first, nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Dropout(0.1), last)
        return nn.Sequential(first, nn.ReLU(), last)

    def one_cycle(self, opt: torch.optim.Optimizer) -> torch.optim.lr_scheduler.OneCycleLR:
        """torch's schedule of lr and momentum, with the numbers of `fit_one_cycle`."""
        shape = dict(
            pct_start=0.25,
            div_factor=25.0,
            final_div_factor=4000.0,
            base_momentum=0.85,
            max_momentum=0.95,
        )
        return torch.optim.lr_scheduler.OneCycleLR(opt, self.lr, self.steps, **shape)


class Restart:
    """A network, and its first weights to begin again with."""

    def __init__(self, task: Task) -> None:
        self.model = task.network()
        self.first = {name: value.clone() for name, value in self.model.state_dict().items()}

    def __call__(self) -> nn.Module:
        """The network as it was."""
        self.model.load_state_dict(self.first)
        return self.model


class Plain:
    """PyTorch as everybody writes it, or with the model and its loss compiled; nothing waits for a
    loss. If it does not record, no loss of the training is kept.
    """

    def __init__(
        self, task: Task, compiled: bool = False, records: bool = True, **form: bool
    ) -> None:
        self.task, self.restart, self.form = task, Restart(task), form
        self.records = records
        model = self.restart.model

        def loss_of(x: Tensor, y: Tensor) -> Tensor:
            return cross_entropy(model(x), y)

        self.loss_of = torch.compile(loss_of) if compiled else loss_of

    def fit(self) -> float:
        task, model = self.task, self.restart()
        opt = torch.optim.AdamW(model.parameters(), lr=task.lr, weight_decay=task.wd, **self.form)
        schedule = task.one_cycle(opt)
        smooth, steps, rows = torch.zeros(()), 0, []
        for _ in range(task.epochs):
            model.train()
            for x, y in task.train:
                opt.zero_grad()
                loss = self.loss_of(x, y)
                loss.backward()
                opt.step()
                schedule.step()
                if self.records:
                    smooth = BETA * smooth + (1 - BETA) * loss.detach()
                    steps += 1
            rows.append((float(smooth) / (1 - BETA ** (steps or 1)), *self.validate(model)))
        return rows[-1][-1]

    @torch.no_grad()
    def validate(self, model: nn.Module) -> tuple[float, float]:
        """Loss and accuracy, as means over the samples."""
        loss, right, count = torch.zeros(()), torch.zeros(()), 0
        model.eval()
        for x, y in self.task.valid:
            pred = model(x)
            loss += cross_entropy(pred, y) * len(y)
            right += (pred.argmax(-1) == y).sum()
            count += len(y)
        return float(loss) / count, float(right) / count


class Ours:
    """A Learner with its Recorder, and fit_one_cycle; `options` are those of fit."""

    def __init__(self, task: Task, **options: Any) -> None:
        for name in options.keys() - inspect.signature(loop.fit).parameters:
            raise Absent(f"fit has no parameter {name!r}")
        self.task, self.options = task, options
        data = loop.DataLoaders(task.train, task.valid)
        opt = fs.fuse(fs.adamw(lr=task.lr, wd=task.wd))
        self.learner = loop.Learner(
            task.network(), data, cross_entropy, opt, metrics=(loop.accuracy,)
        )

    def fit(self) -> float:
        learner, task = self.learner, self.task
        state = loop.fit_one_cycle(
            learner, learner.init(torch.initial_seed()), task.epochs, task.lr, **self.options
        )
        return float(state.history.rows[-1]["accuracy"])
