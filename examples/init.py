"""Why the first weights matter: lesson 9's question about the sqrt(5) in torch's layers, answered
with numbers.

torch draws the weights of a layer as kaiming_uniform with a = sqrt(5), which is a gain of 0.58
where a ReLU needs 1.41. So each layer makes its input smaller by about 2.4, and the gradient on its
way back too: four layers leave 1 or 2 percent of it, and a deep network learns nothing. The
lesson's numbers are of MNIST digits, ours of scikit-learn's, enlarged: not equal, but alike.
"""

import math
from pathlib import Path
from typing import TypeVar

import torch
import tyro
from digits import digits
from lesson9_parts import gain, kaiming_uniform, stats
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, mse_loss

from functional_sgd import sgd
from loop import Learner, accuracy, fit

WAYS = ("torch's", "kaiming")
Model = TypeVar("Model", bound=nn.Module)


def prepared(model: Model, way: str) -> Model:
    """The model as torch made it, or with kaiming_uniform weights for ReLU, and biases of 0."""
    for layer in model.modules() if way == "kaiming" else ():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.weight.data = kaiming_uniform(layer.weight)
            if layer.bias is not None:
                layer.bias.data.zero_()
    return model


def four_convolutions() -> nn.Module:
    """The lesson's network: 28 x 28 pixels to one number."""
    sizes = ((1, 8, 5), (8, 16, 3), (16, 32, 3), (32, 1, 3))
    layers: list[nn.Module] = []
    for inputs, outputs, kernel in sizes:
        layers += [nn.Conv2d(inputs, outputs, kernel, 2, kernel // 2), nn.ReLU()]
    return nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())


def deep(layers: int, width: int = 100) -> nn.Sequential:
    """Layers of 100 units between 64 pixels and 10 scores."""
    body = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), *body, nn.Linear(width, 10))


@torch.no_grad()
def deviations(model: nn.Sequential, x: Tensor) -> list[float]:
    """How large the numbers are after every ReLU."""
    found = []
    for layer in model:
        x = layer(x)
        if isinstance(layer, nn.ReLU):
            found.append(x.square().mean().sqrt().item())
    return found


def main(
    layers: int = 20,
    epochs: int = 5,
    seed: int = 0,
    device: str = "cpu",
    pictures: Path = Path("pictures"),
) -> None:
    """Print what comes out of a layer and of four, train a deep network both ways, save a picture.

    Args:
        layers: How deep the network is that is trained.
        epochs: Passes over the digits.
        seed: Decides the weights and the order of the data.
        device: Where to compute.
        pictures: The folder for the picture.
    """
    torch.set_num_threads(1)  # faster for so small a network
    torch.manual_seed(seed)
    data, images, labels = digits()
    x = interpolate(images[:100], size=28, mode="bilinear")
    x, y = ((x - x.mean()) / x.std()).to(device), labels[:100, None].float().to(device)
    print("gains:", ", ".join(f"{gain(a):.4f} at {a:g}" for a in (1, 0, 0.01, 0.1, math.sqrt(5))))

    there = {"torch's": ("0.365", "0.0065", "0.033"), "kaiming": ("1.020", "0.404", "0.423")}
    columns = ("one layer", "lesson", "four layers", "lesson", "gradient", "lesson")
    table = Table("first weights", *columns, f"accuracy, {layers} layers")
    axes = (figure := Figure(figsize=(6, 4), layout="constrained")).subplots()
    for way in WAYS:
        torch.manual_seed(seed)
        conv = prepared(nn.Conv2d(1, 32, 5), way).to(device)
        model = prepared(four_convolutions(), way).to(device)
        net = prepared(deep(layers), way)
        axes.plot(deviations(net.to(device), images.to(device)), "o-", label=way)
        pred = model(x)
        torch.autograd.backward(mse_loss(pred, y))
        grad = next(model.parameters()).grad
        assert grad is not None
        learner = Learner(net, data, cross_entropy, sgd(lr=0.05), [accuracy])
        end = fit(learner, learner.init(seed, device), epochs)
        ours = (stats(conv(x).relu())[1], stats(pred)[1], grad.std().item())
        cells = (f"{number:.4f}" for number in ours)
        pairs = (cell for pair in zip(cells, there[way], strict=True) for cell in pair)
        table.add_row(way, *pairs, f"{end.history.column('accuracy')[-1]:.3f}")
    Console().print(table)
    axes.set(xlabel="layer", ylabel="root mean square of its outputs", yscale="log")
    axes.legend(frameon=False)
    pictures.mkdir(parents=True, exist_ok=True)
    figure.savefig(pictures / "init.png", dpi=120)
    print(f"saved {pictures}/init.png")


if __name__ == "__main__":
    tyro.cli(main)
