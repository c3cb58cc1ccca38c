"""resume: a command that is not the one that began the run is refused, or differences are named."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from functional_sgd import adamw, sgd
from functional_sgd.schedules import Linear
from loop import (
    AverageParams,
    Batches,
    Callback,
    Checkpoint,
    DataLoaders,
    ParamScheduler,
    State,
    Timer,
    fine_tune,
    fit,
    fit_one_cycle,
    load,
    make_loader,
)
from loop.disk.store import checkpoints
from tests.loop.helpers import full, net, on, raise_once, shuffled
from tests.loop.saving import identical, tiny

MINE = full()
START = MINE.init(seed=4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a run of two epochs that has failed in the second."""
    begin(tmp_path / "run")
    return tmp_path / "run"


def begin(folder: Path, *callbacks: Any, **options: Any) -> State:
    bug = on("bug", after_step=raise_once(ZeroDivisionError, at=4))
    with pytest.raises(ZeroDivisionError) as caught:
        fit(MINE, START, 2, [Checkpoint(folder), *callbacks, bug], **options)
    state: State = caught.value.state  # type: ignore[attr-defined]
    return state


# Places that are no folder of checkpoints


def test_a_checkpoint_is_not_the_folder_that_it_is_in(folder: Path) -> None:
    with pytest.raises(ValueError, match="is a checkpoint, expected the folder that it is in"):
        fit(MINE, START, 2, resume=checkpoints(folder)[-1])


def test_a_checkpoint_can_be_gone_on_with_as_the_error_says(folder: Path) -> None:
    state = load(checkpoints(folder)[-1])
    end = fit(MINE, state, 2, resume=True)
    assert identical(vars(end), vars(fit(MINE, START, 2)))


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file, expected the folder of a Checkpoint"):
        fit(MINE, START, 2, resume=tmp_path / "file")


@pytest.mark.parametrize("value", [None, 1, b"runs"])
def test_what_is_no_path_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="resume must be True, False or the folder"):
        fit(MINE, START, 2, resume=value)


def test_another_folder_than_that_of_the_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no checkpoint in .*runs.*but it will write into .*a"):
        fit(MINE, START, 1, [Checkpoint(tmp_path / "runs" / "a")], resume=tmp_path / "runs")


def test_fine_tune_looks_at_the_folder_too(folder: Path) -> None:
    with pytest.raises(ValueError, match="is a checkpoint"):
        fine_tune(MINE, START, 1, lr=0.1, resume=checkpoints(folder)[-1])


# Commands that are not the one that began the run


def test_another_lr_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"begun with lr=0\.01, so it cannot be .* with lr=0\.5"):
        fit(MINE, START, 2, resume=folder, lr=0.5)


def test_the_same_lr_said_again_is_no_other(folder: Path) -> None:
    assert fit(MINE, START, 2, resume=folder, lr=0.01).train_iter == 6


def test_another_lr_is_refused_for_a_state_in_memory_too(tmp_path: Path) -> None:
    stopped = begin(tmp_path, lr=0.1)
    with pytest.raises(ValueError, match=r"begun with lr=0\.1, .* with lr=0\.5"):
        fit(MINE, stopped, 2, resume=True, lr=0.5)


def test_another_lr_of_one_leaf_is_refused(tmp_path: Path) -> None:
    rates = dict.fromkeys(START.params, 0.1)
    begin(tmp_path, lr=rates)
    with pytest.raises(ValueError, match="begun with lr="):
        fit(MINE, START, 2, resume=tmp_path, lr={**rates, "0.bias": 0.2})


def test_a_scheduled_lr_is_compared_with_what_the_run_was_begun_with(tmp_path: Path) -> None:
    schedule = ParamScheduler({"lr": Linear(0.1, 0.2)})
    begin(tmp_path, schedule, lr=0.5)
    assert fit(MINE, START, 2, [schedule], resume=tmp_path, lr=0.5).hyper["lr"] == 0.5


def test_another_maximum_of_one_cycle_is_a_warning_and_the_new_curve_is_followed(
    tmp_path: Path,
) -> None:
    """From the third batch of six on; the two before keep the lr that they had."""

    def rates(lr: float, *callbacks: Any, **options: Any) -> list[float]:
        state = fit_one_cycle(MINE, START, 2, lr, callbacks=callbacks, **options)
        return [*state.history.hypers["lr"]]

    keeper = Checkpoint(tmp_path, batches=1)
    with pytest.raises(ZeroDivisionError):
        rates(0.1, keeper, on("bug", after_step=raise_once(ZeroDivisionError, at=2)))
    with pytest.warns(UserWarning, match="'param_scheduler' was .*, is ParamScheduler"):
        resumed = rates(0.2, keeper, resume=tmp_path)
    assert resumed == [*rates(0.1)[:2], *rates(0.2)[2:]]


def test_another_default_of_the_optimizer_does_not_change_the_lr_of_the_state(
    folder: Path,
) -> None:
    other = replace(MINE, opt=adamw(lr=0.5))
    with pytest.warns(UserWarning, match=r"optimizer was .*lr=0\.01.*, is .*lr=0\.5"):
        assert {*fit(other, START, 2, resume=folder).history.hypers["lr"]} == {0.01}


