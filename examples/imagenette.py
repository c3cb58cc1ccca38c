"""The table of the book's chapter: what each optimizer reaches with a ResNet on Imagenette, from
the same weights.

At --size 64 --arch resnet18 --bf16, one run each: after three epochs Adam is at 0.688, momentum at
0.641; after two of the three, momentum 0.546, Adam 0.535, RMSProp 0.527, SGD 0.497.
At --size 64 --epochs 1, means of three seeds (least to most): Adam 0.496 (0.486 to 0.503), momentum
0.426 (0.387 to 0.467), SGD 0.378 (0.356 to 0.396), RMSProp 0.369 (0.327 to 0.394).
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
import tyro
from imagenette_data import Transform, loaders
from rich.console import Console
from rich.table import Table
from torch import nn

import functional_sgd as fs
from loop import (
    DataLoaders,
    Learner,
    MixedPrecision,
    Progress,
    State,
    accuracy,
    fit,
    fit_one_cycle,
)


@dataclass(frozen=True)
class Row:
    """A row of the chapter: how it trains, and the accuracies that it got in three epochs."""

    opt: fs.Optimizer
    run: Callable[..., State]
    options: Mapping[str, Any]
    book: tuple[float, float, float]


ROWS = {
    "adam": Row(
        fs.adamw(sqr_mom=0.99, eps=1e-5), fit_one_cycle, dict(lr=3e-3), (0.323, 0.437, 0.595)
    ),
    "rmsprop": Row(
        fs.rmsprop(sqr_mom=0.99, eps=1e-7), fit_one_cycle, dict(lr=3e-3), (0.403, 0.504, 0.545)
    ),
    "momentum": Row(fs.sgd(mom=0.9), fit_one_cycle, dict(lr=3e-2), (0.246, 0.348, 0.419)),
    "sgd": Row(fs.sgd(), fit_one_cycle, dict(lr=3e-2), (0.242, 0.363, 0.409)),
    "constant": Row(fs.sgd(), fit, dict(lr=3e-2), (0.333, 0.442, 0.445)),
}
Name = Literal["all", "adam", "rmsprop", "momentum", "sgd", "constant"]


def train(row: Row, data: DataLoaders, arch: str, epochs: int, bf16: bool, **init: Any) -> State:
    """One run from the first weights of this seed."""
    torch.manual_seed(init["seed"])
    model = torchvision.models.get_model(arch, num_classes=10)
    callbacks = [Transform(), Progress(), *([MixedPrecision(torch.bfloat16)] if bf16 else [])]
    learner = Learner(model, data, nn.functional.cross_entropy, row.opt, [accuracy], callbacks)
    return row.run(learner, learner.init(**init), epochs, **row.options)


def main(
    root: Path = Path("data"),
    rows: tuple[Name, ...] = ("all",),
    size: int = 128,
    epochs: int = 3,
    arch: str = "resnet34",
    batch_size: int = 64,
    every: int = 1,
    bf16: bool = False,
    device: str = "cpu",
    seed: int = 0,
    short: bool = False,
) -> None:
    """Train the rows of the chapter, and print their accuracies beside its own.

    Args:
        root: Where imagenette2*.tgz is, or its folders.
        rows: Which rows of the chapter to repeat.
        size: Pixels on a side.
        epochs: Passes over the images, for each row.
        arch: A network of torchvision.
        batch_size: Images in a batch.
        every: Take one image in so many.
        bf16: Compute in bfloat16 where that is safe.
        device: Where to train: cpu, cuda, ...
        seed: Decides first weights, orders and windows.
        short: For a CPU: --size 32 --epochs 1 --arch resnet18 --every 8.
    """
    if short:
        size, epochs, arch, every = 32, 1, "resnet18", 8
    data = loaders(root, size, batch_size, every)
    table = Table("optimizer", "the book, 3 epochs", f"ours, {epochs} at {size} pixels", "seconds")
    for name, row in ROWS.items():
        if name not in rows and "all" not in rows:
            continue
        print(f"\n{name}: {row.opt}")
        started = time.perf_counter()
        end = train(row, data, arch, epochs, bf16, seed=seed, device=device)
        both = (row.book, end.history.column("accuracy"))
        cells = ["  ".join(f"{value:.3f}" for value in values) for values in both]
        table.add_row(name, *cells, f"{time.perf_counter() - started:.0f}")
    Console().print(table)


if __name__ == "__main__":
    tyro.cli(main)
