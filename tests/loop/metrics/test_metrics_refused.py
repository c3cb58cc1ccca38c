"""What metrics refuse, and what they say; and targets of other kinds."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from functional_sgd import sgd
from loop import DataLoaders, Learner, validate
from loop.metrics import (
    F1,
    RMSE,
    Matthews,
    Tally,
    accuracy,
    accuracy_multi,
    confusion_matrix,
    error_rate,
    mae,
    mse,
    msle,
    top_k_accuracy,
)
from tests.loop.helpers import one_weight

ONE_CLASS = torch.tensor([[2.0], [-1.0], [0.5]])
YES_OR_NO = torch.tensor([1, 0, 0])


@pytest.mark.parametrize(
    "metric", [accuracy, error_rate, top_k_accuracy(1), confusion_matrix, F1("macro"), Matthews()]
)
def test_the_highest_of_one_score_says_nothing(metric: Any) -> None:
    with pytest.raises(ValueError, match=r"expected scores of two classes .* shape \(3, 1\)"):
        metric(ONE_CLASS, YES_OR_NO)


def test_what_is_advised_for_one_score_measures_it() -> None:
    assert float(accuracy_multi()(ONE_CLASS, YES_OR_NO)) == pytest.approx(2 / 3)
    two = torch.cat([-ONE_CLASS, ONE_CLASS], -1)
    assert float(accuracy(two, YES_OR_NO)) == pytest.approx(2 / 3)


@pytest.mark.parametrize(("metric", "value"), [(mse, 0.5), (mae, 0.5), (RMSE(), 0.5**0.5)])
def test_targets_may_be_bools(metric: Any, value: float) -> None:
    pred, target = torch.tensor([1.0, 1.0]), torch.tensor([True, False])
    assert float(metric(pred, target)) == pytest.approx(value)


def test_logarithms_of_bools() -> None:
    assert float(msle(torch.zeros(1), torch.tensor([False]))) == 0.0


def two_numbers(pred: Tensor, target: Tensor) -> Tensor:
    """No metric."""
    return torch.zeros(2)


def of_samples(pred: Tensor, target: Tensor) -> Tensor:
    """No metric: its shape depends on the batch."""
    return (pred - target)[:, 0]


def nothing(pred: Tensor, target: Tensor) -> None:
    """A return that was forgotten."""


class Pair(Tally):
    """With a value of two numbers."""

    def count(self, pred: Any, *targets: Any) -> dict[str, Tensor]:
        """Two."""
        return {"sums": torch.zeros(2)}

    def read(self, counted: Any) -> Tensor:
        """Both."""
        sums: Tensor = counted["sums"]
        return sums


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        (two_numbers, r"'two_numbers' .* got a tensor of shape \(2,\)"),
        (of_samples, r"'of_samples' .* got a tensor of shape \(3,\)"),
        (nothing, "'nothing' .* got NoneType"),
        (Pair(), r"'pair' .* got a tensor of shape \(2,\)"),
    ],
)
def test_what_is_no_number_is_an_error_with_the_name_of_the_metric(metric: Any, said: str) -> None:
    x = torch.ones(5, 1)
    data = DataLoaders([(x, x)], [(x[:2], x[:2]), (x[:3], x[:3])])
    mine = Learner(one_weight(), data, mse_loss, sgd(), [metric])
    with pytest.raises(TypeError, match=f"metric {said}"):
        validate(mine, mine.init())
