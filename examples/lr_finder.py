"""Which lr? One network, one curve of losses over rising lrs, and what four people read from it.

fastai goes from 1e-7 to 10 in 100 batches, smooths the losses, and has four rules for the curve
(`found.suggestions`). The course's miniai multiplies lr by 1.3 after every batch, stops when a loss
is above 3 times the smallest, and leaves the reading to you: `Miniai`, below, is all of it. Then
each lr is tried.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import tyro
from digits import digits
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import nn

from functional_sgd import momentum
from loop import (
    Callback,
    CancelFit,
    History,
    Learner,
    LRFind,
    Recorder,
    State,
    accuracy,
    fit,
    lr_find,
)


@dataclass(frozen=True)
class Miniai(Callback):
    """The course's finder: lr times `factor` after every batch, until the loss is 3 times the
    smallest.
    """

    factor: float = 1.3
    run_after: ClassVar[tuple[type | str, ...]] = (Recorder,)

    def after_batch(self, state: State) -> State | None:
        """Compare, and raise lr."""
        if not state.training:
            return None
        loss = float(state.history.losses[-1])
        least = min(state.memory.get(self.name, math.inf), loss)
        if not loss <= 3 * least:
            raise CancelFit(state)
        hyper = {**state.hyper, "lr": state.hyper["lr"] * self.factor}
        return state.replace(hyper=hyper).remember(self.name, least)


def picture(found: LRFind, history: History, chosen: dict[str, float]) -> Figure:
    """Both curves, with the choices marked on fastai's."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*found.curve, label="fastai: smoothed, 100 batches")
    axes.plot(list(history.hypers["lr"]), list(history.losses), ".-", label="miniai: raw, x 1.3")
    lrs, losses = found.curve
    for name, lr in chosen.items():
        nearest = min(range(len(lrs)), key=lambda index: abs(math.log(lrs[index] / lr)))
        axes.plot(lr, losses[nearest], "o", label=f"{name}: {lr:.2g}")
    axes.set(xlabel="lr", xscale="log", ylabel="loss", ylim=(0, 2 * losses[0]))
    axes.legend(frameon=False)
    return figure


def main(
    epochs: int = 3,
    start: float = 1e-5,
    seed: int = 0,
    device: str = "cpu",
    pictures: Path = Path("pictures"),
) -> None:
    """Find lrs, try each, and save a picture.

    Args:
        epochs: How long each lr is tried.
        start: The lr that miniai's search begins with.
        seed: Decides the first weights and the order of the data.
        device: Where to train.
        pictures: The folder for the picture.
    """
    torch.set_num_threads(1)  # faster for so small a network
    torch.manual_seed(seed)
    data, _, _ = digits()
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10))
    learner = Learner(net, data, nn.functional.cross_entropy, momentum(), [accuracy])
    begin = learner.init(seed, device)

    found = lr_find(learner, begin)
    by_hand = fit(learner, begin, 100, [Miniai()], lr=start).history
    losses, lrs = list(by_hand.losses), list(by_hand.hypers["lr"])
    print(f"fastai's search: {len(found.lrs)} batches, miniai's: {len(losses)}")

    chosen = {**found.suggestions._asdict()}
    chosen["miniai's lowest / 10"] = lrs[losses.index(min(losses))] / 10
    table = Table("lr by", "lr", f"loss after {epochs} epochs", "accuracy")
    for name, lr in chosen.items():
        row = fit(learner, begin, epochs, lr=lr).history.rows[-1]
        table.add_row(name, f"{lr:.2g}", f"{row['valid_loss']:.3f}", f"{row['accuracy']:.3f}")
    Console().print(table)
    pictures.mkdir(parents=True, exist_ok=True)
    picture(found, by_hand, chosen).savefig(pictures / "lr_finder.png", dpi=120)
    print(f"saved {pictures}/lr_finder.png")


if __name__ == "__main__":
    tyro.cli(main)
