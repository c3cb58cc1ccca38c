"""Directories that appear whole: replaced, kept by the newest few, killed at any moment, shared by
processes.
"""

import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from loop import load, load_latest, load_params, save, save_in
from loop.disk.atomic import _host, _scratch_name, aside, locked, scratch
from loop.disk.store import checkpoints
from tests.loop.helpers import learner
from tests.loop.saving import identical, in_process, tiny


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Replacing


def test_what_is_there_is_replaced_only_if_asked(tmp_path: Path) -> None:
    path = save(tiny(1), tmp_path / "a")
    with pytest.raises(
        FileExistsError, match=f"there is something at {path} already.*pass overwrite=True"
    ):
        save(tiny(2), path)
    assert load(path).train_iter == 1
    assert load(save(tiny(2), path, overwrite=True)).train_iter == 2
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", ["file", "folder with other files", "state with another file"])
def test_what_is_no_state_is_never_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "precious"
    if kind == "file":
        path.touch()
    elif kind == "folder with other files":
        path.mkdir()
        (path / "thesis.tex").touch()
    else:
        (save(tiny(1), path) / "thesis.tex").touch()
    with pytest.raises(
        FileExistsError, match="precious that is no state, expected nothing or a saved state"
    ):
        save(tiny(2), path, overwrite=True)
    assert path.is_file() or (path / "thesis.tex").exists()


def test_a_state_in_pieces_is_one_that_is_replaced(tmp_path: Path) -> None:
    path = save(tiny(1), tmp_path / "a")
    (path / "pieces-00003.safetensors").touch()
    assert load(save(tiny(2), path, overwrite=True)).train_iter == 2
    assert names(path) == ["SHA256SUMS", "state.json", "tensors.safetensors"]


def test_a_replacement_that_was_cut_off_is_undone(tmp_path: Path) -> None:
    """Killed between the two renames: the old state is loaded, not overwritten unasked, and
    replaced in the end.
    """
    path = save(tiny(1), tmp_path / "a")
    path.rename(aside(path))
    assert load(path).train_iter == 1
    with pytest.raises(FileExistsError):
        save(tiny(2), path)
    save(tiny(2), path, overwrite=True)
    assert load(path).train_iter == 2
    assert names(tmp_path) == ["a"]


def test_a_replacement_that_was_cut_off_at_its_end_is_finished(tmp_path: Path) -> None:
    path = save(tiny(2), tmp_path / "a")
    save(tiny(1), aside(path))
    assert load(path).train_iter == 2
    save(tiny(3), path, overwrite=True)
    assert load(path).train_iter == 3
    assert names(tmp_path) == ["a"]


def test_a_state_that_is_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import loop.disk.reading

    path, read_sums, calls = save(tiny(1), tmp_path / "a"), loop.disk.reading._read_sums, []

    def slow(file: Path) -> dict[str, str]:
        sums = read_sums(file)
        if not calls:
            save(tiny(2), path, overwrite=True)
        calls.append(file)
        return sums

    monkeypatch.setattr(loop.disk.reading, "_read_sums", slow)
    assert load(path).train_iter == 2
    assert len(calls) == 2


def test_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none is not there: expected a directory"):
        load(tmp_path / "none")


# The newest few


def test_the_newest_are_kept(tmp_path: Path) -> None:
    paths = [save_in(tiny(count), tmp_path / "run", keep=2) for count in (10, 20, 30)]
    assert paths == [
        tmp_path / "run" / f"{count:06d}-train_iter-{count:07d}0" for count in (1, 2, 3)
    ]
    assert checkpoints(tmp_path / "run") == paths[1:]
    assert identical(load_latest(tmp_path / "run"), tiny(30))


def test_newest_means_last_saved(tmp_path: Path) -> None:
    """Not furthest trained: one may go back to an earlier state, or begin anew."""
    for count in (500, 500, 7, 7):
        path = save_in(tiny(count), tmp_path, keep=3)
        assert checkpoints(tmp_path)[-1] == path
    assert [load(path).train_iter for path in checkpoints(tmp_path)] == [500, 7, 7]
    assert load_latest(tmp_path).train_iter == 7


def test_one_is_kept_at_least(tmp_path: Path) -> None:
    save_in(tiny(1), tmp_path, keep=1)
    with pytest.raises(ValueError, match="save_in: keep must be at least 1, got 0"):
        save_in(tiny(2), tmp_path, keep=0)
    assert load(save_in(tiny(2), tmp_path, keep=1)).train_iter == 2
    assert len(checkpoints(tmp_path)) == 1


def test_numbers_of_more_digits_come_later(tmp_path: Path) -> None:
    (tmp_path / "999999-train_iter-00000001").mkdir()
    assert save_in(tiny(2), tmp_path).name == "1000000-train_iter-00000002"
    assert load_latest(tmp_path).train_iter == 2


def test_other_things_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "log.csv").touch()
    save(tiny(9), tmp_path / "best")
    for count in (1, 2):
        save_in(tiny(count), tmp_path, keep=1)
    assert names(tmp_path) == ["000002-train_iter-00000002", "best", "log.csv"]


