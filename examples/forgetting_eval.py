"""What happens if one forgets model.eval(): lesson 9 says "awful results", and to do it yourself.

The loop switches by itself, so it has to be forgotten by hand. Then BatchNorm takes the mean of
whatever batch it is given, and Dropout drops: the accuracy depends on the batch size, on what else
is in the batch, and on chance; and the images to validate on have changed the model afterwards.
"""

from pathlib import Path

import torch
import tyro
from digits import digits
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from functional_sgd import adamw, apply
from loop import Learner, State, accuracy, fit_one_cycle


def network() -> nn.Module:
    """Two convolutions with BatchNorm and a Dropout of a half."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Dropout(0.5), nn.Linear(128, 10)),
    )


@torch.no_grad()
def share_right(
    learner: Learner, state: State, x: Tensor, y: Tensor, size: int, training: bool
) -> tuple[float, dict[str, Tensor]]:
    """The accuracy in batches of this size, and the buffers afterwards."""
    right, buffers = 0.0, state.buffers
    learner.model.train(training)
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        pred, buffers = apply(learner.model, state.params, buffers, x[part])
        right += float((pred.argmax(-1) == y[part]).sum())
    return right / len(x), buffers


def main(
    epochs: int = 5,
    sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 64, 360),
    seed: int = 0,
    device: str = "cpu",
    pictures: Path = Path("pictures"),
) -> None:
    """Train once, then validate with and without eval(), in batches of several sizes.

    Args:
        epochs: Passes over the training images.
        sizes: Batch sizes to validate with.
        seed: Decides first weights, orders and dropout.
        device: Where to compute.
        pictures: The folder for the picture.
    """
    torch.set_num_threads(1)  # faster for so small a network
    torch.manual_seed(seed)
    data, x, y = digits()
    x, y = x.to(device), y.to(device)
    learner = Learner(network(), data, nn.functional.cross_entropy, adamw(), [accuracy])
    state = fit_one_cycle(learner, learner.init(seed, device), epochs, lr=1e-2)
    print(f"the loop's own validation: {state.history.column('accuracy')[-1]:.3f}")

    by_class = y.argsort(stable=True)
    table = Table("batch size", "eval()", "forgotten", "forgotten, sorted by class")
    found: list[list[float]] = []
    for size in sizes:
        ways = ((x, y, False), (x, y, True), (x[by_class], y[by_class], True))
        row = [share_right(learner, state, *way[:2], size, way[2])[0] for way in ways]
        table.add_row(str(size), *(f"{value:.3f}" for value in row))
        found.append(row)
    Console().print(table)

    _, after = share_right(learner, state, x[by_class], y[by_class], 4, training=True)
    leaked = share_right(learner, state.replace(buffers=after), x, y, 64, training=False)[0]
    print(f"with eval(), but after a validation without it, sorted by class: {leaked:.3f}")

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    names = ("eval()", "forgotten", "forgotten, sorted by class")
    for name, line in zip(names, zip(*found, strict=True), strict=True):
        axes.plot(sizes, line, "o-", label=name)
    axes.set(xlabel="batch size", xscale="log", ylabel="accuracy", ylim=(0, 1.02))
    axes.legend(frameon=False)
    pictures.mkdir(parents=True, exist_ok=True)
    figure.savefig(pictures / "forgetting_eval.png", dpi=120)
    print(f"saved {pictures}/forgetting_eval.png")


if __name__ == "__main__":
    tyro.cli(main)
