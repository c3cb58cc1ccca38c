"""A small tower whose params, slots and averages are cut over ranks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import functional_sgd as fs
from loop import (
    AverageParams,
    Batches,
    DataLoaders,
    GradientAccumulation,
    Learner,
    SaveModel,
    State,
    gathering,
    parallel,
    shard,
)

EACH = ("blocks.0", "blocks.1")


class Block(nn.Module):
    """Widths that two ranks cannot share evenly."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 11),
            nn.Linear(11, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.tanh(self.up(self.norm(x))))
        return out


class Tower(nn.Module):
    """An embedding, blocks, and a head whose weights are those of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.scale = nn.Embedding(13, 7), nn.Parameter(torch.tensor(1.5))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(7, 13, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.scale * self.table(tokens)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


def loss(pred: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(pred.flatten(0, 1), target.flatten())


OPTS: dict[str, Callable[[], fs.Optimizer]] = {
    "adamw": lambda: fs.chain(fs.clip_norm, fs.adamw(lr=0.01), max_norm=0.5),
    "lamb": lambda: fs.lamb(lr=0.01),
    "schedule free": lambda: fs.schedule_free_adamw(lr=0.01),
}

CALLBACKS: dict[str, Callable[[], list[Any]]] = {
    "none": list,
    "average": lambda: [AverageParams(0.9)],
    "accumulation": lambda: [GradientAccumulation(batches=2)],
    "best": lambda: [SaveModel(None)],
}


def tower(opt: str = "adamw", callbacks: str = "none") -> Learner:
    """On 29 sequences, in batches of 8: the last has 5."""
    tokens = torch.randint(0, 13, (29, 7), generator=torch.Generator().manual_seed(0))
    pairs = tokens[:, :-1], tokens[:, 1:]
    data = DataLoaders(Batches(pairs, 8, shuffle=True), Batches(pairs, 8))
    torch.manual_seed(1)
    return Learner(Tower().double(), data, loss, OPTS[opt](), callbacks=CALLBACKS[callbacks]())


def started_in_pieces(one: Learner, blocks: tuple[str, ...], again: bool) -> tuple[Learner, State]:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    mine = parallel(replace(one, model=gathering(one.model, blocks, again)))
    return mine, shard(mine, mine.init(seed=3), mesh)
