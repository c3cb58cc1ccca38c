"""What does a batch cost on several ranks? `fit` of a parallel learner, beside a loop by hand with
DistributedDataParallel; both on all ranks at once.

Processes talk through gloo on one machine. Each way trains in turn, several times over. Ranks wait
for each other, so whenever the machine does something else, all do: medians of single batches are
taken, which are hardly touched by that.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.distributed as dist
import tyro
from common import on_ranks, save, say, show
from torch import nn

from functional_sgd import adamw
from loop import Batches, DataLoaders, Learner, fit, parallel

BATCHES, BATCH = 40, 64

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "64-64-10": lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
    "64-1024-1024-10": lambda: nn.Sequential(
        *(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    ),
}


@dataclass(frozen=True)
class Clock:
    """The times at which batches ended. As a callback, it comes last."""

    order = 20_000
    times: list[float] = field(default_factory=list)

    def after_batch(self, state: object = None) -> None:
        """Look at the clock."""
        self.times.append(time.perf_counter())


def by_hand(
    make: Callable[[], nn.Module], x: torch.Tensor, y: torch.Tensor, clock: Clock
) -> Callable[[], None]:
    """An epoch with DDP and torch's fused AdamW; each rank has its rows of each batch."""
    model = nn.parallel.DistributedDataParallel(make())
    opt = torch.optim.AdamW(model.parameters(), fused=True)
    rank, world = dist.get_rank(), dist.get_world_size()
    size = BATCH // world

    def epoch() -> None:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        for batch in range(BATCHES):
            mine = order[batch * BATCH + rank * size : batch * BATCH + (rank + 1) * size]
            loss = nn.functional.cross_entropy(model(x[mine]), y[mine])
            loss.backward()
            opt.step()
            opt.zero_grad()
            clock.after_batch()

    return epoch


def ours(
    make: Callable[[], nn.Module],
    x: torch.Tensor,
    y: torch.Tensor,
    clock: Clock,
    together: bool,
    **options: bool,
) -> Callable[[], None]:
    """An epoch of `fit`, on all ranks together or on each one alone."""
    world = 1 if together else dist.get_world_size()
    own = x[: len(x) // world], y[: len(y) // world]
    data = DataLoaders(Batches(own, BATCH // world, shuffle=True))
    torch.manual_seed(0)
    learner = Learner(make(), data, nn.functional.cross_entropy, adamw())
    learner = parallel(learner) if together else learner
    start = learner.init()
    return lambda: fit(learner, start, 1, [clock], **options) and None


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """The milliseconds that a batch takes each way, on this process."""
    x, y = torch.randn(BATCHES * BATCH, 64), torch.randint(0, 10, (BATCHES * BATCH,))
    table, clock = {}, Clock()
    for name, make in NETWORKS.items():
        data = (make, x, y, clock)
        ways = {
            "DDP by hand": by_hand(*data),
            "parallel": ours(*data, together=True),
            "parallel, compile=True": ours(*data, together=True, compile=True),
            "each rank alone": ours(*data, together=False),
        }
        every: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(1 + rounds):
            for way, epoch in ways.items():
                dist.barrier()
                clock.times.clear()
                epoch()
                if number:
                    every[way] += [1e3 * (end - start) for start, end in pairwise(clock.times)]
        table[name] = {way: statistics.median(batches) for way, batches in every.items()}
    return table


def main(world: int = 2, rounds: int = 20, save_results: bool = True) -> None:
    """Measure, print, and write benchmarks/results/<date>-ranks.md."""
    table = on_ranks(world, measure, rounds)
    columns = list(next(iter(table.values())))
    rows = [[name, *(f"{took[way]:.2f}" for way in columns)] for name, took in table.items()]
    text = say(
        f"Milliseconds a batch of {BATCH}, the median of {rounds} epochs of {BATCHES}: {world} "
        f"processes with gloo, one thread each. DDP has torch's fused AdamW and records nothing."
    )
    text += "\n" + show("ranks", ["network", *columns], rows)
    if save_results:
        save("ranks", text)


if __name__ == "__main__":
    tyro.cli(main)
