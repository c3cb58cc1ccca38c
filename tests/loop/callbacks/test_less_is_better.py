"""Of which columns less is better, by their names."""

from typing import Any

import pytest
import torch

from functional_sgd import sgd
from loop import DataLoaders, EarlyStopping, Learner, State, fit
from loop.callbacks.tracking import Tracked, mode_of
from loop.metrics import (
    F1,
    R2,
    RMSE,
    CohenKappa,
    Dice,
    Matthews,
    Pearson,
    Perplexity,
    Spearman,
    accuracy,
    error_rate,
    mae,
    metric_name,
    mse,
    msle,
)
from tests.loop.helpers import on, one_weight


@pytest.mark.parametrize("metric", [mse, mae, msle, error_rate, RMSE(), Perplexity()])
def test_less_is_better_of_errors(metric: Any) -> None:
    name = metric_name(metric)
    assert (mode_of(name), mode_of(f"train_{name}")) == ("min", "min")


@pytest.mark.parametrize(
    "metric", [accuracy, F1(), R2(), Pearson(), Spearman(), CohenKappa(), Dice(), Matthews()]
)
def test_more_is_better_of_all_others(metric: Any) -> None:
    assert mode_of(metric_name(metric)) == "max"


def test_a_word_within_a_word_says_nothing() -> None:
    assert mode_of("maeander") == "max"


def test_a_tracker_of_rmse_waits_for_less() -> None:
    values = [2.0, 1.0, 1.5]

    def give(state: State) -> State | None:
        return None if state.training else state.replace(pred=state.yb[0] + values[state.epoch])

    batch = (torch.ones(1, 1), torch.ones(1, 1))
    data = DataLoaders([batch], [batch])
    mine = Learner(one_weight(), data, mse, sgd(lr=0.0), [RMSE()])
    stop = EarlyStopping("rmse", patience=2)
    end = fit(mine, mine.init(), 3, [stop, on("give", after_pred=give)])
    assert end.memory["early_stopping"] == Tracked(1.0, 1)
