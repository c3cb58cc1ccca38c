"""Pictures of what ActivationStats has measured."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from loop import fit
from loop.callbacks.activations import ActivationStats, activation_stats
from loop.plots.layers import plot_activation_histograms, plot_activations, plot_near_zero
from tests.loop.helpers import learner, net

MINE = learner(net())
RUN = fit(
    MINE,
    MINE.init(),
    2,
    [ActivationStats(["0", "2", "4", "1"], every=2, hist=True, bins=8, range=(-1.0, 3.0))],
)
FOUND = activation_stats(RUN)
LABELS = ["0 Linear", "1 BatchNorm1d", "2 ReLU", "4 Linear"]


@pytest.fixture(autouse=True)
def _no_global_figures() -> Any:
    yield
    assert plt.get_fignums() == []


def curves(axes: Any) -> dict[str, np.ndarray]:
    return {line.get_label(): np.asarray(line.get_ydata()) for line in axes.lines}


def test_mean_and_deviation_of_every_layer() -> None:
    left, right = plot_activations(RUN).axes
    for axes, values in ((left, FOUND.mean), (right, FOUND.std)):
        assert list(curves(axes)) == LABELS
        np.testing.assert_array_equal(np.stack(list(curves(axes).values()), axis=1), values.numpy())
        assert np.asarray(axes.lines[0].get_xdata()).tolist() == [0, 2, 4]
        assert axes.get_xlabel() == "batch"
    assert (left.get_ylabel(), right.get_ylabel()) == (
        "mean of the outputs",
        "standard deviation of the outputs",
    )


def test_the_legend_names_the_layers() -> None:
    (legend,) = plot_activations(RUN).legends
    assert [text.get_text() for text in legend.get_texts()] == LABELS


def test_each_layer_has_its_color() -> None:
    colors = [tuple(line.get_color()) for line in plot_activations(RUN).axes[0].lines]
    assert len(set(colors)) == 4


def test_the_share_near_zero() -> None:
    (axes,) = plot_near_zero(RUN).axes
    np.testing.assert_array_equal(curves(axes)["2 ReLU"], FOUND.near_zero[:, 2].numpy())
    assert axes.get_ylim() == (0, 1)


def test_histograms_are_columns_of_pixels_with_small_outputs_below() -> None:
    axes = plot_activation_histograms(RUN).axes
    pictures = [each.images[0] for each in axes if each.images]
    assert [each.get_title() for each in axes if each.images] == LABELS
    for index, picture in enumerate(pictures):
        assert FOUND.histograms is not None
        assert np.asarray(picture.get_array()).shape == (8, 3)
        np.testing.assert_allclose(
            np.asarray(picture.get_array()), FOUND.histograms[:, index].log1p().numpy().T
        )
        assert picture.origin == "lower"
        assert picture.get_extent() == [-1, 5, -1.0, 3.0]


def test_histograms_are_in_a_grid() -> None:
    figure = plot_activation_histograms(RUN, columns=2)
    assert figure.axes[0].get_gridspec().get_geometry() == (2, 2)
    assert [axes.get_ylabel() for axes in figure.axes] == ["output", "", "output", ""]
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "", "batch", "batch"]


def test_a_grid_of_one() -> None:
    state = fit(MINE, MINE.init(), 1, [ActivationStats("2", hist=True)])
    assert [axes.get_title() for axes in plot_activation_histograms(state).axes] == ["2 ReLU"]


def test_many_layers_have_no_legend() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(17)))
    mine = learner(model)
    assert plot_activations(fit(mine, mine.init(), 1, [ActivationStats()])).legends == []


def test_histograms_that_were_not_asked_for() -> None:
    with pytest.raises(ValueError, match=r"no histograms. Use ActivationStats\(hist=True\)"):
        plot_activation_histograms(fit(MINE, MINE.init(), 1, [ActivationStats()]))


@pytest.mark.parametrize("plot", [plot_activations, plot_near_zero, plot_activation_histograms])
def test_nothing_measured_is_an_error(plot: Any) -> None:
    with pytest.raises(ValueError, match="no measurements called 'activation_stats'"):
        plot(MINE.init())