def test_another_seed_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="has the seed 4, but the state given has the seed 5"):
        fit(MINE, MINE.init(seed=5), 2, resume=folder)


def test_other_data_of_the_librarys_own_loaders_are_refused(folder: Path) -> None:
    short = Batches((torch.ones(19, 2), torch.ones(19, 2)), 8, shuffle=True)
    other = replace(MINE, data=replace(MINE.data, train=short))
    with pytest.raises(ValueError, match=r"begun with 20 samples in data.train, .* with 19"):
        fit(other, START, 2, resume=folder)


def test_another_length_of_a_loader_is_refused(tmp_path: Path) -> None:
    def of(size: int) -> Any:
        samples = [(torch.ones(2), torch.ones(2))] * size
        return replace(MINE, data=DataLoaders(make_loader(samples, 4)))

    fit(of(8), START, 1, [Checkpoint(tmp_path)])
    with pytest.raises(ValueError, match=r"begun with 2 batches in data.train, .* with 3"):
        fit(of(9), START, 1, resume=tmp_path)


def test_another_optimizer_with_the_same_slots_is_named(folder: Path) -> None:
    other = replace(MINE, opt=adamw(lr=0.01, eps=1e-3))
    with pytest.warns(UserWarning, match=r"optimizer was .*eps=1e-08.*, is .*eps=0\.001"):
        fit(other, START, 2, resume=folder)


def test_other_callbacks_are_named(tmp_path: Path) -> None:
    begin(tmp_path, AverageParams(decay=0.9))
    with pytest.warns(UserWarning, match="the callback 'average_params' is gone"):
        fit(MINE, START, 2, resume=tmp_path)


def test_another_schedule_is_named(tmp_path: Path) -> None:
    bug = on("bug", after_step=raise_once(ZeroDivisionError, at=4))
    with pytest.raises(ZeroDivisionError):
        fit_one_cycle(MINE, START, 2, 0.1, callbacks=[Checkpoint(tmp_path), bug])
    with pytest.warns(UserWarning, match="callback 'param_scheduler' was .*, is "):
        fit_one_cycle(MINE, START, 2, 0.5, resume=tmp_path)


def test_callbacks_that_only_report_are_no_difference(tmp_path: Path) -> None:
    begin(tmp_path, Timer())
    assert fit(MINE, START, 2, resume=tmp_path).train_iter == 6


def test_another_torch_and_other_threads_are_named(folder: Path) -> None:
    state = load(checkpoints(folder)[-1])
    begun = {**state.begun_with, "torch": "1.0", "threads": 99}
    with pytest.warns(UserWarning, match=r"torch was 1\.0, is .*; threads was 99, is 1\."):
        fit(MINE, state.replace(begun_with=begun), 2, resume=True)


def test_all_differences_are_in_one_warning(tmp_path: Path) -> None:
    begin(tmp_path, AverageParams(decay=0.9))
    with pytest.warns(UserWarning, match="resumed with") as caught:
        fit(replace(MINE, opt=adamw(lr=0.02)), START, 2, resume=tmp_path)
    assert len(caught) == 1
    assert "optimizer was" in str(caught[0].message)


def test_objects_that_are_no_callback_by_class_are_no_difference(tmp_path: Path) -> None:
    """Made for the occasion, such as the one that has failed in `begin`."""
    begin(tmp_path, on("spy", after_batch=lambda state: None))
    assert fit(MINE, START, 2, resume=tmp_path).train_iter == 6


def test_a_repr_that_fails_does_not_end_a_run(tmp_path: Path) -> None:
    class Loud(Callback):
        name = "loud"

        def __repr__(self) -> str:
            raise ZeroDivisionError

        def after_batch(self, state: State) -> None: ...

    assert fit(MINE, START, 1, [Loud()]).train_iter == 3


def test_the_end_of_a_run_does_not_remember_what_it_was_begun_with(tmp_path: Path) -> None:
    assert fit(MINE, START, 1, lr=0.5).begun_with == {}


def test_a_state_of_a_run_without_fit_is_compared_with_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stopped = START.replace(done=(0,), n_epoch=1)
        assert fit(replace(MINE, opt=adamw(lr=0.5)), stopped, 1, resume=True, lr=0.3).epoch == 0


# Runs that have diverged


def test_the_newest_checkpoint_that_is_not_finite_is_named_with_the_newest_that_is(
    tmp_path: Path,
) -> None:
    def diverge(state: State) -> State | None:
        nan = {name: value * torch.nan for name, value in state.params.items()}
        return state.replace(params=nan) if state.epoch == 1 else None

    fit(MINE, START, 4, [on("diverge", after_step=diverge), Checkpoint(tmp_path, keep=2)])
    good = checkpoints(tmp_path)[0]
    assert load(good).done == (1,)
    with pytest.warns(UserWarning, match=f"has params that are not finite.*finite is {good}"):
        fit(MINE, START, 4, resume=tmp_path)


def test_sgd_and_adamw_differ_in_what_load_compares(folder: Path) -> None:
    other = replace(MINE, model=net(), data=shuffled("Batches"), opt=sgd(0.1))
    with pytest.raises(ValueError, match="is of another model or optimizer"):
        fit(other, other.init(seed=4), 2, resume=folder)
    assert tiny().begun_with == {}
