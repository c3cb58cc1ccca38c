"""fit(..., resume=folder): where it goes on, what it refuses, and that it ends the same, bit for
bit.
"""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from functional_sgd import sgd
from loop import (
    CancelFit,
    Checkpoint,
    CSVLogger,
    Learner,
    State,
    StateFileError,
    fit,
    fit_one_cycle,
)
from loop.disk.files import DamagedStateError
from loop.disk.store import checkpoints
from tests.loop.callbacks.test_checkpoint import EPOCHS, MINE, START, same, written
from tests.loop.helpers import learner, net, on, shuffled


@pytest.fixture(scope="module")
def end() -> State:
    """Of the run that nothing interrupts."""
    return fit(MINE, START, EPOCHS)


def damage(path: Path) -> None:
    """Turn a bit."""
    file = path / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("there", [False, True])
def test_resume_with_nothing_to_resume_begins_anew(
    there: bool, as_text: bool, tmp_path: Path, end: State
) -> None:
    folder = tmp_path / "run"
    if there:
        folder.mkdir()
    found = fit(
        MINE, START, EPOCHS, [Checkpoint(folder)], resume=str(folder) if as_text else folder
    )
    assert same(found, end)
    assert written(folder) == [(1,), (2,)]


def test_resume_goes_on_with_every_checkpoint(tmp_path: Path, end: State) -> None:
    fit(MINE, START, EPOCHS, [Checkpoint(tmp_path / "all", batches=1, keep=99)])
    for path in checkpoints(tmp_path / "all"):
        folder = tmp_path / path.name
        folder.mkdir()
        path.rename(folder / path.name)
        assert same(fit(MINE, START, EPOCHS, resume=folder), end)


def test_a_run_that_is_complete_is_complete(tmp_path: Path, end: State) -> None:
    batches: list[int] = []
    for _ in range(3):
        watch = on("watch", after_batch=lambda state: batches.append(state.train_iter))
        assert same(fit(MINE, START, EPOCHS, [Checkpoint(tmp_path), watch], resume=tmp_path), end)
    assert len(batches) == 10  # of the first
    assert written(tmp_path) == [(1,), (2,)]


def test_what_the_command_says_again_is_not_done_again(tmp_path: Path) -> None:
    """The same command, with a new lr for the run, goes on with the run that has it already."""
    run = [Checkpoint(tmp_path, batches=1)]
    expected = fit(MINE, START, EPOCHS, lr=0.05)
    stopping = on(
        "stop",
        after_step=lambda state: (
            os.kill(os.getpid(), signal.SIGINT) if state.train_iter == 4 else None
        ),
    )
    with pytest.raises(KeyboardInterrupt):
        fit(MINE, START, EPOCHS, [*run, stopping], resume=tmp_path, lr=0.05)
    assert same(fit(MINE, START, EPOCHS, run, resume=tmp_path, lr=0.05), expected)


def test_a_run_that_ends_early_is_complete_too(tmp_path: Path) -> None:
    """Its last checkpoint is from right before the signal, so nothing is trained again."""

    def enough(state: State) -> None:
        if state.epoch == 1:
            raise CancelFit(state)

    batches: list[int] = []
    run = [
        on("enough", after_epoch=enough),
        on("watch", after_batch=lambda state: batches.append(state.iter)),
    ]
    expected = fit(MINE, START, 9, [*run, Checkpoint(tmp_path)])
    assert written(tmp_path) == [(1,), (1, 2)]
    batches.clear()
    assert same(fit(MINE, START, 9, [*run, Checkpoint(tmp_path)], resume=tmp_path), expected)
    assert batches == []


def test_one_cycle_is_resumed_in_the_middle(tmp_path: Path) -> None:
    def cycle(*callbacks: Any, **options: Any) -> State:
        return fit_one_cycle(MINE, START, EPOCHS, 0.05, callbacks=callbacks, **options)

    expected = cycle()
    bug = on("bug", after_step=lambda state: 1 / 0 if state.train_iter == 4 else None)
    with pytest.raises(ZeroDivisionError):
        cycle(Checkpoint(tmp_path, batches=2), bug)
    found = cycle(Checkpoint(tmp_path, batches=2), resume=tmp_path)
    assert same(found, expected)
    assert len(set(found.history.hypers["lr"])) == 6


def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path: Path, end: State) -> None:
    fit(MINE, START, EPOCHS, [Checkpoint(tmp_path, batches=1)])
    damage(checkpoints(tmp_path)[-1])
    with pytest.warns(UserWarning, match="skipped a checkpoint.*is damaged"):
        found = fit(MINE, START, EPOCHS, resume=tmp_path)
    assert same(found, end)


def test_a_run_does_not_begin_anew_where_every_checkpoint_is_damaged(tmp_path: Path) -> None:
    fit(MINE, START, EPOCHS, [Checkpoint(tmp_path, keep=1)])
    damage(checkpoints(tmp_path)[-1])
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(DamagedStateError, match="every checkpoint in"),
    ):
        fit(MINE, START, EPOCHS, resume=tmp_path)


@pytest.mark.parametrize(
    ("other", "leaf"),
    [
        (learner(), r"params\['0.weight'\] is not expected|params\['weight'\] is missing"),
        (learner(net(), shuffled("Batches"), opt=sgd(0.1, mom=0.9)), "opt_state"),
    ],
)
def test_the_checkpoint_of_another_learner_is_an_error_that_says_what_differs(
    other: Learner, leaf: str, tmp_path: Path
) -> None:
    fit(MINE, START, EPOCHS, [Checkpoint(tmp_path)])
    with pytest.raises(StateFileError, match=f"is of another model or optimizer: .*({leaf})"):
        fit(other, other.init(), EPOCHS, resume=tmp_path)


def test_the_checkpoint_of_a_longer_run_is_an_error_that_says_so(tmp_path: Path) -> None:
    fit(MINE, START, EPOCHS, [Checkpoint(tmp_path)])
    with pytest.raises(
        ValueError, match="in a run of 2 epochs, so it cannot be resumed as one of 3"
    ):
        fit(MINE, START, 3, resume=tmp_path)


def test_it_says_how_to_train_on_from_there(tmp_path: Path) -> None:
    fit(MINE, START, EPOCHS, [Checkpoint(tmp_path)])
    with pytest.raises(ValueError, match=r"fit\(learner, load_latest\(.*\), epochs=3\)"):
        fit(MINE, START, 3, resume=tmp_path)


def test_the_table_goes_on_with_the_checkpoint(tmp_path: Path) -> None:
    """The file had come further than the checkpoint; it ends as that of a run which nothing
    interrupts.
    """
    fit(MINE, START, EPOCHS, [CSVLogger(tmp_path / "expected.csv")])
    fit(
        MINE,
        START,
        EPOCHS,
        [CSVLogger(tmp_path / "table.csv"), Checkpoint(tmp_path / "run", batches=1, keep=99)],
    )
    for path in checkpoints(tmp_path / "run")[1:]:
        path.rename(tmp_path / path.name)
    fit(MINE, START, EPOCHS, [CSVLogger(tmp_path / "table.csv")], resume=tmp_path / "run")
    assert (tmp_path / "table.csv").read_text() == (tmp_path / "expected.csv").read_text()
