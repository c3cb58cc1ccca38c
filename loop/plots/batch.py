"""A picture of a batch: what the model is going to see."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from loop.data.batches import one_batch
from loop.plots.figure import new_figure
from loop.plots.runs import draw_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    size = min([count, *(len(part) for part in (*inputs.values(), *targets.values()))])
    if not inputs or not size:
        raise ValueError("plot_batch: the batch has no samples. Check the data set, or collate.")
    named = {name: [_text(one) for one in part[:size]] for name, part in inputs.items()}
    named |= {name: [_text(one, classes) for one in part[:size]] for name, part in targets.items()}
    name = next((name for name, part in inputs.items() if _is_images(part)), None)
    if name is None:
        return _table(named)
    del named[name]
    shown = {"": named.popitem()[1]} if len(named) == 1 else named
    labels = [
        [f"{key} {texts[row]}".strip() for key, texts in shown.items()] for row in range(size)
    ]
    return _grid(inputs[name][:size], ["\n".join(lines) for lines in labels])


def _parts(source: Any, batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
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
        if not isinstance(part, (Tensor, list, tuple)) or (
            isinstance(part, Tensor) and not part.dim()
        ):
            raise TypeError(
                f"plot_batch: expected a batch of tensors or lists with an entry for each sample, "
                f"but its {name!r} is a {type(part).__name__}. Pass [batch], with a batch that is "
                f"a tuple or a dict of these."
            )
    return inputs, targets


def _numbered(name: str, parts: Sequence[Any]) -> dict[str, Any]:
    if len(parts) == 1:
        return {name: parts[0]}
    return {f"{name}{number}": part for number, part in enumerate(parts)}


def _is_images(part: Any) -> bool:
    return isinstance(part, Tensor) and part.dim() == 4 and part.shape[1] in (1, 3)


def _text(value: Any, classes: Sequence[str] | None = None) -> str:
    """A sample's part in a few words: names, numbers, or a shape."""
    if not isinstance(value, Tensor):
        text = value if isinstance(value, str) else repr(value)
        return text if len(text) <= _MOST_LETTERS else f"{text[: _MOST_LETTERS - 3]}..."
    if value.dim() > 1:
        return f"{str(value.dtype).removeprefix('torch.')} {' x '.join(map(str, value.shape))}"
    if classes is not None and not value.dim() and _is_whole(value):
        number = int(value)  # what is no class, as -100 for "ignore", is shown as it is
        return str(classes[number]) if 0 <= number < len(classes) else str(number)
    if classes is not None and value.shape == (len(classes),) and _is_binary(value):
        return ", ".join(str(name) for name, on in zip(classes, value, strict=True) if on) or "-"
    numbers = value.reshape(-1).tolist()
    text = " ".join(f"{number:.4g}" for number in numbers[:_MOST_NUMBERS])
    return text if len(numbers) <= _MOST_NUMBERS else f"{text} ... ({len(numbers)})"


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
    widths = [max(map(len, (name, *texts))) + 4 for name, texts in named.items()]
    figure = new_figure(max(_WIDTH * sum(widths), 2.0), 0.28 * (len(rows) + 1) + 0.1)
    axes: Any = figure.subplots()
    axes.axis("off")
    table = axes.table(
        cellText=rows,
        colLabels=list(named),
        colWidths=[width / sum(widths) for width in widths],
        bbox=(0, 0, 1, 1),
        edges="horizontal",
    )
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    for cell in table.get_celld().values():
        cell.set_edgecolor("0.85")
    return figure
