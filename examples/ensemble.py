"""Train many networks as one: an ensemble under torch.func.vmap, with an lr for every member.

A step is a function, so a step of all members is the same function, mapped: params, optimizer
state and lr have one more axis. Each member gets the numbers that it would get alone (see
tests/test_examples_functional.py). So one run is a search for the lr, and an ensemble.
"""

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import optree
import torch
import tyro
from digits import digits
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from functional_sgd import Optimizer, adam, apply, split, value_and_grad

NETWORK = nn.Sequential(nn.Flatten(), nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10))
OPT = adam()


def predicted(params: Any, x: Tensor) -> Tensor:
    """The scores of one member."""
    pred, _ = apply(NETWORK, params, {}, x)
    scores: Tensor = pred
    return scores


def loss(params: Any, x: Tensor, y: Tensor) -> Tensor:
    """The loss of one member."""
    return cross_entropy(predicted(params, x), y)


def step(opt: Optimizer, params: Any, state: Any, lr: Tensor, x: Tensor, y: Tensor) -> Any:
    """One step of one member: (params, state, loss)."""
    value, grads = value_and_grad(loss)(params, x, y)
    params, state = opt(params, grads, state, dict(lr=lr))
    return params, state, value


def first_weights(seed: int, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """The params of one member."""
    torch.manual_seed(seed)
    for layer in NETWORK:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    return {name: value.to(device, dtype) for name, value in split(NETWORK)[0].items()}


def stacked(trees: list[Any]) -> Any:
    """Trees of tensors as one, with an axis for the members in front."""
    return optree.tree_map(lambda *leaves: torch.stack(leaves), *trees)


def main(
    members: int = 32,
    epochs: int = 8,
    lowest: float = 1e-4,
    highest: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
    pictures: Path = Path("pictures"),
) -> None:
    """Train all members at once, print the best and the ensemble, save a picture.

    Args:
        members: How many networks.
        epochs: Passes over the digits.
        lowest: The lr of the first member.
        highest: The lr of the last one; between them, equal factors.
        seed: Decides first weights and orders.
        device: Where to train.
        pictures: The folder for the picture.
    """
    torch.set_num_threads(1)  # faster for so small a network
    data, images, labels = digits()
    images, labels = images.to(device), labels.to(device)
    params = stacked([first_weights(seed + number, device) for number in range(members)])
    state = torch.func.vmap(OPT.init)(params)
    lrs = torch.logspace(math.log10(lowest), math.log10(highest), members, device=device)
    all_at_once = torch.func.vmap(partial(step, OPT), in_dims=(0, 0, 0, None, None))

    started, steps = time.perf_counter(), 0
    torch.manual_seed(seed)
    for _ in range(epochs):
        for x, y in data.train:
            params, state, _ = all_at_once(params, state, lrs, x.to(device), y.to(device))
            steps += 1
    seconds = (time.perf_counter() - started) / steps
    print(
        f"{members} members: {1e3 * seconds:.1f} ms a step, {1e6 * seconds / members:.0f} us each"
    )

    scores = torch.func.vmap(predicted, in_dims=(0, None))(params, images)
    right = (scores.argmax(-1) == labels).float().mean(1).cpu()
    best = int(right.argmax())
    print(f"the best member: lr {lrs[best].item():.2g}, accuracy {right[best].item():.3f}")
    good = right.argsort(descending=True)[: max(members // 4, 1)]
    together = scores[good.to(device)].softmax(-1).mean(0).argmax(-1)
    share = (together == labels).float().mean().item()
    print(f"the best quarter together: accuracy {share:.3f}")

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(lrs.cpu(), right, "o")
    axes.set(xlabel="lr of the member", xscale="log", ylabel="accuracy")
    pictures.mkdir(parents=True, exist_ok=True)
    figure.savefig(pictures / "ensemble.png", dpi=120)
    print(f"saved {pictures}/ensemble.png")


if __name__ == "__main__":
    tyro.cli(main)
