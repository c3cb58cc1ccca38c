"""Q20: the same run, with each callback left out in turn."""

import math
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from loop import (
    CancelFit,
    CSVLogger,
    GradientClip,
    Learner,
    Progress,
    Recorder,
    State,
    TerminateOnNaN,
    ablate,
    fit,
    fit_one_cycle,
)
from loop.callback import without_reports
from loop.tools.ablate import Ablation
from tests.loop.helpers import Kept, full, learner, on


def nudge(amount: float, name: str) -> Any:
    """A callback that makes every gradient larger."""

    def before_step(state: State) -> State:
        assert state.grads is not None
        return state.replace(
            grads={key: grad * amount for key, grad in state.grads.items() if grad is not None}
        )

    return on(name, before_step=before_step)


A, B = nudge(2.0, "double"), nudge(0.5, "halve")
MINE = learner(callbacks=[A, B])
BARE = learner()


def last(mine: Learner, column: str, seed: int = 0, epochs: int = 2) -> float:
    return float(fit(mine, mine.init(seed), epochs).history.rows[-1][column])


def test_q20_every_callback_is_left_out_once() -> None:
    found = ablate(MINE, MINE.init(), epochs=2)
    assert list(found.full) == ["train_loss", "valid_loss"]
    assert list(found.without) == ["double", "halve"]
    for column in found.full:
        assert found.full[column] == (last(MINE, column),)
        assert found.without["double"][column] == (last(learner(callbacks=[B]), column),)
        assert found.without["halve"][column] == (last(learner(callbacks=[A]), column),)


def test_the_differences_to_the_full_run() -> None:
    found = ablate(MINE, MINE.init(), epochs=2)
    change = last(learner(callbacks=[B]), "valid_loss") - last(MINE, "valid_loss")
    assert change != 0
    assert found.differences("double")["valid_loss"] == (change,)


def test_one_run_for_every_seed() -> None:
    mine = full(callbacks=[GradientClip(0.01)])
    found = ablate(mine, mine.init(seed=9), 1, seeds=(3, 4))
    assert found.full["train_loss"] == (
        last(mine, "train_loss", 3, 1),
        last(mine, "train_loss", 4, 1),
    )
    assert found.full["train_loss"][0] != found.full["train_loss"][1]


@pytest.mark.parametrize("keep", [["halve"], [type(B), "halve"]])
def test_what_is_kept_stays_in_all_runs(keep: list[Any]) -> None:
    mine = learner(callbacks=[GradientClip(0.1), B])
    found = ablate(mine, mine.init(), 1, keep=keep)
    assert list(found.without) == ["gradient_clip"]
    assert found.without["gradient_clip"]["train_loss"] == (
        last(learner(callbacks=[B]), "train_loss", epochs=1),
    )


def test_the_recorder_and_a_class_to_keep_stay() -> None:
    mine = learner(callbacks=[Recorder(train_metrics=True), GradientClip(), TerminateOnNaN()])
    found = ablate(mine, mine.init(), 1, keep=[TerminateOnNaN])
    assert list(found.without) == ["gradient_clip"]
    assert "train_mean_loss" in found.full


def test_one_column() -> None:
    found = ablate(MINE, MINE.init(), 1, metric="valid_loss")
    assert list(found.full) == list(found.without["double"]) == ["valid_loss"]


def test_a_column_that_is_not_there() -> None:
    with pytest.raises(
        ValueError, match="ablate: the history has no column 'valid_los'.*valid_loss"
    ):
        ablate(MINE, MINE.init(), 1, metric="valid_los")


def test_another_way_to_train() -> None:
    found = ablate(MINE, MINE.init(), 2, run=partial(fit_one_cycle, lr=0.05))
    expected = fit_one_cycle(MINE, MINE.init(), 2, lr=0.05).history.rows[-1]["train_loss"]
    assert found.full["train_loss"] == (expected,)


def test_a_run_that_measures_nothing() -> None:
    stop = on("stop", before_fit=lambda state: (_ for _ in ()).throw(CancelFit(state)))
    mine = learner(callbacks=[stop])
    found = ablate(mine, fit(BARE, BARE.init(), 1), 1)
    assert (found.full, found.without) == ({}, {"stop": {}})
    found = ablate(learner(callbacks=[A]), BARE.init(), 0)
    assert found.full == {}


def test_a_column_that_only_the_full_run_has() -> None:
    """NaN stands for what was not measured."""

    def run(mine: Learner, state: State, epochs: int) -> State:
        return fit(mine, state, epochs if len(mine.callbacks) == 2 else 0)

    found = ablate(MINE, MINE.init(), 1, run=run)
    assert list(found.without["double"]) == list(found.full) == ["train_loss", "valid_loss"]
    assert not math.isnan(found.full["train_loss"][0])
    assert math.isnan(found.without["double"]["train_loss"][0])
    assert "nan" in str(ablate(MINE, MINE.init(), 1, seeds=(0, 1), run=run))


def test_what_only_reports_takes_part_in_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = learner(callbacks=[Progress(), A, B, CSVLogger(tmp_path / "log.csv")])
    assert str(ablate(mine, mine.init(), 1)) == str(ablate(MINE, MINE.init(), 1))
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_reports_are_those_that_do_not_train() -> None:
    assert without_reports([Progress(), A, Recorder()]) == [A, Recorder()]


@pytest.mark.parametrize(
    ("callbacks", "options"),
    [([], {}), ([A], {"keep": ["double"]}), ([Progress()], {}), ([A], {"seeds": ()})],
)
def test_nothing_to_compare(callbacks: list[Any], options: dict[str, Any]) -> None:
    mine = learner(callbacks=callbacks)
    with pytest.raises(ValueError, match="ablate: nothing to compare"):
        ablate(mine, mine.init(), 1, **options)


def test_an_interruption_ends_all_runs() -> None:
    mine = learner(
        callbacks=[on("press", after_batch=lambda state: signal.raise_signal(signal.SIGINT)), A]
    )
    with pytest.raises(KeyboardInterrupt, match="SIGINT"):
        ablate(mine, mine.init(), 1)


def test_the_state_is_untouched() -> None:
    mine = full(callbacks=[GradientClip(0.01)])
    state = mine.init()
    kept, before = Kept(state), torch.get_rng_state()
    ablate(mine, state, 1)
    kept.check()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_table_of_one_seed() -> None:
    table = Ablation(
        {"valid_loss": (0.5,), "accuracy": (0.75,)},
        {"a": {"valid_loss": (0.625,), "accuracy": (0.5,)}},
        (0,),
    )
    assert str(table).splitlines() == [
        "           valid_loss             accuracy",
        "all          0.500000             0.750000",
        "without a    0.625000  +0.125000  0.500000  -0.250000",
    ]
    assert repr(table) == str(table)


def test_the_table_of_several_seeds() -> None:
    """Differences 1 and 3: mean 2, standard deviation sqrt(2)."""
    table = Ablation({"loss": (1.0, 2.0)}, {"a": {"loss": (2.0, 5.0)}}, (0, 1))
    assert str(table).splitlines() == [
        "               loss",
        "all        1.500000",
        "without a  3.500000  +2.000000 ± 1.414214",
        "(means over 2 seeds, and mean differences to all ± their standard deviation)",
    ]
