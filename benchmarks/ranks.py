"""What does a batch cost on several ranks? `fit` of a parallel learner, beside a loop by hand with
DistributedDataParallel; both on all ranks at once.

Processes talk through gloo on one machine. Each way trains in turn, several times over, and the
best is taken, so that what else the machine does counts as little as possible.
"""

import time
from collections.abc import Callable

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


def by_hand(make: Callable[[], nn.Module], x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
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

    return epoch


def ours(
    make: Callable[[], nn.Module], x: torch.Tensor, y: torch.Tensor, together: bool, **options: bool
) -> Callable[[], None]:
    """An epoch of `fit`, on all ranks together or on each one alone."""
    world = 1 if together else dist.get_world_size()
    own = x[: len(x) // world], y[: len(y) // world]
    data = DataLoaders(Batches(own, BATCH // world, shuffle=True))
    torch.manual_seed(0)
    learner = Learner(make(), data, nn.functional.cross_entropy, adamw())
    learner = parallel(learner) if together else learner
    start = learner.init()
    return lambda: fit(learner, start, 1, **options) and None


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds a batch of the best epoch of each way, on this process."""
    x, y = torch.randn(BATCHES * BATCH, 64), torch.randint(0, 10, (BATCHES * BATCH,))
    table = {}
    for name, make in NETWORKS.items():
        ways = {
            "DDP by hand": by_hand(make, x, y),
            "parallel": ours(make, x, y, together=True),
            "parallel, compile=True": ours(make, x, y, together=True, compile=True),
            "each rank alone": ours(make, x, y, together=False),
        }
        best = dict.fromkeys(ways, float("inf"))
        for number in range(1 + rounds):
            for way, epoch in ways.items():
                dist.barrier()
                start = time.perf_counter()
                epoch()
                if number:
                    best[way] = min(best[way], 1e3 * (time.perf_counter() - start) / BATCHES)
        table[name] = best
    return table


def main(world: int = 2, rounds: int = 10, save_results: bool = True) -> None:
    """Measure, print, and write benchmarks/results/<date>-ranks.md."""
    table = on_ranks(world, measure, rounds)
    columns = list(next(iter(table.values())))
    rows = [[name, *(f"{best[way]:.2f}" for way in columns)] for name, best in table.items()]
    text = say(
        f"Milliseconds a batch of {BATCH}, the best of {rounds} epochs of {BATCHES}: {world} "
        f"processes with gloo, one thread each. DDP has torch's fused AdamW and records nothing."
    )
    text += "\n" + show("ranks", ["network", *columns], rows)
    if save_results:
        save("ranks", text)


if __name__ == "__main__":
    tyro.cli(main)
