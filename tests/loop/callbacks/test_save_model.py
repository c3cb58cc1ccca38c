"""The best weights of a run, weights in files, and reading them."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from loop import (
    AverageParams,
    EarlyStopping,
    Recorder,
    SaveModel,
    State,
    at_average,
    at_best,
    fit,
    load_params,
    validate,
)
from loop.callbacks.saving import write_tensors
from loop.run.signals import CancelFit
from tests.comparing import assert_same
from tests.loop.helpers import Kept, learned, learner, loaders, net, on, raise_once, raiser

MINE = learner(net())
START = MINE.init()


def scripted(*values: float | None, name: str = "valid_loss") -> Any:
    """A callback behind the Recorder, which writes these numbers into a column of the history."""

    def after_epoch(state: State) -> State:
        *rows, last = state.history.rows
        changed = {**last, name: values[len(rows)]}
        return state.replace(history=replace(state.history, rows=(*rows, changed)))

    return on("script", 55, after_epoch=after_epoch)


def after(epochs: int) -> State:
    return fit(MINE, START, epochs)


def weights(state: State) -> dict[str, Any]:
    return {"params": state.params, "buffers": state.buffers}


def metadata(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, "pt") as file:
        about = dict(file.metadata())
    assert len(about.pop("sha256")) == 64
    assert about.pop("written_by").startswith("functional-sgd")
    return about


def test_the_run_ends_with_the_best_weights(tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    state = fit(MINE, START, 4, [scripted(3.0, 1.0, 2.0, 1.0), SaveModel(path)])
    assert_same(weights(state), weights(after(2)))
    assert_same(state.opt_state, after(4).opt_state)
    assert_same(weights(load_params(path, START)), weights(after(2)))
    assert metadata(path) == {"epoch": "2", "train_iter": "6", "valid_loss": "1.0"}


def test_without_a_path_it_is_kept_in_the_state_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state = fit(MINE, START, 3, [scripted(1.0, 2.0, 3.0), SaveModel(None)])
    assert_same(weights(state), weights(after(1)))
    assert list(tmp_path.iterdir()) == []


def test_the_last_weights_can_stay(tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    state = fit(MINE, START, 3, [scripted(1.0, 2.0, 3.0), SaveModel(path, restore_best=False)])
    assert_same(weights(state), weights(after(3)))
    assert_same(weights(load_params(path, START)), weights(after(1)))
    assert state.memory["save_model"] == {"best": 1.0, "epoch": 1}


@pytest.mark.parametrize(
    ("options", "values", "best"),
    [
        ({"min_delta": 0.5}, (2.0, 1.6, 1.4), 3),
        ({"min_delta": 0.5}, (2.0, 1.6, 1.5), 1),
        ({"mode": "max"}, (1.0, 3.0, 2.0), 2),
        ({"monitor": "accuracy"}, (0.1, 0.3, 0.2), 2),
        ({"monitor": "accuracy", "mode": "min"}, (0.3, 0.1, 0.2), 2),
        ({}, (math.nan, 2.0, math.nan), 2),
        ({}, (None, 2.0, None), 2),
        ({}, (1.0, 1.0, 1.0), 1),
    ],
)
def test_which_epoch_is_best(options: dict[str, Any], values: tuple[Any, ...], best: int) -> None:
    name = options.get("monitor", "valid_loss")
    state = fit(MINE, START, 3, [scripted(*values, name=name), SaveModel(None, **options)])
    assert state.memory["save_model"]["epoch"] == best
    assert_same(weights(state), weights(after(best)))


def test_nothing_measured_changes_nothing() -> None:
    state = fit(MINE, START, 2, [scripted(None, None), SaveModel(None)])
    assert_same(weights(state), weights(after(2)))


@pytest.mark.parametrize(
    "ending", [on(order=62, after_epoch=raise_once(CancelFit, at=2)), EarlyStopping(patience=1)]
)
def test_a_run_that_ends_early_ends_with_the_best_too(ending: Any) -> None:
    state = fit(MINE, START, 5, [scripted(2.0, 1.0, 3.0, 0.0, 0.0), SaveModel(None), ending])
    assert_same(weights(state), weights(after(2)))


def test_the_epoch_that_ends_a_run_can_be_the_best() -> None:
    ending = on(order=62, after_epoch=raise_once(CancelFit, at=1))
    state = fit(MINE, START, 5, [scripted(2.0, 1.0), SaveModel(None), ending])
    assert state.memory["save_model"]["epoch"] == 2


def test_it_looks_at_the_row_of_this_epoch_however_late_that_is_written() -> None:
    class Late(Recorder):
        order = 90

    state = fit(MINE, START, 1, [Late(), SaveModel(None)])
    assert state.memory["save_model"]["best"] == state.history.rows[0]["valid_loss"]


def test_every_run_starts_anew_unless_told_otherwise() -> None:
    first = fit(MINE, START, 1, [scripted(1.0), SaveModel(None)])
    assert_same(
        weights(fit(MINE, first, 1, [scripted(1.0, 2.0), SaveModel(None)])),
        weights(fit(MINE, first, 1)),
    )
    kept = fit(MINE, first, 1, [scripted(1.0, 2.0), SaveModel(None, reset_on_fit=False)])
    assert_same(weights(kept), weights(first))


def test_a_run_that_is_resumed_remembers_the_best() -> None:
    callbacks = [scripted(3.0, 1.0, 2.0), SaveModel(None)]
    states: list[State] = []
    whole = fit(MINE, START, 3, [*callbacks, on("observer", committed=states.append)])
    for state in states:
        assert_same(learned(fit(MINE, state.at_rest(), 3, callbacks, resume=True)), learned(whole))


def test_a_stopped_run_can_be_put_to_its_best() -> None:
    states: list[State] = []
    fit(
        MINE,
        START,
        3,
        [scripted(1.0, 2.0, 3.0), SaveModel(None), on("observer", committed=states.append)],
    )
    stopped = states[-3].at_rest()
    assert stopped.epoch == 2
    assert_same(weights(at_best(stopped)), weights(after(1)))


def test_every_second_epoch_in_a_file_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    callback = SaveModel(folder / "{epoch}.safetensors", every=2)
    state = fit(MINE, fit(MINE, START, 3, [callback]), 2, [callback])
    assert sorted(file.name for file in folder.iterdir()) == ["2.safetensors", "4.safetensors"]
    assert_same(weights(load_params(folder / "2.safetensors", START)), weights(after(2)))
    assert_same(weights(state), weights(fit(MINE, after(3), 2)))  # nothing is put back
    assert "save_model" not in state.memory


@pytest.mark.parametrize("others", [[], [on(after_epoch=raise_once(CancelFit, at=0))]])
def test_the_last(tmp_path: Path, others: list[Any]) -> None:
    path = tmp_path / "last.safetensors"
    state = fit(MINE, START, 2, [scripted(1.0, 2.0), SaveModel(path, at_end=True), *others])
    assert_same(weights(load_params(path, START)), weights(state))
    assert_same(weights(state), weights(after(1 if others else 2)))


def test_every_epoch_in_a_folder_of_its_own(tmp_path: Path) -> None:
    fit(MINE, START, 2, [SaveModel(tmp_path / "all" / "{epoch}" / "weights", every=1)])
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["1", "2"]


def test_no_epoch_is_no_monitored_value(tmp_path: Path) -> None:
    fit(MINE, START, 0, [SaveModel(tmp_path / "last", at_end=True)])
    assert metadata(tmp_path / "last") == {"epoch": "0", "train_iter": "0"}


def test_a_monitor_that_was_not_measured_is_not_written(tmp_path: Path) -> None:
    fit(MINE, START, 1, [scripted(None), SaveModel(tmp_path / "last", at_end=True)])
    assert metadata(tmp_path / "last") == {"epoch": "1", "train_iter": "3"}


def test_the_average_can_be_what_is_kept(tmp_path: Path) -> None:
    callbacks = [
        AverageParams(decay=0.5),
        scripted(2.0, 1.0, 3.0),
        SaveModel(tmp_path / "best", weights=at_average),
    ]
    state = fit(MINE, START, 3, callbacks)
    best = at_average(fit(MINE, START, 2, callbacks[:1]))
    assert_same(weights(state), weights(best))
    assert_same(weights(load_params(tmp_path / "best", START)), weights(best))


def test_training_is_the_same_and_the_state_given_is_untouched(tmp_path: Path) -> None:
    start = fit(MINE, START, 1, [SaveModel(None)])
    kept = Kept(start)
    found = fit(MINE, start, 2, [SaveModel(tmp_path / "best", restore_best=False)])
    kept.check()
    assert_same(learned(found), learned(fit(MINE, start, 2)))
    assert validate(learner(net(), callbacks=[SaveModel(None)]), start) == validate(MINE, start)


def test_a_module_can_load_the_file(tmp_path: Path) -> None:
    state = fit(MINE, START, 1, [SaveModel(tmp_path / "best")])
    model, tensors = net(), {**state.params, **state.buffers}
    model.load_state_dict(safetensors.torch.load_file(tmp_path / "best"))
    assert_same(dict(model.state_dict()), {name: tensors[name] for name in model.state_dict()})


def test_tensors_that_share_memory_can_be_written(tmp_path: Path) -> None:
    both = torch.arange(6.0)
    write_tensors(tmp_path / "file", {"a": both[:3], "b": both[:3], "c": both.reshape(2, 3).T}, {})
    found = safetensors.torch.load_file(tmp_path / "file")
    assert_same(
        found,
        {"a": both[:3].clone(), "b": both[:3].clone(), "c": both.reshape(2, 3).T.contiguous()},
    )


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails while the second is written, the first stays, and nothing else."""
    path = tmp_path / "best"
    write_tensors(path, {"a": torch.ones(1)}, {})
    for function in ("sync", "os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(f"loop.disk.weights.{function}", raiser(ZeroDivisionError))
            with pytest.raises(ZeroDivisionError):
                write_tensors(path, {"a": torch.zeros(1)}, {})
        assert safetensors.torch.load_file(path)["a"] == 1
        assert list(tmp_path.iterdir()) == [path]


def test_a_dtype_that_no_file_can_hold(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"cannot hold torch\.complex128. Use Checkpoint"):
        write_tensors(tmp_path / "file", {"a": torch.zeros(1, dtype=torch.complex128)}, {})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.zeros(2, 2)}, "has no 'bias'"),
        (
            {"weight": torch.zeros(2, 2), "bais": torch.zeros(2)},
            "has no tensor 'bais' of .*Did you mean 'bias'",
        ),
        (
            {"weight": torch.zeros(2, 2), "bias": torch.zeros(2), "x": torch.zeros(1)},
            "no tensor 'x' of .*another",
        ),
        (
            {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)},
            r"'weight' of .* has shape \(2, 3\), but .*\(2, 2\)",
        ),
        (
            {"weight": torch.zeros(2, 2).double(), "bias": torch.zeros(2)},
            "'weight' of .* has dtype torch.float64, but",
        ),
    ],
)
def test_a_file_of_another_model(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    write_tensors(tmp_path / "file", tensors, {})
    with pytest.raises(ValueError, match=f"load_params: .*{message}"):
        load_params(tmp_path / "file", learner().init())


def test_a_file_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("hello")
    with pytest.raises(ValueError, match="file is not a safetensors file"):
        load_params(tmp_path / "file", START)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": None, "restore_best": False}, "without a path"),
        ({"path": None, "every": 1}, "without a path"),
        ({"path": None, "at_end": True}, "without a path"),
        ({"path": "a", "every": 0}, "every must be at least 1"),
        ({"path": "a", "mode": "best"}, "mode must be"),
        ({"path": "a", "min_delta": -1.0}, "min_delta must be"),
    ],
)
def test_settings_that_make_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"SaveModel: {message}"):
        SaveModel(**arguments)


def test_a_monitor_that_is_no_column() -> None:
    with pytest.raises(
        ValueError, match="SaveModel: there is no 'valid_loss' without validation data"
    ):
        fit(learner(data=loaders(valid=None)), learner().init(), 1, [SaveModel(None)])
    with pytest.raises(ValueError, match="SaveModel: the history has no column 'accuracy'"):
        fit(MINE, START, 1, [SaveModel(None, monitor="accuracy")])


def test_a_folder_is_no_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder"):
        fit(MINE, START, 1, [SaveModel(tmp_path)])


def test_a_state_without_a_best_says_so() -> None:
    with pytest.raises(ValueError, match="at_best: the state has kept no epoch as 'save_model'"):
        at_best(START)
