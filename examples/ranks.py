"""One run on several processes, compared with the same run on one.

torchrun --nproc-per-node 2 examples/ranks.py
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from sklearn.datasets import load_digits
from torch import nn

from functional_sgd import adamw, chain, clip_norm
from loop import (
    Batches,
    Checkpoint,
    DataLoaders,
    Learner,
    Progress,
    State,
    accuracy,
    fit_one_cycle,
    global_batch_norm,
    parallel,
    validate,
)


def digits() -> DataLoaders:
    """1,797 images of handwritten digits, 360 of them held out. The last batch has 29.

    In float64, so that the order of additions is all that can differ.
    """
    bunch: Any = load_digits()
    images = torch.tensor(bunch.images).flatten(1) / 8 - 1  # float64
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train = images[order[360:]], labels[order[360:]]
    valid = images[order[:360]], labels[order[:360]]
    return DataLoaders(Batches(train, batch_size=64, shuffle=True), Batches(valid, 128))


def network() -> nn.Module:
    """Two layers; BatchNorm, whose statistics a rank's part of a batch would change."""
    return nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))


def distance(one: State, other: State) -> float:
    """How far the params are apart, at most."""
    pairs = [(value, other.params[name]) for name, value in one.params.items()]
    return max(float((value - second).abs().max()) for value, second in pairs)


def main(
    epochs: int = 3,
    lr: float = 1e-2,
    seed: int = 0,
    device: str | None = None,
    folder: Path | None = None,
) -> None:
    """Train on all processes, then on rank 0 alone, and say how far apart the two ends are.

    Args:
        epochs: Passes over the training images.
        lr: The highest learning rate of the cycle.
        seed: Decides the first weights and the order of the data.
        device: Such as cuda; by default a GPU for each process where there are any, else the CPU.
        folder: Where checkpoints go; the same command goes on from there, on any number of ranks.
    """
    cuda = torch.cuda.is_available() if device is None else device.startswith("cuda")
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    place = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    opt = chain(clip_norm, adamw(), max_norm=1.0)
    torch.manual_seed(seed)
    model, data, loss = network().double(), digits(), nn.CrossEntropyLoss()
    learner = Learner(model, data, loss, opt, [accuracy])
    mine = parallel(replace(learner, model=global_batch_norm(model)))
    callbacks = [Progress(), *([] if folder is None else [Checkpoint(folder)])]
    began = time.perf_counter()
    end = fit_one_cycle(mine, mine.init(seed, place), epochs, lr, callbacks=callbacks)
    seconds = time.perf_counter() - began
    found = validate(mine, end)
    dist.destroy_process_group()
    if rank == 0:
        alone = fit_one_cycle(learner, learner.init(seed, place), epochs, lr)
        print(f"{ranks} ranks: accuracy {found['accuracy']:.3f} in {seconds:.1f} s")
        print(f"one process ends {distance(end, alone):.0e} away")


if __name__ == "__main__":
    tyro.cli(main)
