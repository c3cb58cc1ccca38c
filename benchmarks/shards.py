"""How long one update of DTensors takes: fused on this process's pieces, as DTensor operators, and
by torch.optim; beside it, the same on plain tensors of the size of the pieces.

Processes talk through gloo on one machine. Each way is measured in turn, several times over, and
the best is taken, so that what else the machine does counts as little as possible.
"""

import time
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
import tyro
from common import on_ranks, save, say, show
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import functional_sgd as fs

STEPS = 5
"""Of one way, before it is the turn of the next."""

Tensors = dict[str, torch.Tensor]
Step = Callable[[], object]

RECIPES: Mapping[str, fs.Optimizer] = {
    "adamw": fs.adamw(),
    "clip_norm, adamw": fs.chain(fs.clip_norm, fs.adamw()),
    "lamb": fs.lamb(),
}


def kept_going(opt: fs.Optimizer, params: Tensors, grads: Tensors) -> Step:
    """A step that goes on from where the last one ended."""
    now = [params, opt.init(params)]

    def step() -> None:
        now[0], now[1] = opt(now[0], grads, now[1])

    return step


def of_torch(params: Tensors, grads: Tensors, **how: bool) -> Step:
    """A step of torch.optim.AdamW."""
    leaves = [torch.nn.Parameter(leaf) for leaf in params.values()]
    for leaf, grad in zip(leaves, grads.values(), strict=True):
        leaf.grad = grad
    step: Step = torch.optim.AdamW(leaves, **how).step
    return step


def ways(name: str, leaves: int, side: int) -> dict[str, Step]:
    """Steps of one optimizer, by the names of the columns of the table."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def tree() -> Tensors:
        return {
            f"{index}": distribute_tensor(torch.randn(side, side), mesh, [Shard(0)])
            for index in range(leaves)
        }

    def pieces() -> Tensors:
        return {n: leaf.to_local() for n, leaf in tree().items() if isinstance(leaf, DTensor)}

    opt = RECIPES[name]
    donated, pure = fs.fuse(opt, donate=True), fs.fuse(opt)
    found = {
        "donated": kept_going(donated, tree(), tree()),
        "pure": kept_going(pure, tree(), tree()),
        "leaf by leaf": kept_going(opt, tree(), tree()),
        "plain pieces, donated": kept_going(donated, pieces(), pieces()),
    }
    if name == "adamw":
        found["torch fused"] = of_torch(tree(), tree(), fused=True)
        found["torch foreach"] = of_torch(tree(), tree(), foreach=True)
    return found


def measure(leaves: int, side: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of the best step of each way, on this process."""
    table = {}
    for name in RECIPES:
        steps = ways(name, leaves, side)
        best = dict.fromkeys(steps, float("inf"))
        for number in range(1 + rounds):
            for way, step in steps.items():
                for again in range(STEPS):
                    dist.barrier()
                    start = time.perf_counter()
                    step()
                    if number and again:  # kernels are there, and the columns are in the cache
                        best[way] = min(best[way], 1e3 * (time.perf_counter() - start))
        table[name] = best
    return table


def main(
    world: int = 2, leaves: int = 48, side: int = 160, rounds: int = 15, save_results: bool = True
) -> None:
    """Measure, print, and write benchmarks/results/<date>-shards.md."""
    table = on_ranks(world, measure, leaves, side, rounds)
    columns = list(dict.fromkeys(way for best in table.values() for way in best))
    rows = [
        [name, *(f"{best[way]:.2f}" if way in best else "" for way in columns)]
        for name, best in table.items()
    ]
    text = say(
        f"Milliseconds a step, the best of {rounds * (STEPS - 1)}: {leaves} leaves of "
        f"{side} x {side}, float32, "
        f"each cut by rows over {world} processes with gloo, one thread each."
    )
    text += "\n" + show("shards", ["optimizer", *columns], rows)
    if save_results:
        save("shards", text)


if __name__ == "__main__":
    tyro.cli(main)
