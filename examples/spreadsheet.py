"""Lesson 18's workbook: five optimizers look for the line y = 2 x + 30, and one of them lowers its
lr by itself.

The sheets' numbers stand beside ours, and all are met. What they show: the intercept is slow, below
6 after 100 epochs of SGD or momentum; RMSProp is there after 100; Adam is near after ten, and jumps
about the line for ever; once lr falls, by hand or because the gradients have grown, it stays there.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from workbook import CUTS, SHEETS, LastRowStays, Pair, Sheet, X

from loop import AnnealOnGradRatio, DataLoaders, Learner, fit, sqr_avg_size


def squared(pred: Tensor, target: Tensor) -> Tensor:
    """The workbook's loss; a batch is one row."""
    return (pred - target).square().sum()


def pair(values: Pair, device: str) -> dict[str, Tensor]:
    """Numbers for (intercept, slope), as nn.Linear(1, 1) keeps them."""
    numbers = torch.tensor(values, dtype=torch.float64, device=device)
    return {"weight": numbers[1].view(1, 1), "bias": numbers[0].view(1)}


def press_run(
    sheet: Sheet, xs: Sequence[float], epochs: int, device: str
) -> tuple[list[Pair], list[float]]:
    """The (intercept, slope) after every epoch, and the lr of each: every epoch is a run that the
    next one goes on from.
    """
    x = torch.tensor([[[value]] for value in xs]).double()
    data = DataLoaders(list(zip(x, 2 * x + 30, strict=True)))
    learner = Learner(nn.Linear(1, 1).double(), data, squared, sheet.opt)
    state = learner.init(device=device)
    slots = {slot: pair(values, device) for slot, values in sheet.slots.items()}
    opt_state = {**state.opt_state, **slots}
    state = state.replace(params=pair((1.0, 1.0), device), opt_state=opt_state)
    callbacks: list[Any] = [LastRowStays()]
    if sheet.anneals:
        callbacks.append(AnnealOnGradRatio(measure=sqr_avg_size, reset_on_fit=False))
    line, lrs = [], []
    for epoch in range(1, epochs + 1):
        lr = sheet.lrs.get(epoch, state.hyper["lr"])
        state = fit(learner, state, 1, callbacks, lr=lr)
        line.append((state.params["bias"].item(), state.params["weight"].item()))
        lrs.append(lr)
    return line, [*lrs, state.hyper["lr"]]


def cuts(lrs: Sequence[float]) -> list[int]:
    """The epochs, from 1, after which lr was lower."""
    return [epoch for epoch, (lr, later) in enumerate(pairwise(lrs), start=1) if later < lr]


def picture(lines: dict[str, list[Pair]], lrs: dict[str, list[float]]) -> Figure:
    """How far each sheet is from the line, and the lr of those that change it."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, line in lines.items():
        left.plot([abs(intercept - 30) + abs(slope - 2) for intercept, slope in line], label=name)
    for name in ("adam", "adam by hand", "adam_ann"):
        right.plot(lrs[name], label=name, drawstyle="steps-post")
    left.set(xlabel="epoch", ylabel="|intercept - 30| + |slope - 2|", yscale="log")
    right.set(xlabel="epoch", ylabel="lr", yscale="log")
    for axes in (left, right):
        axes.legend(frameon=False)
    return figure


def main(
    epochs: int = 100, seed: int = 0, device: str = "cpu", pictures: Path = Path("pictures")
) -> None:
    """Press run on every sheet, print its cells beside ours, and save a picture.

    Args:
        epochs: Passes over the 29 points; cells of later epochs are left out.
        seed: 0 for the workbook's own points; else they are drawn anew, and no cell is met.
        device: Where to compute.
        pictures: The folder for the picture.
    """
    drawn = torch.randint(1, 101, (29,), generator=torch.Generator().manual_seed(seed))
    xs = drawn.tolist() if seed else X
    lines, lrs = {}, {}
    table = Table("sheet", "epoch", "intercept", "ours", "slope", "ours")
    for name, sheet in SHEETS.items():
        lines[name], lrs[name] = press_run(sheet, xs, min(epochs, max(sheet.cells)), device)
        for epoch, cells in sheet.cells.items():
            if epoch <= epochs:
                ours = lines[name][epoch - 1]
                both = (number for two in zip(cells, ours, strict=True) for number in two)
                table.add_row(name, str(epoch), *(f"{number:.6f}" for number in both))
        table.add_section()
    Console().print(table)
    print(f"adam_ann cuts lr after epochs {[*CUTS]} there,")
    print(f"                      and in {cuts(lrs['adam_ann'])} here")
    pictures.mkdir(parents=True, exist_ok=True)
    path = pictures / "spreadsheet.png"
    picture(lines, lrs).savefig(path, dpi=120)
    print(f"saved {path}")


if __name__ == "__main__":
    tyro.cli(main)
