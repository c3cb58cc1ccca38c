"""Batches without targets: the loss of validation is measured where it is in training."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from loop import DataLoaders, Learner, fit, predict, sample_losses, summary, validate
from loop.run.targetless import takes_prediction_alone
from tests.loop.helpers import batches, learner

ALONE = [(x,) for x, _ in batches(2, 1)]
DATA = DataLoaders(ALONE, ALONE)


def square(pred: Tensor) -> Tensor:
    """A loss of the prediction alone."""
    return pred.square().mean()


def needy(data: DataLoaders = DATA) -> Learner:
    """A learner whose loss cannot do without targets."""
    return learner(data=data, loss=mse_loss)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_a_run_without_targets_validates_with_the_loss_that_it_trains_with(compile: bool) -> None:
    mine = learner(data=DATA, loss=square)
    end = fit(mine, mine.init(), 1, compile=compile)
    expected = torch.stack(
        [square(x @ end.params["weight"].T + end.params["bias"]) for (x,) in ALONE]
    )
    assert end.history.rows[0]["valid_loss"] == pytest.approx(float(expected.mean()), abs=1e-6)


def test_validate_measures_what_fit_does() -> None:
    mine = learner(data=DATA, loss=square)
    end = fit(mine, mine.init(), 1)
    assert validate(mine, end) == {"valid_loss": end.history.rows[0]["valid_loss"]}


def test_a_loss_whose_targets_may_be_left_out_is_measured() -> None:
    def either(pred: Tensor, y: Tensor | None = None) -> Tensor:
        return pred.mean() if y is None else mse_loss(pred, y)

    mine = learner(data=DATA, loss=either)
    assert list(validate(mine, mine.init())) == ["valid_loss"]


def test_validate_says_that_a_loss_of_targets_was_not_measured() -> None:
    with pytest.warns(UserWarning, match=r"the loss mse_loss takes some.*targets=\(\)"):
        assert validate(needy(), needy().init()) == {}


def test_fit_says_so_once() -> None:
    mine = needy(DataLoaders(batches(2, 1), ALONE))
    with pytest.warns(UserWarning, match="batches without targets") as caught:
        end = fit(mine, mine.init(), 3)
    assert len(caught) == 1
    assert end.history.column("valid_loss") == [None] * 3


def test_a_loss_that_takes_anything_is_not_called() -> None:
    mine = learner(data=DATA, loss=lambda pred, *targets: mse_loss(pred, *targets))
    with pytest.warns(UserWarning, match="batches without targets"):
        assert validate(mine, mine.init()) == {}


def test_predict_calls_no_loss_and_says_nothing() -> None:
    for mine in (needy(), learner(data=DATA, loss=square)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert predict(mine, mine.init()).shape == (8, 2)


def test_summary_says_nothing() -> None:
    assert "mse_loss" in str(summary(needy(), needy().init()))


def test_sample_losses_says_it_by_its_error() -> None:
    with pytest.raises(ValueError, match="no targets"):
        sample_losses(needy(), needy().init())


class Own(nn.Module):
    """A loss of the prediction alone, as a module."""

    def forward(self, pred: Tensor) -> Tensor:
        return pred.mean()


@pytest.mark.parametrize(
    ("loss", "alone"),
    [
        (square, True),
        (Own(), True),
        (mse_loss, False),
        (nn.CrossEntropyLoss(), False),
        (lambda *parts: parts[0], False),
        (lambda pred, *, scale: pred, False),
        (torch.dist, False),  # without a signature
    ],
)
def test_what_a_signature_says(loss: Any, alone: bool) -> None:
    assert takes_prediction_alone(loss) is alone
