"""A learner with everything in it, and work for the processes that stop its runs and go on with
them.

`python -m tests.loop.resume_script NAME ARGUMENTS...` calls a function of this file, once torch is
imported.
"""

import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from functional_sgd import adamw, fuse
from functional_sgd.schedules import Linear, one_cycle
from loop import (
    AverageParams,
    Callback,
    CSVLogger,
    EarlyStopping,
    GradientAccumulation,
    GradientClip,
    Learner,
    MixedPrecision,
    MixUp,
    ParamScheduler,
    Recorder,
    ReduceLROnPlateau,
    SaveModel,
    State,
    accuracy,
    dataloaders,
    fit,
    load,
    save,
)

EPOCHS = 3
"""Of which EarlyStopping lets two happen."""

RUNS = [("cycle", 0), ("cycle", 2), ("plateau", 0), ("plateau", 2)]
"""What the learner is like, and how many workers load its data."""

Place = tuple[int, bool, int]
"""A batch: epoch, whether it is of the training phase, and its number there."""

PLACES: list[Place] = [
    (epoch, training, number)
    for epoch in range(2)
    for training, count in ((True, 5), (False, 2))
    for number in range(count)
]


class Jittered:
    """Twenty samples of two classes, moved a little at random each time they are asked for."""

    def __init__(self, seed: int, size: int) -> None:
        self.x = torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index] + 0.1 * torch.randn(4), int(self.x[index].sum() > 0)


@dataclass(frozen=True)
class StopAt(Callback):
    """Ctrl-C in the middle of a batch."""

    place: Place
    reports = True

    def after_pred(self, state: State) -> None:
        """Press it."""
        if (state.epoch, state.training, state.iter) == self.place:
            os.kill(os.getpid(), signal.SIGINT)


def everything(kind: str, workers: int, table: Path) -> Learner:
    """Chance in the data, the mixing and the model; memory in the optimizer and in every callback.

    In "cycle" lr is scheduled and the last epoch counts as the best; in "plateau" lr is reduced and
    the first does.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2)
        )
    data = dataloaders(
        Jittered(1, 20), Jittered(2, 14), 4, workers=workers, keep_workers=workers > 0
    )
    schedules: dict[str, Any] = {"mom": Linear(0.95, 0.8), "model.3.p": Linear(0.1, 0.4)}
    callbacks: list[Any] = [
        Recorder(train_metrics=True),
        MixUp(0.4),
        MixedPrecision(torch.float16, init_scale=2.0**17, growth_interval=1),
        GradientAccumulation(batches=2),
        GradientClip(0.5),
        AverageParams(decay=0.8),
        EarlyStopping(min_delta=10.0),
        CSVLogger(table),
    ]
    if kind == "plateau":
        callbacks += [
            ReduceLROnPlateau(min_delta=10.0, factor=2.0),
            SaveModel(None, min_delta=10.0),
        ]
    else:
        schedules["lr"] = one_cycle(0.05)
        callbacks.append(SaveModel(None, "train_iter"))
    callbacks.append(ParamScheduler(schedules))
    return Learner(model, data, cross_entropy, fuse(adamw(lr=0.02)), (accuracy,), callbacks)


def folder_of(root: Path, place: Place) -> Path:
    """Where what belongs to a run that is stopped there is kept."""
    return root / "-".join(map(str, place))


def stop(name: str) -> None:
    """Run to the end, without workers; then, with them, until a Ctrl-C, for every place;
    and save.
    """
    for kind, workers in RUNS:
        root = Path(name) / f"{kind}-{workers}"
        mine = everything(kind, 0, root / "table.csv")
        save(fit(mine, mine.init(seed=5), EPOCHS), root / "end")
        mine = everything(kind, workers, root / "unused.csv")
        for place in PLACES:
            folder = folder_of(root, place)
            stopped = fit(
                with_table(mine, folder), mine.init(seed=5), EPOCHS, [StopAt(place)], stop="return"
            )
            assert stopped.stopped == "SIGINT", place
            save(stopped, folder / "stopped")


def go_on(name: str) -> None:
    """Load every state that `stop` has saved, run to the end, and save."""
    for kind, workers in RUNS:
        root = Path(name) / f"{kind}-{workers}"
        mine = everything(kind, workers, root / "unused.csv")
        for place in PLACES:
            folder = folder_of(root, place)
            stopped = load(folder / "stopped", mine.init())
            save(fit(with_table(mine, folder), stopped, EPOCHS, resume=True), folder / "end")


def with_table(mine: Learner, folder: Path) -> Learner:
    """The learner that writes its table into another folder."""
    others = [callback for callback in mine.callbacks if not isinstance(callback, CSVLogger)]
    return replace(mine, callbacks=(*others, CSVLogger(folder / "table.csv")))


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](*sys.argv[2:])
