"""How much memory does a whole run take, next to a loop by hand with torch's fused AdamW?

Twelve layers of 1536 x 1536 and batches of 16, so that params, gradients and slots are nearly all
of it. Measured as in memory.py, in a process for each: the peak beyond what the process has before
the model is made.
"""

import json
from collections.abc import Callable

import torch
import tyro
from common import save, say, show
from memory import in_new_process, resident, set_back
from torch import nn
from torch.nn.functional import mse_loss

import functional_sgd as fs
from functional_sgd.fusion.spent import Donate
from loop import Batches, DataLoaders, Learner, fit

LAYERS, WIDTH, BATCH, BATCHES = 12, 1536, 16, 6


def model(layers: int, width: int) -> nn.Module:
    """Linear layers, one after the other."""
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


def by_hand(layers: int, width: int) -> None:
    """A plain loop."""
    net, x = model(layers, width), torch.randn(BATCH * BATCHES, width)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    for batch in x.split(BATCH):
        loss = mse_loss(net(batch), batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def ours(adopt: bool, donate: Donate = False) -> Callable[[int, int], None]:
    """A fit; with `adopt` the model gives its tensors away."""

    def run(layers: int, width: int) -> None:
        data = DataLoaders(Batches((x := torch.randn(BATCH * BATCHES, width), x), BATCH))
        learner = Learner(model(layers, width), data, mse_loss, fs.adamw())
        # Not **options: Python holds such arguments, and so the first state, during the call.
        fit(learner, learner.init(donate=adopt), 1, donate=donate)

    return run


RUNS: dict[str, Callable[[int, int], None]] = {
    "PyTorch by hand, fused AdamW": by_hand,
    "fit": ours(False),
    'fit, donate="grads"': ours(False, donate="grads"),
    "fit, the model gives its tensors": ours(True),
    'fit, donate="grads", the model gives its tensors': ours(True, donate="grads"),
    "fit, donate=True, the model gives its tensors": ours(True, donate=True),
}


def measure(who: str) -> float:
    """The peak of a run, in bytes beyond the process; a tiny run comes first, which compiles."""
    RUNS[who](2, 200)
    empty = set_back()
    RUNS[who](LAYERS, WIDTH)
    return resident("VmHWM") - empty


def main(here: str = "", save_results: bool = False) -> None:
    """Measure the memory of runs.

    Args:
        here: Only measure this run in this process, and print JSON.
        save_results: Write the table into results/.
    """
    if here:
        print(json.dumps(measure(here)))
        return
    params = 4 * sum(param.numel() for param in model(LAYERS, WIDTH).parameters())
    found: dict[str, float] = {who: in_new_process(__file__, "--here", who) for who in RUNS}
    plain = next(iter(found.values()))
    rows = [
        [who, f"{peak / 2**20:,.0f}", f"{peak / params:.2f}", f"{peak / plain:.2f}"]
        for who, peak in found.items()
    ]
    text = say(f"The peak of {BATCHES} batches of {BATCH}, {LAYERS} layers of {WIDTH} x {WIDTH}.")
    text += "\n" + show("runs", ["run", "MiB", "copies of the params", "times by hand"], rows)
    if save_results:
        save("run_memory", text)


if __name__ == "__main__":
    tyro.cli(main)
