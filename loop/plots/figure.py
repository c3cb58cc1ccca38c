"""A new figure; the one place that imports matplotlib, which takes a second, when it is needed."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, of this size in inches, which a notebook shows as a picture.

    >>> new_figure(4, 3).get_size_inches().tolist()
    [4.0, 3.0]
    """
    from loop.plots.notebook_figure import NotebookFigure

    # Not pyplot, which keeps every figure alive until it is closed.
    return NotebookFigure(figsize=(width, height), layout="constrained")


def file_kinds() -> list[str]:
    """The endings of the files that a figure can be saved as."""
    return [*new_figure(1, 1).canvas.get_supported_filetypes()]


def dark_to_light(count: int) -> list[tuple[float, float, float, float]]:
    """So many colours (red, green, blue, alpha), from dark to light."""
    from matplotlib import colormaps

    last = max(count - 1, 1)
    return [colormaps["viridis"](0.9 * index / last) for index in range(count)]
