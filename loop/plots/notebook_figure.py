"""A figure that notebooks show. This imports matplotlib, so `new_figure` imports it late."""

from matplotlib.figure import Figure

from loop.plots.picture import png


class NotebookFigure(Figure):
    """matplotlib's Figure, which is a picture in every notebook.

    matplotlib's own is one only after `%matplotlib inline` or an import of pyplot.
    """

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        return png(self)
