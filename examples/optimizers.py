"""Train one small network with many optimizers: a table of time, memory and loss, and a picture.

    python examples/optimizers.py --names adamw lion prodigy muon_with_adamw

Each is tried with its own lr, times the factors of `--scales`; the best is what the table shows. It
is a small network, so this says whether an optimizer works, and not how good it is elsewhere.
"""

import inspect
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import tyro
from digits import digits
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import nn

from functional_sgd import Optimizer, recipes
from loop import Learner, State, fit, validate

NAMES = (
    *("sgd", "momentum", "rmsprop", "adam", "adamw", "lamb", "lion", "adan", "ademamix", "adopt"),
    *("prodigy", "dowg", "schedule_free_adamw", "adafactor", "muon_with_adamw", "soap"),
)


def network() -> nn.Module:
    """Two linear layers."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10))


def made(name: str, scale: float) -> Optimizer:
    """The optimizer of this name, with its own lr times the scale."""
    import functional_sgd

    make = getattr(functional_sgd, name)
    lr = inspect.signature(make).parameters["lr"].default
    opt: Optimizer = make(lr=lr * scale)
    return opt


def trained(
    name: str, scale: float, epochs: int, seed: int, device: str
) -> tuple[dict[str, float], State, float]:
    """(what validation says, the state, seconds)."""
    torch.manual_seed(seed)
    data, _, _ = digits()
    learner = Learner(network(), data, nn.functional.cross_entropy, made(name, scale))
    start = learner.init(seed=seed, device=device)
    began = time.perf_counter()
    end = fit(learner, start, epochs)
    return validate(learner, end), end, time.perf_counter() - began


def main(
    names: Sequence[str] = NAMES,
    scales: Sequence[float] = (1.0, 3.0, 10.0, 30.0),
    epochs: int = 5,
    seed: int = 0,
    device: str = "cpu",
    pictures: Path = Path("pictures"),
) -> None:
    """Train with each optimizer, print a table, and save a picture.

    Args:
        names: Names of recipes (functional_sgd.recipes() lists them), and of schedule-free ones.
        scales: What the lr of each is multiplied by, in turn.
        epochs: Passes over the digits.
        seed: Decides first weights and orders.
        device: Where to train.
        pictures: The folder for the picture.
    """
    torch.set_num_threads(1)  # faster for so small a network
    known, table = recipes(), Table("optimizer", "loss", "lr", "seconds", "bytes a parameter")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(names):
        tries = [(scale, *trained(name, scale, epochs, seed, device)) for scale in scales]
        scale, found, end, seconds = min(tries, key=lambda one: one[1]["valid_loss"])
        memory = f"{known[name].memory:.1f}" if name in known else "-"
        lr = made(name, scale).hyper["lr"]
        table.add_row(name, f"{found['valid_loss']:.4f}", f"{lr:.2g}", f"{seconds:.2f}", memory)
        losses = torch.stack(list(end.history.losses)).cpu()
        style = "-" if number < 10 else "--"  # there are ten colours
        axes.plot(losses.unfold(0, 20, 5).mean(1), style, label=name)
    Console().print(table)
    axes.set_yscale("log")
    axes.set_xlabel("batches / 5")
    axes.set_ylabel("loss, mean of 20 batches")
    figure.legend(loc="outside right center", fontsize="small", frameon=False)
    pictures.mkdir(parents=True, exist_ok=True)
    figure.savefig(pictures / "optimizers.png", dpi=120)
    print(f"best lr of {len(scales)} each; picture: {pictures / 'optimizers.png'}")


if __name__ == "__main__":
    tyro.cli(main)
