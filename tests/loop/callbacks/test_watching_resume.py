"""Averages, activations and the best weights are saved with the state, and runs go on with them."""

from pathlib import Path

import pytest

from loop import (
    ActivationStats,
    AverageParams,
    Learner,
    SaveModel,
    State,
    at_average,
    fit,
    load,
    save,
)
from tests.loop.helpers import assert_same_run, full, on
from tests.loop.saving import identical


@pytest.fixture(scope="module")
def watched() -> tuple[Learner, State, list[State]]:
    """A learner with all three, its state after two epochs, and every state to resume from on the
    way.
    """
    mine = full(
        callbacks=[
            AverageParams(decay=0.9, every=2),
            ActivationStats(hist=True, every=2),
            SaveModel(None),
        ]
    )
    committed: list[State] = []
    end = fit(
        mine,
        mine.init(),
        2,
        [on("observer", committed=lambda state: committed.append(state.at_rest()))],
    )
    return mine, end, committed


def test_what_they_remember_is_saved(
    tmp_path: Path, watched: tuple[Learner, State, list[State]]
) -> None:
    _, end, _ = watched
    kept = {"average_params", "activation_stats", "save_model", "recorder"}
    assert set(end.memory) == {*kept, "replaced_params"}  # by SaveModel, at the end
    found = load(save(end, tmp_path / "end"))
    assert identical(found.memory, end.memory)
    assert identical(at_average(found).params, at_average(end).params)


def test_a_run_that_was_saved_anywhere_goes_on_bit_for_bit(
    tmp_path: Path, watched: tuple[Learner, State, list[State]]
) -> None:
    mine, end, committed = watched
    assert len(committed) > 10
    for index, state in enumerate(committed):
        found = fit(mine, load(save(state, tmp_path / str(index)), mine.init()), 2, resume=True)
        assert_same_run(found, end)
        assert identical(found.memory, end.memory), index
