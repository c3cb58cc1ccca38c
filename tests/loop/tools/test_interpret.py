"""The samples of an evaluation one by one, and the pictures of what a classifier gets wrong."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from functional_sgd import sgd
from loop import (
    CancelBatch,
    CancelValidate,
    DataLoaders,
    Learner,
    fit,
    plot_confusion_matrix,
    plot_top_losses,
    predict,
    sample_losses,
    validate,
)
from tests.comparing import assert_same
from tests.each import for_each
from tests.loop.helpers import Kept, X, Y, full, learner, loaders, on, raise_once

MINE = full()


@pytest.fixture(autouse=True)
def _no_global_figures() -> Any:
    yield
    assert plt.get_fignums() == []


def test_every_sample_with_prediction_and_loss() -> None:
    state = fit(MINE, MINE.init(), 1)
    found = sample_losses(MINE, state)
    assert_same((found.inputs, found.targets), (X, Y))
    assert_same(found.preds, predict(MINE, state))
    torch.testing.assert_close(found.losses, (found.preds - Y).square().mean(dim=1))


@for_each("evaluation", [validate, predict, sample_losses])
def test_mistakes_are_told_on_behalf_of_whom_was_called(evaluation: Any) -> None:
    with pytest.raises(TypeError, match=f"{evaluation.__name__}: the second argument must be a St"):
        evaluation(MINE, 3)
    bare = learner(data=loaders(valid=None))
    with pytest.raises(ValueError, match=f"{evaluation.__name__}: the learner has no validation"):
        evaluation(bare, bare.init())


@for_each("event", ["before_batch", "after_pred"])
@for_each("evaluation", [predict, sample_losses])
def test_a_batch_that_a_callback_cancels_is_an_error(evaluation: Any, event: str) -> None:
    """Without it, predictions would stand beside the targets of other samples."""
    mine = learner(callbacks=[on(**{event: raise_once(CancelBatch, at=1)})])
    message = f"{evaluation.__name__}: expected something of every batch, .* cancelled batch 1"
    with pytest.raises(ValueError, match=message):
        evaluation(mine, mine.init())


@for_each("evaluation", [predict, sample_losses])
def test_an_evaluation_that_a_callback_ends_is_an_error(evaluation: Any) -> None:
    mine = learner(callbacks=[on(after_batch=raise_once(CancelValidate))])
    with pytest.raises(ValueError, match=f"{evaluation.__name__}: .* ended .* after batch 0"):
        evaluation(mine, mine.init())


def test_a_batch_that_is_cancelled_after_its_prediction_has_one() -> None:
    mine = learner(callbacks=[on(after_loss=raise_once(CancelBatch, at=1))])
    assert_same(predict(mine, mine.init()), predict(learner(), mine.init()))


def test_their_mean_is_the_validation_loss() -> None:
    state = MINE.init()
    assert float(sample_losses(MINE, state).losses.mean()) == pytest.approx(
        validate(MINE, state)["valid_loss"], 1e-6
    )


def test_the_loss_of_a_sample_is_that_of_a_batch_of_one() -> None:
    mine = learner(loss=lambda pred, y: (pred - y).abs().sum(dim=1).mean())
    found = sample_losses(mine, mine.init())
    expected = [
        mine.loss(found.preds[n : n + 1], found.targets[n : n + 1])
        for n in range(len(found.losses))
    ]
    torch.testing.assert_close(found.losses, torch.stack(expected))


def test_other_data() -> None:
    found = sample_losses(MINE, MINE.init(), [(X[:3], Y[:3]), (X[3:4], Y[3:4])])
    assert_same(found.inputs, X[:4])
    assert len(found.losses) == 4


class Sum(nn.Module):
    """Two inputs, two outputs."""

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        return {"sum": a + b, "a": a}


def test_several_inputs_targets_and_outputs() -> None:
    a = torch.arange(4.0)
    data = [(a[:3], a[:3], a[:3], 0 * a[:3]), (a[3:], a[3:], a[3:], 0 * a[3:])]

    def loss(pred: dict[str, Tensor], one: Tensor, two: Tensor) -> Tensor:
        return ((pred["sum"] - one).square() + two).mean()

    mine = Learner(Sum(), DataLoaders(data, data), loss, sgd(), n_inputs=2)
    found = sample_losses(mine, mine.init())
    assert_same(found.inputs, (a, a))
    assert_same(found.targets, (a, 0 * a))
    assert_same(found.preds, {"sum": 2 * a, "a": a})
    assert_same(found.losses, a.square())


def test_the_loss_that_a_callback_lends_counts() -> None:
    def other(state: Any) -> Any:
        return state.replace(learner=learner(loss=lambda pred, y: 2 * mse_loss(pred, y)))

    mine = learner(callbacks=[on(before_validate=other)])
    plain = sample_losses(learner(), learner().init())
    torch.testing.assert_close(sample_losses(mine, mine.init()).losses, 2 * plain.losses)


def test_data_without_targets() -> None:
    with pytest.raises(ValueError, match="no targets"):
        sample_losses(MINE, MINE.init(), [(X,)])


def test_no_data() -> None:
    mine = learner(data=loaders(valid=None))
    with pytest.raises(ValueError, match="no validation data"):
        sample_losses(mine, mine.init())


def test_nothing_is_changed() -> None:
    state, before = (
        MINE.init().remember("collect_samples", ("of another time",)),
        torch.get_rng_state(),
    )
    kept = Kept(state)
    first = sample_losses(MINE, state)
    assert_same(tuple(sample_losses(MINE, state)), tuple(first))
    kept.check()
    assert torch.equal(torch.get_rng_state(), before)


TARGETS = torch.tensor([0, 0, 0, 1, 1])
PRED = torch.eye(3)[[0, 0, 1, 1, 2]]


def texts(figure: Figure) -> dict[tuple[int, int], str]:
    """(row, column) -> what is written there."""
    found = {}
    for text in figure.axes[0].texts:
        column, row = text.get_position()
        found[int(row), int(column)] = text.get_text()
    return found


def test_the_confusion_matrix_has_counts() -> None:
    """Rows are what is; columns what was taken for it; fields with nothing are empty."""
    figure = plot_confusion_matrix(TARGETS, PRED)
    assert texts(figure) == {(0, 0): "2", (0, 1): "1", (1, 1): "1", (1, 2): "1"}
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "actual")


def test_the_confusion_matrix_has_shares() -> None:
    """A class without samples has no share, and is no division by zero."""
    figure = plot_confusion_matrix(TARGETS, PRED, normalize=True)
    assert texts(figure) == {(0, 0): "0.67", (0, 1): "0.33", (1, 1): "0.50", (1, 2): "0.50"}
    shown = np.asarray(figure.axes[0].images[0].get_array())
    assert shown == pytest.approx(np.array([[2 / 3, 1 / 3, 0], [0, 0.5, 0.5], [0, 0, 0]]))


def test_the_confusion_matrix_has_names() -> None:
    (axes,) = plot_confusion_matrix(TARGETS, PRED, classes=["cat", "dog", "fish"]).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["cat", "dog", "fish"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog", "fish"]


def test_the_confusion_matrix_of_many_classes_has_colours_only() -> None:
    many = torch.arange(40)
    assert texts(plot_confusion_matrix(many, torch.eye(40))) == {}


IMAGES = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
LOSSES = torch.tensor([0.1, 0.2, 3.0, 0.05, 2.0])


def titles(**rest: Any) -> list[tuple[str, str]]:
    figure = plot_top_losses(IMAGES, TARGETS, PRED, rest.pop("losses", LOSSES), **rest)
    return [(axes.get_title(), axes.title.get_color()) for axes in figure.axes if axes.images]


def test_the_worst_comes_first() -> None:
    assert titles(k=3) == [
        ("1, not 0\nloss 3.00", "crimson"),
        ("2, not 1\nloss 2.00", "crimson"),
        ("0\nloss 0.20", "black"),
    ]


def test_the_worst_with_names() -> None:
    assert titles(k=1, classes=["cat", "dog", "fish"]) == [("dog, not cat\nloss 3.00", "crimson")]


def test_fewer_than_are_asked_for() -> None:
    assert len(titles(k=9)) == 5
    assert titles(k=0) == []


def test_a_loss_that_is_nan_is_the_worst() -> None:
    assert titles(k=1, losses=torch.tensor([0.1, torch.nan, 3.0, 0.2, 0.3]))[0][0] == "0\nloss nan"


def test_the_picture_shows_the_image_of_the_loss() -> None:
    figure = plot_top_losses(IMAGES, TARGETS, PRED, LOSSES, k=1)
    image = IMAGES[2, 0]
    expected = (image - image.min()) / (image.max() - image.min())
    assert np.asarray(figure.axes[0].images[0].get_array()) == pytest.approx(expected.numpy())


def test_from_the_samples_to_the_picture(tmp_path: Any) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    data = DataLoaders([(IMAGES, TARGETS)], [(IMAGES, TARGETS)])
    mine = Learner(model, data, cross_entropy, sgd())
    found = sample_losses(mine, mine.init())
    plot_top_losses(*found, k=4).savefig(tmp_path / "worst.png")
    plot_confusion_matrix(found.targets, found.preds).savefig(tmp_path / "matrix.png")
    assert all(file.stat().st_size > 1000 for file in tmp_path.iterdir())


def test_samples_fit_on_a_line() -> None:
    found = sample_losses(MINE, MINE.init())
    assert repr(found).startswith(f"SampleLosses({len(X)} samples, losses from ")
    assert repr(found._replace(losses=torch.zeros(0))) == "SampleLosses(0 samples)"


def test_the_confusion_matrix_of_a_learner_says_where_its_tensors_are() -> None:
    with pytest.raises(TypeError, match=r"got Learner. Both are in sample_losses\(learner, state"):
        plot_confusion_matrix(MINE, MINE.init())  # type: ignore[arg-type]
