"""A network from scratch, as lesson 9 of 2019 makes it: trained by hand, by the loop, and by the
loop many times.
"""

from statistics import fmean, stdev
from typing import Any

import torch
import tyro
from digits import digits
from lesson9_parts import cross_entropy, four_versions, kaiming_uniform, stats
from torch import nn

from functional_sgd import sgd
from loop import DataLoaders, Learner, accuracy, fit


def train_by_hand(model: Any, data: Any, lr: float) -> None:
    """An epoch in which every parameter goes against its gradient, which is then 0 again."""
    for x, y in data:
        device = next(model.parameters()).device
        torch.autograd.backward(cross_entropy(model(x.to(device)), y.to(device)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= lr * parameter.grad
                parameter.grad.zero_()


def layers(seed: int) -> list[nn.Module]:
    """64 pixels, 50 hidden units, 10 scores; weights by kaiming_uniform, biases 0."""
    torch.manual_seed(seed)
    linears = nn.Linear(64, 50), nn.Linear(50, 10)
    for linear in linears:
        linear.weight.data = kaiming_uniform(linear.weight)
        linear.bias.data.zero_()
    return [nn.Flatten(), linears[0], nn.ReLU(), linears[1]]


def main(
    seeds: int = 5, epochs: int = 5, lr: float = 0.2, seed: int = 0, device: str = "cpu"
) -> None:
    """Train by hand and with the loop, and say how much the accuracy varies from run to run.

    Args:
        seeds: How many runs, each from weights of its own.
        epochs: Passes over the training images in each of them.
        lr: The learning rate.
        seed: The first of their seeds.
        device: Where to train.
    """
    torch.manual_seed(seed)
    data, images, _ = digits()
    for name, weight in (
        ("torch's own", nn.Conv2d(1, 32, 5).weight.detach()),
        ("kaiming", kaiming_uniform(torch.empty(32, 1, 5, 5))),
    ):
        print(
            f"outputs of a convolution, {name}: mean %.2f, deviation %.2f"
            % stats(nn.functional.conv2d(images, weight))
        )

    for model in four_versions(*layers(seed)):
        print(f"{type(model).__name__}: {len(list(model.parameters()))} parameters")

    ordered = DataLoaders(list(data.valid or ()))
    by_hand, ours = (nn.Sequential(*layers(seed)).to(device) for _ in range(2))
    train_by_hand(by_hand, ordered.train, lr)
    learner = Learner(ours, ordered, cross_entropy, sgd(lr=lr))
    end = fit(learner, learner.init(), 1)
    same = all(
        torch.equal(end.params[name], parameter) for name, parameter in by_hand.named_parameters()
    )
    print(f"by hand and by the loop, the same weights: {same}")

    found = []
    for one in range(seed, seed + seeds):
        learner = Learner(nn.Sequential(*layers(one)), data, cross_entropy, sgd(lr=lr), [accuracy])
        found.append(fit(learner, learner.init(one, device), epochs).history.column("accuracy")[-1])
        assert found[-1] > 0.7
    spread = stdev(found) if seeds > 1 else 0.0
    print(
        f"accuracy of {seeds} runs: {fmean(found):.3f} +- {spread:.3f}, {min(found):.3f} to "
        f"{max(found):.3f}"
    )


if __name__ == "__main__":
    tyro.cli(main)
