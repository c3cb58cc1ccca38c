"""A picture of a batch: what the model is going to see."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import numpy as np
from torch import Tensor

from loop.data.batches import one_batch
from loop.plots.figure import new_figure
from loop.plots.runs import draw_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Part: TypeAlias = Tensor | Sequence[object]
"""One of the inputs or targets of a batch: something for each sample."""

_MOST_NUMBERS = 6  # of a sample that a cell shows
_MOST_LETTERS = 48  # of a cell
_WIDTH = 0.085  # inches that a letter of the table takes


def plot_batch(source: Any, classes: Sequence[str] | None = None, count: int = 9) -> "Figure":
    """The first samples of a batch of the training data: images with their targets above them;
    other data as a table, a row for each sample.

    `source` is a Learner, DataLoaders or a loader; `[batch]` shows a batch that you have. A part of
    the batch that is (N, 1 or 3, H, W) is images. `classes` are the names of targets that are whole
    numbers, or of the columns of targets that are 0 or 1. A loader that shuffles gives other
    samples every time. At most `count` samples are shown.

    Raises ValueError if there is no batch, or no sample in it, or count is below 1, and TypeError
    for a batch that is not made of tensors and lists.

    >>> images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 1, 0])
    >>> figure = plot_batch([(images, labels)], classes=["cat", "dog"])
    >>> [axes.get_title() for axes in figure.axes]
    ['cat', 'dog', 'dog', 'cat']
    """
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"plot_batch: count must be a whole number, 1 or more, got {count!r}.")
    inputs, targets = _parts(source, one_batch(source))
    parts = [*inputs.values(), *targets.values()]
    size = min([count, *map(len, parts)])
    if not inputs or not size:
        raise ValueError("plot_batch: the batch has no samples. Check the data set, or collate.")
    named: dict[str, list[str]] = {}
    for name, part in inputs.items():
        named[name] = [_text(one) for one in part[:size]]
    for name, part in targets.items():
        named[name] = [_text(one, classes) for one in part[:size]]
    for name, part in inputs.items():
        if _is_images(part):
            del named[name]
            return _grid(part[:size], _labels(named, size))
    return _table(named)


def _labels(named: Mapping[str, Sequence[str]], size: int) -> list[str]:
    """What stands above each image: what else belongs to the sample, by its name if it is more than
    one thing.
    """
    labels = []
    for row in range(size):
        lines = []
        for name, texts in named.items():
            line = texts[row] if len(named) == 1 else f"{name} {texts[row]}"
            lines.append(line.strip())
        labels.append("\n".join(lines))
    return labels


def _parts(source: object, batch: Any) -> tuple[dict[str, Part], dict[str, Part]]:
    """The inputs and the targets of a batch, by their names."""
    # Only a Learner says what is a target. For a loader, assume what a Learner does by default.
    if isinstance(batch, Mapping):
        names = getattr(source, "targets", ("labels",))
        targets = {name: batch[name] for name in names if name in batch}
        inputs = {name: part for name, part in batch.items() if name not in targets}
    else:
        parts = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
        cut = min(getattr(source, "n_inputs", 1), len(parts))
        inputs, targets = _numbered("x", parts[:cut]), _numbered("y", parts[cut:])
    for name, part in {**inputs, **targets}.items():
        has_entries = isinstance(part, (Tensor, list, tuple))
        is_scalar = isinstance(part, Tensor) and not part.dim()
        if not has_entries or is_scalar:
            raise TypeError(
                f"plot_batch: expected a batch of tensors or lists with an entry for each sample, "
                f"but its {name!r} is a {type(part).__name__}. Pass [batch], with a batch that is "
                f"a tuple or a dict of these."
            )
    return inputs, targets


def _numbered(name: str, parts: Sequence[Part]) -> dict[str, Part]:
    if len(parts) == 1:
        return {name: parts[0]}
    return {f"{name}{number}": part for number, part in enumerate(parts)}


def _is_images(part: Part) -> TypeGuard[Tensor]:
    return isinstance(part, Tensor) and part.dim() == 4 and part.shape[1] in (1, 3)


def _text(value: object, classes: Sequence[str] | None = None) -> str:
    """A sample's part in a few words: names, numbers, or a shape."""
    if isinstance(value, Tensor):
        names = None if classes is None else _class_names(value, classes)
        return _numbers_text(value) if names is None else names
    text = value if isinstance(value, str) else repr(value)
    if len(text) > _MOST_LETTERS:
        return f"{text[: _MOST_LETTERS - 3]}..."
    return text


def _class_names(target: Tensor, classes: Sequence[str]) -> str | None:
    """The classes that a target stands for; None if it is no target of classes."""
    if not target.dim() and _is_whole(target):
        number = int(target)
        if 0 <= number < len(classes):
            return str(classes[number])
        return str(number)  # what is no class, as -100 for "ignore"
    if target.shape == (len(classes),) and _is_binary(target):
        chosen = [str(name) for name, on in zip(classes, target, strict=True) if on]
        return ", ".join(chosen) or "-"
    return None


def _numbers_text(value: Tensor) -> str:
    if value.dim() > 1:
        dtype, sizes = str(value.dtype).removeprefix("torch."), map(str, value.shape)
        return f"{dtype} {' x '.join(sizes)}"
    numbers = value.reshape(-1).tolist()
    text = " ".join(f"{number:.4g}" for number in numbers[:_MOST_NUMBERS])
    if len(numbers) > _MOST_NUMBERS:
        text += f" ... ({len(numbers)})"
    return text


def _is_whole(value: Tensor) -> bool:
    return not value.is_floating_point() and not value.is_complex()


def _is_binary(value: Tensor) -> bool:
    return bool(((value == 0) | (value == 1)).all())


def _grid(images: Tensor, labels: Sequence[str]) -> "Figure":
    columns = math.ceil(math.sqrt(len(images)))
    rows = -(-len(images) // columns)
    lines = max(label.count("\n") for label in labels) + 1
    figure = new_figure(1.7 * columns, (1.7 + 0.17 * lines) * rows)
    places = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axes in places:
        axes.axis("off")
    for axes, image, label in zip(places, images, labels, strict=False):
        draw_image(axes, image)
        axes.set_title(label, fontsize=9)
    for axes in places[len(images) :]:
        axes.remove()
    return figure


def _table(named: Mapping[str, Sequence[str]]) -> "Figure":
    rows = list(zip(*named.values(), strict=True))
    widths = []  # in letters
    for name, texts in named.items():
        longest = max(map(len, (name, *texts)))
        widths.append(longest + 4)
    total = sum(widths)
    figure = new_figure(max(_WIDTH * total, 2.0), 0.28 * (len(rows) + 1) + 0.1)
    # Any: matplotlib's annotations take no tuple for bbox.
    axes: Any = figure.subplots()
    axes.axis("off")
    table = axes.table(
        cellText=rows,
        colLabels=list(named),
        colWidths=[width / total for width in widths],
        bbox=(0, 0, 1, 1),
        edges="horizontal",
    )
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    for cell in table.get_celld().values():
        cell.set_edgecolor("0.85")
    return figure
