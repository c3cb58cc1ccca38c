"""Fashion-MNIST in memory, from files that are there already, or downloaded by torchvision."""

import gzip
from pathlib import Path

import torch
from torch import Tensor

from loop import Batches, DataLoaders

CACHE = Path.home() / ".cache" / "functional_sgd"

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def loaders(root: Path, quick: bool = False, batch_size: int = 1024) -> DataLoaders:
    """The batches of the lesson: 1024 images to train on, twice as many to validate on, (x - 0.28)
    / 0.35 for x in [0, 1].

    If quick, only from the first 2048 training and 1024 test images.
    """
    x, y, x_valid, y_valid = fashion_mnist(root)
    if quick:
        x, y, x_valid, y_valid = x[:2048], y[:2048], x_valid[:1024], y_valid[:1024]
    x, x_valid = ((images[:, None] / 255 - 0.28) / 0.35 for images in (x, x_valid))
    return DataLoaders(
        Batches((x, y.long()), batch_size, shuffle=True),
        Batches((x_valid, y_valid.long()), 2 * batch_size),
    )


def fashion_mnist(root: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (60000, 28, 28) and labels, test images (10000, 28, 28) and labels, all
    uint8.

    The files, gzipped or not, may lie in `root` itself or in `root/FashionMNIST/raw`, torchvision's
    layout; then nothing is written. If one is missing, torchvision downloads all of them (30 MB)
    into its layout under `root`.
    """
    if not all(found(root, name) for name in FILES):
        download(root)
    files = [path for path in (found(root, name) for name in FILES) if path is not None]
    train_images, train_labels, test_images, test_labels = map(read_idx, files)
    return train_images, train_labels, test_images, test_labels


def found(root: Path, name: str) -> Path | None:
    """Where the file of this name is, if anywhere."""
    places = [
        folder / file
        for folder in (root, root / "FashionMNIST" / "raw")
        for file in (name, f"{name}.gz")
    ]
    return next((place for place in places if place.is_file()), None)


def download(root: Path) -> None:
    """Fetch the files; they are checked against their published MD5 sums."""
    from torchvision.datasets import (
        FashionMNIST,
    )  # takes seconds to import, and is not needed otherwise

    print(f"downloading Fashion-MNIST into {root}")
    try:
        FashionMNIST(str(root), download=True)
    except RuntimeError as error:
        error.add_note(
            f"Without a network, put {', '.join(f'{name}.gz' for name in FILES)} into a folder: "
            f"--root DIR"
        )
        raise


def read_idx(path: Path) -> Tensor:
    """The tensor in an idx file of bytes: two zeros, 8 for uint8, the number of axes, their
    lengths, the values.
    """
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        content = bytearray(file.read())
    if content[:3] != b"\0\0\x08":
        raise ValueError(
            f"read_idx: expected an idx file of bytes, got {path}, which starts "
            f"{bytes(content[:4])!r}."
        )
    lengths = [int.from_bytes(content[4 * i : 4 * i + 4], "big") for i in range(1, content[3] + 1)]
    return torch.frombuffer(content, dtype=torch.uint8, offset=4 + 4 * len(lengths)).reshape(
        lengths
    )
