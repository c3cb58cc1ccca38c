"""A new figure; the one place that imports matplotlib, which takes a second, when it is needed."""

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DENSITY = 2  # pixels of a picture for each pixel of its size, so that dense screens show it sharp


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, of this size in inches, which a notebook shows as a picture.

    >>> new_figure(4, 3).get_size_inches().tolist()
    [4.0, 3.0]
    """
    from loop.plots.notebook_figure import NotebookFigure

    return NotebookFigure(figsize=(width, height), layout="constrained")


def png(figure: "Figure") -> tuple[bytes, dict[str, Any]]:
    """A picture for a notebook: what `_repr_png_` returns, the file and the width to show it in.

    >>> png(new_figure(4, 3))[1]
    {'width': 400}
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DENSITY * figure.dpi)
    # Without the height: where the page is narrower, a picture would be squeezed, not scaled.
    return buffer.getvalue(), {"width": round(float(figure.get_figwidth()) * figure.dpi)}


def file_kinds() -> list[str]:
    """The endings of the files that a figure can be saved as."""
    return [*new_figure(1, 1).canvas.get_supported_filetypes()]


def dark_to_light(count: int) -> list[Any]:
    """So many colours, from dark to light."""
    from matplotlib import colormaps

    last = max(count - 1, 1)
    return [colormaps["viridis"](0.9 * index / last) for index in range(count)]
