"""Imagenette in memory: ten classes of photos, read from archives or folders as they are."""

import tarfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from loop import Batches, Callback, DataLoaders, State

ENDINGS = (".jpeg", ".jpg", ".png", ".webp")
ARCHIVES = (".tgz", ".tar.gz", ".tar")
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WHERE = "https://github.com/fastai/imagenette"


def loaders(root: Path, size: int, batch_size: int = 64, every: int = 1) -> DataLoaders:
    """Batches of uint8 images (N, 3, size, size) and labels; `every` 4 takes a quarter of each
    class.

    `root` has imagenette2*.tgz, or the folders train and val with a folder for each class, or a
    folder imagenette2* that has these.

    Raises FileNotFoundError if neither is there.
    """
    parts = {split: read(root, split, size, every) for split in ("train", "val")}
    if not all(len(labels) for _, labels in parts.values()):
        raise FileNotFoundError(
            f"imagenette: expected imagenette2-160.tgz, or folders train and val, in {root}, found "
            f"neither. Get it from {WHERE} and pass --root."
        )
    return DataLoaders(
        Batches(parts["train"], batch_size, shuffle=True, drop_last=True),
        Batches(parts["val"], 2 * batch_size),
    )


def read(root: Path, split: str, size: int, every: int) -> tuple[Tensor, Tensor]:
    """The images (N, 3, size, size) of a split, uint8, and their labels: classes by their names."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    seen: dict[str, int] = defaultdict(int)
    for label, content in files(root, split):
        seen[label] += 1
        if seen[label] % every == 0:
            found[label].append(decoded(content, size))
    labels = [index for index, name in enumerate(sorted(found)) for _ in found[name]]
    images = [image for name in sorted(found) for image in found[name]]
    if not images:
        return torch.empty(0, 3, size, size, dtype=torch.uint8), torch.empty(0, dtype=torch.long)
    return torch.stack(images), torch.tensor(labels)


def files(root: Path, split: str) -> Iterator[tuple[str, bytes]]:
    """(class, content) of every image of a split, in the order of their names."""
    for place in (root, *sorted(root.glob("imagenette2*"))):
        if place.is_dir():
            for path in sorted(place.glob(f"{split}/*/*")):
                if path.suffix.lower() in ENDINGS:
                    yield path.parent.name, path.read_bytes()
            for path in sorted(place.iterdir()):
                if path.name.endswith(ARCHIVES):
                    yield from files_in(path, split)


def files_in(archive: Path, split: str) -> Iterator[tuple[str, bytes]]:
    """The same of an archive, without unpacking it."""
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if parts[-3:-2] == (split,) and member.name.lower().endswith(ENDINGS):
                file = tar.extractfile(member)
                if file is not None:
                    yield parts[-2], file.read()


def decoded(content: bytes, size: int) -> Tensor:
    """The middle square of an image, (3, size, size), uint8."""
    image = Image.open(BytesIO(content)).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    resized = image.resize((size, size), Image.Resampling.BILINEAR, box)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Transform(Callback):
    """Make batches of bytes floats; in training, zoom in by up to a seventh and mirror every
    second image.
    """

    def before_batch(self, state: State) -> State:
        """The chance of this batch is a function of the state, like all others."""
        x = state.x.float() / 255
        mean, deviation = (x.new_tensor(v).view(3, 1, 1) for v in (MEAN, DEVIATION))
        x = (x - mean) / deviation
        return state.replace(xb=(zoomed(x) if state.training else x,))


def zoomed(x: Tensor) -> Tensor:
    """A random window of each image, at least 0.75 of its area, mirrored or not."""
    scale = 1 - (1 - 0.75**0.5) * torch.rand(len(x))
    mirror = torch.randint(2, (len(x),)) * 2 - 1
    across, down = ((2 * torch.rand(len(x)) - 1) * (1 - scale) for _ in range(2))
    zero = torch.zeros(len(x))
    matrix = torch.stack([scale * mirror, zero, across, zero, scale, down], -1).view(-1, 2, 3)
    grid = nn.functional.affine_grid(matrix.to(x.device), list(x.shape), align_corners=False)
    return nn.functional.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
