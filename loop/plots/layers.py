"""Pictures of what ActivationStats has measured: how the layers' outputs change while a model
learns.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from loop.layer_stats import NEAR_ZERO, LayerStats, activation_stats
from loop.plots.figure import dark_to_light, new_figure
from loop.plots.runs import clean
from loop.state import State

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LEGEND = 16  # more layers than these are told apart by colour alone


def plot_activations(state: State, name: str = "activation_stats") -> "Figure":
    """Mean and standard deviation of every layer's output, batch by batch; dark is the first layer,
    light the last.

    In a net that trains well the means stay near 0 and the deviations near 1, without sudden falls.
    Raises ValueError, as the other functions here, if nothing was measured.
    """
    found = activation_stats(state, name)
    figure = new_figure(11, 3.6)
    left, right = figure.subplots(1, 2)
    _curves(left, found, found.mean, "mean of the outputs")
    _curves(right, found, found.std, "standard deviation of the outputs")
    _legend(figure, left, found)
    return figure


def plot_near_zero(state: State, name: str = "activation_stats") -> "Figure":
    """The share of every layer's outputs that is at most 0.05, batch by batch: behind a ReLU, the
    dead ones.
    """
    found = activation_stats(state, name)
    figure = new_figure(7, 3.6)
    axes = figure.subplots()
    _curves(axes, found, found.near_zero, f"share of outputs up to {NEAR_ZERO}")
    axes.set_ylim(0, 1)
    _legend(figure, axes, found)
    return figure


def plot_activation_histograms(
    state: State, name: str = "activation_stats", columns: int = 3
) -> "Figure":
    """A picture for every layer: each column of pixels is a batch, each row a bin, bright where
    many outputs are.

    The brightness is log(1 + count), on a scale of its own for each layer. A good picture fills its
    frame smoothly; a bright lowest row means dead outputs, and waves that rise and collapse mean
    that training has broken down. Raises ValueError also if the histograms were not asked for.
    Source: fastai's "colourful dimension".
    """
    found = activation_stats(state, name)
    if found.histograms is None:
        raise ValueError(
            f"plot_activation_histograms: {name!r} has no histograms. Use "
            f"ActivationStats(hist=True)."
        )
    columns = min(columns, len(found.layers))
    rows = -(-len(found.layers) // columns)
    figure = new_figure(3.4 * columns, 2.4 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    first, last = found.train_iter[0], found.train_iter[-1]
    # Half of a column, which is centred on its batch.
    half = (last - first) / max(len(found.train_iter) - 1, 1) / 2 or 0.5
    extent = (first - half, last + half, *found.range)
    for index, axes in enumerate(grid.flat):
        if index >= len(found.layers):
            axes.axis("off")
            continue
        picture = found.histograms[:, index].T.log1p().numpy()
        axes.imshow(
            picture,
            origin="lower",
            aspect="auto",
            extent=extent,
            cmap="viridis",
            interpolation="nearest",
        )
        axes.set_title(_label(found, index), fontsize=10)
        # With sharex, matplotlib labels only the last row, which may be empty in this column.
        if index + columns >= len(found.layers):
            axes.set_xlabel("batch")
            axes.xaxis.set_tick_params(labelbottom=True)
        if index % columns == 0:
            axes.set_ylabel("output")
    return figure


def _curves(axes: "Axes", found: LayerStats, values: Tensor, what: str) -> None:
    """A line for each layer."""
    for index, color in enumerate(dark_to_light(len(found.layers))):
        axes.plot(
            found.train_iter,
            values[:, index].numpy(),
            color=color,
            linewidth=1.2,
            label=_label(found, index),
        )
    axes.set(xlabel="batch", ylabel=what)
    clean(axes)


def _legend(figure: "Figure", axes: "Axes", found: LayerStats) -> None:
    if len(found.layers) <= _LEGEND:
        figure.legend(
            *axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9
        )


def _label(found: LayerStats, index: int) -> str:
    return f"{found.layers[index]} {found.kinds[index]}".strip()
