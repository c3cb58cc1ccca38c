"""Learners that one process and several ranks train alike, in float64."""

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import functional_sgd as fs
from loop import (
    AverageParams,
    Batches,
    DataLoaders,
    GradientAccumulation,
    GradientClip,
    Learner,
    ParamScheduler,
    State,
    accuracy,
    fit,
    make_loader,
    parallel,
)
from loop.metrics import F1


class Net(nn.Module):
    """Two layers, and one that only some samples use."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rare, self.last = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        far = (x[:, 0] > 1.5)[:, None]
        if bool(far.any()):
            hidden = hidden + far * self.rare(x)
        out: Tensor = self.last(F.relu(hidden))
        return out


def samples(count: int = 101) -> tuple[Tensor, Tensor]:
    """Inputs in float64, and classes."""
    x = torch.randn(count, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return x, (x[:, 0] + x[:, 1] > 0).long() + (x[:, 2] > 0.5).long()


class Noisy(torch.utils.data.Dataset[Any]):
    """Samples with augmentation: noise drawn when they are fetched."""

    def __init__(self, count: int = 101) -> None:
        self.x, self.y = samples(count)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index] + 0.1 * torch.randn(5, dtype=torch.float64), self.y[index]


def batches(batch_size: int = 16) -> DataLoaders:
    """In memory; the last batch has 5 samples."""
    return DataLoaders(Batches(samples(), batch_size, shuffle=True), Batches(samples(40), 16))


def loaders() -> DataLoaders:
    """Fetched one by one."""
    return DataLoaders(make_loader(Noisy(), 16, shuffle=True), make_loader(Noisy(40), 16))


def plain() -> DataLoaders:
    """Any loader: lists of dicts and tensors."""
    x, y = samples(50)
    pairs = [(x[k : k + 7], y[k : k + 7]) for k in range(0, 50, 7)]
    return DataLoaders(pairs, pairs)


def learner(
    opt: fs.Optimizer | None = None,
    data: DataLoaders | None = None,
    callbacks: Any = (),
    loss: Any = F.cross_entropy,
    model: Callable[[], nn.Module] = Net,
) -> Learner:
    """A learner with metrics of both kinds."""
    torch.manual_seed(1)
    return Learner(
        model().double(),
        batches() if data is None else data,
        loss,
        fs.adamw(lr=0.02) if opt is None else opt,
        [accuracy, F1(average="macro")],
        callbacks,
    )


def penalized(pred: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy, some targets of which do not count."""
    return F.cross_entropy(pred, torch.where(target == 2, -100, target))


def ignoring(state: State) -> Tensor:
    """How many targets count."""
    assert state.yb is not None
    return (state.yb[0] != 2).sum()


CASES: dict[str, Callable[[], tuple[Learner, dict[str, Any]]]] = {
    "adamw": lambda: (learner(), {}),
    "clip and lamb": lambda: (learner(fs.chain(fs.clip_norm, fs.lamb(lr=0.02))), {}),
    "fetched": lambda: (learner(data=loaders()), {}),
    "any loader": lambda: (learner(data=plain()), {}),
    "tiny batches": lambda: (learner(data=batches(1)), {}),
    "accumulated": lambda: (
        learner(callbacks=[GradientAccumulation(batches=3), GradientClip(0.5)]),
        {},
    ),
    "accumulated samples": lambda: (learner(callbacks=[GradientAccumulation(samples=40)]), {}),
    "averaged": lambda: (learner(callbacks=[AverageParams(0.9)]), {}),
    "schedule free": lambda: (learner(fs.schedule_free_adamw(lr=0.02)), {}),
    "scheduled": lambda: (
        learner(callbacks=[ParamScheduler({"lr": fs.schedules.one_cycle(0.05)})]),
        {},
    ),
    # A valid_loss is a mean over samples, so with targets left out it depends on the batches.
    "targets": lambda: (
        learner(data=DataLoaders(batches().train), loss=penalized),
        {"weight": ignoring},
    ),
    "accumulated targets": lambda: (
        learner(
            data=DataLoaders(batches().train),
            loss=penalized,
            callbacks=[GradientAccumulation(batches=3, weight=ignoring)],
        ),
        {"weight": ignoring},
    ),
    "donated": lambda: (learner(), {"donate": True}),
    "steps": lambda: (learner(data=plain()), {"steps": 21, "steps_per_epoch": 5}),
}


def trained(case: str, ranks: bool, epochs: int = 3) -> State:
    """The end of a run of one of the cases, on this process or as one of several ranks."""
    mine, options = CASES[case]()
    weight = options.pop("weight", "samples")
    if ranks:
        mine = parallel(mine, weight=weight)
    return fit(mine, mine.init(seed=5), None if "steps" in options else epochs, **options)


def numbers(state: State) -> list[Tensor]:
    """All numbers of a state: params, slots, losses, rows, memory. Accuracies are float32."""
    rows = [
        torch.tensor([value for value in row.values() if value is not None], dtype=torch.float32)
        for row in state.history.rows
    ]
    memory = {name: one for name, one in state.memory.items() if name != "recorder"}
    tree: Any = (state.params, state.buffers, state.opt_state, memory)
    leaves = [one for one in optree.tree_leaves(tree) if isinstance(one, Tensor)]
    return [*leaves, torch.stack(list(state.history.losses)), *rows]


def as_numbers(case: str) -> list[Tensor]:
    """The numbers at the end of a run on ranks."""
    return numbers(trained(case, ranks=True))


class Normed(nn.Module):
    """A network with BatchNorm and dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.drop(F.relu(self.norm(self.first(x)))))
        return out
