"""What a notebook gets of a figure."""

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DENSITY = 2  # pixels of a picture for each pixel of its size, so that dense screens show it sharp


def png(figure: "Figure") -> tuple[bytes, dict[str, int]]:
    """A picture for a notebook: what `_repr_png_` returns, the file and the width to show it in.

    >>> from loop.plots.figure import new_figure
    >>> png(new_figure(4, 3))[1]
    {'width': 400}
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DENSITY * figure.dpi)
    # Without the height: where the page is narrower, a picture would be squeezed, not scaled.
    return buffer.getvalue(), {"width": round(float(figure.get_figwidth()) * figure.dpi)}
