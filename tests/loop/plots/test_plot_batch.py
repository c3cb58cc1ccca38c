"""A batch as a picture: which samples, under which names; and data that are no images."""

import types
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from loop import DataLoaders, plot_batch
from tests.loop.helpers import learner

IMAGES = torch.arange(5.0).reshape(5, 1, 1, 1) + torch.arange(9.0).reshape(1, 1, 3, 3) / 10
LABELS = torch.tensor([1, 0, 2, -100, 1])
NAMES = ["cat", "dog", "horse"]


def titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


def cells(figure: Figure) -> list[list[str]]:
    """The rows of the table, its titles first."""
    (axes,) = figure.axes
    assert [type(child).__name__ for child in axes.tables] == ["Table"]
    found = axes.tables[0].get_celld()
    rows, columns = (max(place[axis] for place in found) + 1 for axis in (0, 1))
    return [
        [found[row, column].get_text().get_text() for column in range(columns)]
        for row in range(rows)
    ]


# Images.


def test_images_have_their_targets_above_them() -> None:
    assert titles(plot_batch([(IMAGES, LABELS)])) == ["1", "0", "2", "-100", "1"]


def test_targets_have_names_and_what_is_no_class_has_none() -> None:
    assert titles(plot_batch([(IMAGES, LABELS)], NAMES)) == ["dog", "cat", "horse", "-100", "dog"]


def test_every_picture_is_of_its_sample() -> None:
    images = torch.eye(4).reshape(4, 1, 2, 2)
    figure = plot_batch([(images, LABELS[:4])])
    shown = [torch.as_tensor(axes.images[0].get_array()) for axes in figure.axes]
    assert torch.equal(torch.stack(shown), images[:, 0])


def test_as_many_as_are_asked_for() -> None:
    assert len(titles(plot_batch([(IMAGES, LABELS)], count=2))) == 2
    assert len(titles(plot_batch([(IMAGES, LABELS)], count=100))) == 5


def test_coloured_images_in_half_precision() -> None:
    figure = plot_batch([(torch.rand(2, 3, 4, 4).half(), LABELS[:2])])
    assert [axes.images[0].get_array().shape for axes in figure.axes] == [(4, 4, 3)] * 2  # type: ignore[union-attr]


def test_several_labels_of_one_image() -> None:
    targets = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    assert titles(plot_batch([(IMAGES[:2], targets)], NAMES)) == ["cat, horse", "-"]


def test_shares_of_labels_are_numbers() -> None:
    targets = torch.tensor([[0.25, 0.75, 0.0]])
    assert titles(plot_batch([(IMAGES[:1], targets)], NAMES)) == ["0.25 0.75 0"]


def test_several_targets_and_targets_that_are_images() -> None:
    batch = (IMAGES[:1], torch.tensor([0.5]), torch.zeros(1, 3, 3, dtype=torch.int64))
    assert titles(plot_batch([batch])) == ["y0 0.5\ny1 int64 3 x 3"]


def test_images_of_a_dict_are_found() -> None:
    batch = {"path": ["a.png", "b.png"], "pixel_values": IMAGES[:2], "labels": LABELS[:2]}
    assert titles(plot_batch([batch], NAMES)) == [
        "path a.png\nlabels dog",
        "path b.png\nlabels cat",
    ]


def test_images_without_targets() -> None:
    assert titles(plot_batch([(IMAGES[:2],)])) == titles(plot_batch([IMAGES[:2]])) == ["", ""]


# Where they come from.


def test_of_a_learner_it_is_a_training_batch() -> None:
    data = DataLoaders([(IMAGES, LABELS)], [(IMAGES, LABELS + 10)])
    for source in (learner(data=data), data):
        assert titles(plot_batch(source)) == ["1", "0", "2", "-100", "1"]


def test_a_learner_says_what_is_a_target() -> None:
    mine = learner(data=DataLoaders([(torch.zeros(1), LABELS[:1], LABELS[:1])]), n_inputs=2)
    assert cells(plot_batch(mine, NAMES)) == [["x0", "x1", "y"], ["0", "1", "dog"]]
    batch = {"ids": torch.zeros(1), "labels": LABELS[:1], "goal": LABELS[:1]}
    mine = learner(data=DataLoaders([batch]), targets="goal")
    assert cells(plot_batch(mine, NAMES)) == [["ids", "labels", "goal"], ["0", "1", "dog"]]


def test_no_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match="the loader is empty"):
        plot_batch([])


@pytest.mark.parametrize("batch", [(), {}, (IMAGES[:0], LABELS[:0])])
def test_no_sample_is_an_error(batch: Any) -> None:
    with pytest.raises(ValueError, match="plot_batch: the batch has no samples"):
        plot_batch([batch])


@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_no_number_of_samples(count: Any) -> None:
    with pytest.raises(ValueError, match="plot_batch: count must be a whole number, 1 or more"):
        plot_batch([(IMAGES, LABELS)], count=count)


@pytest.mark.parametrize("part", [torch.tensor(1.0), types.SimpleNamespace(), {"a": LABELS}])
def test_a_batch_of_something_else_is_an_error(part: Any) -> None:
    with pytest.raises(TypeError, match=rf"plot_batch: .*its 'y' is a {type(part).__name__}"):
        plot_batch([(IMAGES, part)])


# Other data.


def test_other_data_are_a_table() -> None:
    batch = (torch.arange(16.0).reshape(2, 8) / 3, torch.tensor([[0.5], [2.0]]), ["a", "b" * 99])
    assert cells(plot_batch([batch])) == [
        ["x", "y0", "y1"],
        ["0 0.3333 0.6667 1 1.333 1.667 ... (8)", "0.5", "a"],
        ["2.667 3 3.333 3.667 4 4.333 ... (8)", "2", "b" * 45 + "..."],
    ]


def test_more_channels_than_a_picture_has_are_a_table() -> None:
    assert cells(plot_batch([torch.zeros(1, 5, 4, 4)])) == [["x"], ["float32 5 x 4 x 4"]]
