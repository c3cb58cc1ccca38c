"""Train a convolutional network on handwritten digits, with a chain of five small pure functions as
its optimizer.
"""

import time
from pathlib import Path
from typing import Any

import torch
import tyro
from sklearn.datasets import load_digits
from torch import Tensor, nn

from functional_sgd import average_grad, average_sqr_grad, chain, debias, scale_by_rms, sgd_step
from loop import (
    Batches,
    DataLoaders,
    Learner,
    Progress,
    TerminateOnNaN,
    accuracy,
    fit_one_cycle,
    plot_losses,
    plot_predictions,
    plot_schedules,
    predict,
    validate,
)


def digits() -> tuple[DataLoaders, Tensor, Tensor]:
    """1,797 images of 8 x 8 pixels that come with scikit-learn: loaders, and the images and labels
    held out.
    """
    bunch: Any = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out, kept = order[:360], order[360:]
    train = Batches((images[kept], labels[kept]), batch_size=64, shuffle=True)
    valid = Batches((images[held_out], labels[held_out]), batch_size=128)
    return DataLoaders(train, valid), images[held_out], labels[held_out]


def network() -> nn.Module:
    """Three convolutions with BatchNorm, a pooling, a Dropout and a linear layer: 39,146
    parameters.
    """

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    body = [*block(1, 32, 1), *block(32, 48, 2), *block(48, 56, 2)]
    return nn.Sequential(
        *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(56, 10)
    )


def main(
    epochs: int = 15,
    lr: float = 1e-2,
    seed: int = 0,
    device: str = "cpu",
    pictures: Path = Path("pictures"),
) -> None:
    """Train, print a table, save three pictures, and say how well it went.

    Args:
        epochs: Passes over the training images.
        lr: The highest learning rate of the cycle.
        seed: Decides the first weights, the order of the data, and the dropout.
        device: Where to train.
        pictures: The folder for the pictures.
    """
    started = time.perf_counter()
    torch.manual_seed(seed)
    data, images, labels = digits()
    opt = chain(average_grad, average_sqr_grad, debias, scale_by_rms, sgd_step, sqr_mom=0.99, lr=lr)
    opt.describe()
    learner = Learner(
        network(),
        data,
        nn.CrossEntropyLoss(label_smoothing=0.05),
        opt,
        [accuracy],
        [Progress(), TerminateOnNaN()],
    )
    state = learner.init(seed, device)
    state = fit_one_cycle(learner, state, epochs, lr)

    pictures.mkdir(parents=True, exist_ok=True)
    pred = predict(learner, state).cpu()
    mistakes_first = (pred.argmax(dim=-1) == labels).int().argsort(stable=True)
    pred, images, labels = pred[mistakes_first], images[mistakes_first], labels[mistakes_first]
    for name, figure in (
        ("losses", plot_losses(state.history)),
        ("schedules", plot_schedules(state.history)),
        ("predictions", plot_predictions(images, labels, pred)),
    ):
        path = pictures / f"digits_{name}.png"
        figure.savefig(path, dpi=120)
        print(f"saved {path}")
    print(
        f"accuracy {validate(learner, state)['accuracy']:.3f} in "
        f"{time.perf_counter() - started:.0f} s"
    )


if __name__ == "__main__":
    tyro.cli(main)
