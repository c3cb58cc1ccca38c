"""Weights that are put into a state: they are evaluated, and a training goes on from them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import functional_sgd as fs
from loop import (
    AverageParams,
    Batches,
    Callback,
    DataLoaders,
    Learner,
    SaveModel,
    State,
    at_average,
    at_best,
    fit,
    load,
    load_params,
    predict,
    save,
    validate,
)
from loop.replaced import REPLACED

X = torch.linspace(-1, 1, 8)[:, None]
Y = 3 * X + torch.randn(8, 1, generator=torch.Generator().manual_seed(0))

OPTS: dict[str, Callable[[float], fs.Optimizer]] = {
    "sgd": lambda lr: fs.sgd(lr=lr),
    "lookahead": lambda lr: fs.lookahead(fs.sgd(lr=lr)),
    "average_params": lambda lr: fs.average_params(fs.sgd(lr=lr), 0.5),
    "schedule_free": lambda lr: fs.schedule_free(fs.sgd(lr=lr)),
    "schedule_free_sgd": lambda lr: fs.schedule_free_sgd(lr=lr),
    "ranger": lambda lr: fs.ranger(lr=lr),
    "in a partition": lambda lr: fs.partition(
        {"one": fs.average_params(fs.sgd(lr=lr), 0.5)}, {"*": "one"}
    ),
}


def learner(opt: fs.Optimizer, callbacks: Any = ()) -> Learner:
    torch.manual_seed(0)
    data = DataLoaders(Batches((X, Y), 4), Batches((X, Y), 8))
    return Learner(nn.Linear(1, 1), data, mse_loss, opt, callbacks=callbacks)


def loss_of(mine: Learner, state: State) -> float:
    return validate(mine, state)["valid_loss"]


def shown(mine: Learner, state: State) -> list[float]:
    """The loss of these weights, by everybody who evaluates them."""
    pred: Any = predict(mine, state)
    whole: Any = mine.load(state)(X)
    return [loss_of(mine, state), mse_loss(pred, Y).item(), mse_loss(whole, Y).item()]


@pytest.mark.parametrize("name", OPTS)
def test_the_best_weights_are_what_is_evaluated(name: str, tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    mine = learner(OPTS[name](1.2))  # which diverges, so the best is not the last
    end = fit(mine, mine.init(), 6, [SaveModel(path)])
    best = min(end.history.column("valid_loss"))
    every = [end, at_best(end), load_params(path, end), load_params(path, mine.init())]
    for state in every:
        assert shown(mine, state) == pytest.approx([best] * 3, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "compile"),
    [*((name, False) for name in OPTS), ("average_params", True), ("schedule_free", True)],
)
def test_a_training_goes_on_from_them(name: str, compile: bool, tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    good = learner(fs.sgd(lr=0.2))
    end = fit(good, good.init(), 30, [SaveModel(path, at_end=True)])
    mine = learner(OPTS[name](1e-6))
    used = fit(mine, mine.init(), 1)
    for start in (mine.init(), used):
        state = load_params(path, start)
        assert loss_of(mine, state) == loss_of(good, end)
        after = fit(mine, state, 3, compile=compile)
        assert REPLACED in state.memory
        assert REPLACED not in after.memory
        assert loss_of(mine, after) == pytest.approx(loss_of(good, end), abs=1e-4)


@pytest.mark.parametrize("name", OPTS)
def test_so_it_does_where_somebody_writes_params_into_a_fresh_state(name: str) -> None:
    mine = learner(OPTS[name](1e-6))
    zeros = {key: torch.zeros_like(value) for key, value in mine.init().params.items()}
    state = mine.init().replace(params=zeros)
    expected = (Y**2).mean().item()
    assert shown(mine, state) == pytest.approx([expected] * 3)
    assert loss_of(mine, fit(mine, state, 3)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", OPTS)
def test_a_callback_may_go_back_to_them_in_the_middle_of_a_run(name: str, tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    good = learner(fs.sgd(lr=0.2))
    fit(good, good.init(), 30, [SaveModel(path, at_end=True)])

    class Load(Callback):
        def after_train(self, state: State) -> State | None:
            return load_params(path, state) if state.epoch == 1 else None

    mine = learner(OPTS[name](1e-6))
    rows = fit(mine, mine.init(), 4, [Load()]).history.column("valid_loss")
    assert rows[1] == loss_of(good, load_params(path, good.init()))
    assert rows[3] == pytest.approx(rows[1], abs=1e-4)
    assert rows[0] > rows[1] + 0.1


def test_they_stay_what_is_evaluated_when_they_come_from_a_disk(tmp_path: Path) -> None:
    mine = learner(OPTS["average_params"](1.2))
    end = fit(mine, mine.init(), 6, [SaveModel(None)])
    save(end, tmp_path / "end")
    assert shown(mine, load(tmp_path / "end")) == shown(mine, end)


@pytest.mark.parametrize("name", ["sgd", "schedule_free"])
def test_averages_among_the_callbacks_leave_them_alone(name: str) -> None:
    mine = learner(OPTS[name](0.9), [AverageParams(0.5), SaveModel(None, weights=at_average)])
    end = fit(mine, mine.init(), 6)
    best = min(end.history.column("valid_loss"))
    assert shown(mine, end) == pytest.approx([best] * 3, rel=1e-6)
    again = fit(mine, end, 1)
    assert again.memory["average_params"].count == 2  # of two batches, not of twelve more


def test_averages_among_the_callbacks_count_beside_those_of_the_optimizer() -> None:
    mine = learner(fs.schedule_free(fs.sgd(lr=0.5)))
    end = fit(mine, mine.init(), 3, [AverageParams(0.9)])
    assert end.history.column("valid_loss")[-1] == loss_of(mine, at_average(end))
    assert end.history.column("valid_loss")[-1] != loss_of(mine, end)
