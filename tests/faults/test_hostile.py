"""Cache and checkpoint folders in which something else lies where our files belong."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from functional_sgd import adamw, fuse
from functional_sgd.fusion.backends.c import cache, compiler
from loop import Checkpoint, fit, load_latest, save_in
from loop.disk.store import checkpoints
from tests.faults.places import times
from tests.loop.helpers import full
from tests.loop.saving import identical, tiny

PARAMS = {"w": torch.ones(3)}


def step() -> list[float]:
    compiler.function_of.cache_clear()
    opt = fuse(adamw(lr=0.1))
    found: list[float] = opt(PARAMS, PARAMS, opt.init(PARAMS))[0]["w"].tolist()
    assert opt.working()[0].name == "C"
    return found


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_link_into_the_void(path: Path) -> None:
    path.symlink_to("nowhere")


def a_link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def a_folder_with_something_in_it(path: Path) -> None:
    (path / "a").mkdir(parents=True)


def a_file_that_is_not_text(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 9)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


THINGS = [
    a_pipe,
    a_link_into_the_void,
    a_link_to_itself,
    a_folder_with_something_in_it,
    a_file_that_is_not_text,
    a_device,
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUNCTIONAL_SGD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(compiler, "_failed", {})
    monkeypatch.setattr(cache, "_warned", set())
    monkeypatch.setattr(cache, "_temporary", None)
    return tmp_path / "cache"


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("ending", [".so", ".sha256"])
@pytest.mark.filterwarnings("ignore:fuse. compiled code is not kept")
def test_a_cache_with_something_else_in_it(
    place: Path, tmp_path: Path, thing: Callable[[Path], None], ending: str
) -> None:
    expected = step()
    shutil.move(place, tmp_path / "made")  # what this process has loaded stays as it is
    place.mkdir(mode=0o700)
    for path in (tmp_path / "made").iterdir():
        if path.suffix == ending:
            thing(place / path.name)
        else:
            shutil.copy(path, place / path.name)
    assert step() == expected


@pytest.mark.parametrize("thing", THINGS)
def test_a_folder_of_checkpoints_with_something_else_in_it(
    tmp_path: Path, thing: Callable[[Path], None]
) -> None:
    save_in(tiny(1), tmp_path)
    thing(tmp_path / "000009-train_iter-00000009")
    thing(tmp_path / ".saving-x")
    thing(tmp_path / "else")
    if thing is a_folder_with_something_in_it:
        with pytest.warns(UserWarning, match="skipped a checkpoint"):
            found = load_latest(tmp_path)
    else:
        found = load_latest(tmp_path)
    assert identical(found, tiny(1))
    save_in(tiny(2), tmp_path)
    assert identical(load_latest(tmp_path), tiny(2))


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("name", ["SHA256SUMS", "state.json", "tensors.safetensors"])
def test_a_checkpoint_with_something_else_in_it_is_skipped(
    tmp_path: Path, thing: Callable[[Path], None], name: str
) -> None:
    save_in(tiny(1), tmp_path)
    newest = save_in(tiny(2), tmp_path)
    (newest / name).unlink()
    thing(newest / name)
    with pytest.warns(UserWarning, match="skipped a checkpoint"):
        assert identical(load_latest(tmp_path), tiny(1))


def test_what_is_missing_from_a_folder_of_checkpoints_is_never_an_end(tmp_path: Path) -> None:
    """Files and folders vanish at random; a run goes on from what is left, or begins anew."""
    chance, mine = random.Random(0), full()
    start = mine.init()
    end = fit(mine, start, 2)
    for number in range(times(10, 200)):
        folder = tmp_path / str(number)
        fit(mine, start, 2, [Checkpoint(folder, batches=1)])
        for path in checkpoints(folder)[1:]:
            gone = chance.choice([path, *path.iterdir()])
            shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *_, **__: None)
            found = fit(mine, start, 2, resume=folder)
        assert identical(vars(found), vars(end))
