"""Full disks, disks that are only read, homes that are not there."""

import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loop import Checkpoint, SaveModel, State, fit, load, load_latest, load_params, save, save_in
from loop.disk.store import checkpoints
from tests.faults.places import limited, small_disk, times
from tests.loop.helpers import full, on
from tests.loop.saving import ROOT, identical, scratch_in, tiny

MINE = full()
START = MINE.init()
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def large(count: int) -> State:
    return tiny(count).replace(buffers={"b": torch.full((5_000,), float(count))})


ENOUGH = on("enough", after_loss=lambda state: 1 / 0 if state.train_iter == 2 else None)


def error_of(work: Callable[[], Any]) -> Any:
    """What a run ends with."""
    try:
        work()
    except (OSError, ZeroDivisionError) as error:
        return error
    return None


def test_a_save_that_fails_anywhere_leaves_what_was_there(tmp_path: Path) -> None:
    chance = random.Random(0)
    save_in(large(1), tmp_path)
    save(large(1), tmp_path / "state")
    for _ in range(times(40, 1000)):
        with limited(chance.randrange(20_000)):
            for attempt in (
                lambda: save_in(large(2), tmp_path),
                lambda: save(large(2), tmp_path / "state", overwrite=True),
            ):
                with pytest.raises(OSError, match="File too large") as caught:
                    attempt()
                assert caught.value.filename
    assert identical(load_latest(tmp_path), large(1))
    assert identical(load(tmp_path / "state"), large(1))
    assert scratch_in(tmp_path) == []


def test_a_run_whose_disk_fills_can_be_gone_on_with(tmp_path: Path) -> None:
    """It ends with the error, which has the state; the checkpoint before is whole."""
    chance = random.Random(1)
    end = fit(MINE, START, 3)
    for number in range(times(8, 100)):
        folder = tmp_path / str(number)
        keep = Checkpoint(folder, batches=1, epochs=None)
        error_of(lambda keep=keep: fit(MINE, START, 3, [keep, ENOUGH]))  # type: ignore[misc]
        with limited(chance.randrange(600, 4_000)):
            error = error_of(lambda keep=keep: fit(MINE, START, 3, [keep], resume=keep.folder))  # type: ignore[misc]
        if error is not None:
            assert identical(vars(fit(MINE, error.state, 3, resume=True)), vars(end))
        assert identical(vars(fit(MINE, START, 3, resume=folder)), vars(end))


def test_the_best_weights_stay_where_the_disk_is_full(tmp_path: Path) -> None:
    path = tmp_path / "best"
    first = fit(MINE, START, 1, [SaveModel(path)])
    with limited(500), pytest.raises(OSError, match="File too large"):
        fit(MINE, START, 2, [SaveModel(path)])
    assert identical(load_params(path, START).params, first.params)
    assert scratch_in(tmp_path) == []


@pytest.mark.parametrize("options", ["size=64k", "size=10m,nr_inodes=9"])
def test_a_disk_that_is_full(tmp_path: Path, options: str) -> None:
    """Of bytes, or of inodes: the error says so, with the path; what was whole stays."""
    with small_disk(tmp_path / "disk", options) as disk:

        def save_all() -> None:
            for count in range(1, 9):
                save_in(large(count), disk / "run", keep=9)

        with pytest.raises(OSError, match="No space left on device") as caught:
            save_all()
        assert str(disk) in str(caught.value)
        assert len(checkpoints(disk / "run")) >= 1
        assert identical(load_latest(disk / "run"), large(len(checkpoints(disk / "run"))))
        assert scratch_in(disk / "run") == []


def test_a_disk_that_is_only_read_is_an_error_before_the_run_and_can_be_loaded_from(
    tmp_path: Path,
) -> None:
    with small_disk(tmp_path / "disk", "size=1m") as disk:
        end = fit(MINE, START, 1, [Checkpoint(disk / "run")])
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(OSError, match="Read-only file system"):
            fit(MINE, START, 2, [Checkpoint(disk / "other")])
        assert identical(vars(fit(MINE, START, 1, resume=disk / "run")), vars(end))


FUSE = """
import sys, warnings, os
import torch
from functional_sgd import adamw, fuse
{before}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    params = dict(w=torch.ones(3))
    for opt in (fuse(adamw(lr=.1)), fuse(adamw(lr=.2))):
        opt(params, params, opt.init(params))
print(opt.working()[0].name == "C", [str(warning.message)[:300] for warning in caught])
"""


def fused(before: str, **environment: str) -> str:
    """Whether kernels run, and the warnings, in a process in these surroundings."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG")}
    command = [sys.executable, "-c", FUSE.format(before=before)]
    found = subprocess.run(
        command, env={**kept, **environment}, cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


@AS_ROOT
def test_a_user_without_a_home() -> None:
    """A container's: a uid that nobody has written down, and no HOME."""
    found = fused("os.setuid(54321)", TMPDIR="/tmp")
    assert re.match(r"True \[.fuse: compiled code is not kept: ", found)
    assert found.count("not kept") == 1


@AS_ROOT
def test_a_user_without_a_home_who_says_where() -> None:
    where = "/tmp/functional_sgd-test-54321"
    made = f"os.setuid(54321); os.makedirs({where!r}, mode=0o700, exist_ok=True)"
    try:
        assert fused(made, FUNCTIONAL_SGD_CACHE=where).strip() == "True []"
    finally:
        subprocess.run(["rm", "-r", where], check=True)


def test_a_home_that_is_only_read(tmp_path: Path) -> None:
    with small_disk(tmp_path / "home", "size=1m,ro") as home:
        found = fused("", HOME=str(home), TMPDIR=str(tmp_path))
    assert re.match(r"True \[.fuse: compiled code is not kept: ", found)
    assert "Read-only file system" in found


@pytest.mark.parametrize("options", ["size=12k", "size=1m,nr_inodes=3"])
def test_a_home_that_is_full(tmp_path: Path, options: str) -> None:
    with small_disk(tmp_path / "home", options) as home:
        found = fused("", HOME=str(home), TMPDIR=str(tmp_path))
    assert found.count("fuse: ") == 1


def test_where_there_is_no_room_at_all(tmp_path: Path) -> None:
    with small_disk(tmp_path / "home", "size=1m,ro") as home:
        before = f"import tempfile; tempfile.tempdir = {str(home)!r}"
        found = fused(before, HOME=str(home))
    assert re.match(r"False \[.fuse: there is no place for compiled code: ", found)
    assert found.count("foreach") == 1
