"""SaveModel keeps nothing that is not finite, whatever its monitor says."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from loop import SaveModel, State, fit, load_params
from tests.comparing import assert_same
from tests.loop.callbacks.test_save_model import MINE, START, after, scripted, weights
from tests.loop.helpers import on


def diverging(epoch: int, value: float = math.nan) -> Any:
    """A callback that makes every param this from an epoch on."""

    def after_train(state: State) -> State | None:
        if state.epoch < epoch:
            return None
        params = {name: torch.full_like(part, value) for name, part in state.params.items()}
        return state.replace(params=params)

    return on("diverge", 40, after_train=after_train)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_never_the_best(tmp_path: Path, value: float) -> None:
    path = tmp_path / "best"
    accuracy = scripted(0.5, 0.9, 0.9, name="accuracy")
    keep = SaveModel(path, monitor="accuracy")
    with pytest.warns(UserWarning, match=r"params\['0.weight'\] is not finite .* is not kept"):
        state = fit(MINE, START, 3, [diverging(1, value), accuracy, keep])
    assert_same(weights(state), weights(after(1)))
    assert_same(weights(load_params(path, START)), weights(after(1)))


@pytest.mark.parametrize("settings", [dict(every=1), dict(at_end=True)])
def test_a_file_is_not_replaced_by_what_is_not_finite(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    path = tmp_path / "model"
    fit(MINE, START, 1, [SaveModel(path, **settings)])
    with pytest.warns(UserWarning, match="What was kept before stays"):
        fit(MINE, START, 1, [diverging(0), SaveModel(path, **settings)])
    assert_same(weights(load_params(path, START)), weights(after(1)))


def test_a_mask_of_minus_infinity_among_the_buffers_is_no_reason() -> None:
    mask = on(
        after_train=lambda state: state.replace(
            buffers={**state.buffers, "1.running_mean": torch.full((4,), -torch.inf)}
        )
    )
    state = fit(MINE, START, 1, [mask, scripted(1.0), SaveModel(None)])
    assert "params" in state.memory["save_model"]