def test_no_checkpoint(tmp_path: Path) -> None:
    save(tiny(), tmp_path / "best")
    for folder in (tmp_path, tmp_path / "none"):
        assert checkpoints(folder) == []
        with pytest.raises(FileNotFoundError, match="load_latest: there is no checkpoint in"):
            load_latest(folder)


def test_the_checkpoint_is_loaded_like_another_state(tmp_path: Path) -> None:
    save_in(tiny(1), tmp_path)
    like = tiny().replace(params={"w": torch.zeros(3, device="meta")})
    assert load_latest(tmp_path, like).params["w"].device.type == "meta"


# What dead processes have left


def test_what_dead_processes_have_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    mine = _scratch_name()
    host, pid, process = _host(), str(os.getpid()), mine.split("-")[-2]
    day_old, new = f".saving-{host}2-1-00000000-00000000", f".saving-{host}2-1-00000000-00000001"
    dead = [
        f".saving-{host}-{2**22 + 1}-{process}-00000000",
        mine.replace(process, "00000000"),
        day_old,
    ]
    alive = [
        mine,
        mine.replace(pid, "1").replace(process, "00000000"),
        new,
        ".saving-something-else",
        ".savings",
    ]
    for name in (*dead, *alive):
        shutil.copytree(save(tiny(), tmp_path / "deep" / name), tmp_path / name)
    before = time.time() - 86_500
    os.utime(tmp_path / day_old, (before, before))
    save(tiny(), tmp_path / "a")
    assert set(names(tmp_path)) == {*alive, "a", "deep"}


# Killed


@pytest.fixture(scope="module")
def crashes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = in_process("crashes", tmp_path_factory.mktemp("crashes"))
    return found


def test_the_newest_committed_checkpoint_survives_a_kill_at_any_moment(
    crashes: dict[str, Any],
) -> None:
    """50 processes that save in a loop, each killed at a random moment; the last save of all cleans
    up.
    """
    found = crashes["killed_anywhere"]
    assert (found["lost"], found["left over"], found["kept"]) == ([], [], 2)
    assert found["killed within a save"] > 0


def test_a_kill_before_any_line_leaves_the_old_or_the_new_state(crashes: dict[str, Any]) -> None:
    found = crashes["killed_at_every_line"]
    assert found["found"] == sorted(found["found"])
    assert found["found"].count(1) > 50
    assert found["found"].count(2) > 5
    assert found["left over"] == []


def test_two_processes_save_into_one_folder_while_a_third_loads(crashes: dict[str, Any]) -> None:
    found = crashes["rivals"]
    assert (found["wrong"], found["codes"]) == ([], [0, 0])
    assert [int(name[:6]) for name in found["names"]] == [49, 50, 51]
    assert found["reads"] > 0


# Names that are not what they seem


def test_a_file_with_the_name_of_a_checkpoint_is_none(tmp_path: Path) -> None:
    path = save_in(tiny(1), tmp_path)
    (tmp_path / "000009-train_iter-00000009").touch()
    (tmp_path / "000008-train_iter-00000008").symlink_to(tmp_path / "none")
    assert checkpoints(tmp_path) == [path]
    assert load_latest(tmp_path).train_iter == 1


def test_a_state_is_loaded_from_the_directory_one_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(save(tiny(1), tmp_path / "a"))
    assert load(".").train_iter == 1
    with pytest.raises(FileExistsError, match=r"there is something at \. already"):
        save(tiny(2), ".")


def test_processes_of_another_namespace_are_not_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers may share the name of their host, but count their processes apart."""
    with scratch(tmp_path) as mine, monkeypatch.context() as elsewhere:
        elsewhere.setattr("loop.disk.atomic._host", lambda: f"{platform.node()}-1")
        elsewhere.setattr("loop.disk.atomic._is_alive", lambda pid: False)
        elsewhere.setattr("loop.disk.atomic._PROCESS", "00000000")
        with scratch(tmp_path):
            assert mine.is_dir()


def test_a_place_is_looked_at_under_the_lock_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it, what another process moves aside for a moment was taken for something that is no
    state.
    """
    held, seen = [False], []

    @contextmanager
    def watched(folder: Path) -> Iterator[None]:
        with locked(folder):
            held[0] = True
            yield
            held[0] = False

    monkeypatch.setattr("loop.disk.store.locked", watched)
    monkeypatch.setattr(
        "loop.disk.store._check_place", lambda path, overwrite: seen.append(held[0])
    )
    save(tiny(1), tmp_path / "a", overwrite=True)
    assert seen == [True, True]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load(learner(), "a"), r"load: .*got Learner\. Call load\(path, like="),  # type: ignore[arg-type]
        (lambda: save("a", tiny(1)), r"save: .*got State\. Call save\(state, path\)"),  # type: ignore[arg-type]
        (lambda: load_latest(tiny(1)), r"load_latest: .*got State\. Call load_latest"),  # type: ignore[arg-type]
        (lambda: load_params(tiny(1), "a"), r"load_params: .*got State\. Call load_params\(path"),  # type: ignore[arg-type]
    ],
)
def test_arguments_in_the_wrong_order(call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()
