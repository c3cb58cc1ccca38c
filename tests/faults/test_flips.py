"""Flips and truncations of every file that is written: found, named, never used."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from functional_sgd import adamw, fuse
from functional_sgd.fusion.backends.c import compiler
from loop import Checkpoint, SaveModel, fit, load, load_latest, load_params
from loop.disk.files import DamagedStateError
from loop.disk.store import checkpoints
from tests.faults.places import LONG, times
from tests.loop.helpers import full
from tests.loop.saving import identical

MINE = full()
START = MINE.init()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every file of a run: two checkpoints, the best weights, kernels."""
    folder = tmp_path_factory.mktemp("run")
    fit(MINE, START, 2, [Checkpoint(folder / "run"), SaveModel(folder / "best")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUNCTIONAL_SGD_CACHE", str(folder / "cache"))
        compiler.function_of.cache_clear()
        step()
        compiler.function_of.cache_clear()
    return folder


def step() -> list[float]:
    params = {"w": torch.ones(3)}
    opt = fuse(adamw(lr=0.1))
    found: list[float] = opt(params, params, opt.init(params))[0]["w"].tolist()
    return found


def damages(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Flipped bits and truncations, some of them or all."""
    chance = random.Random(len(content))
    places = range(len(content)) if LONG else sorted(chance.sample(range(len(content)), 60))
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << chance.randrange(8)
        yield f"byte {place} flipped", bytes(damaged)
    for length in {0, 1, *(chance.randrange(len(content)) for _ in range(times(20, 500)))}:
        yield f"cut to {length}", content[:length]
    yield "longer", content + b"\0"


def check_all(file: Path, fails: Callable[[], bool]) -> None:
    """Every damage of a file must be found."""
    content = file.read_bytes()
    missed = []
    for what, damaged in damages(content):
        file.write_bytes(damaged)
        if not fails():
            missed.append(what)
    file.write_bytes(content)
    assert missed == []
    assert not fails()


@pytest.mark.parametrize("name", ["SHA256SUMS", "state.json", "tensors.safetensors"])
def test_every_damage_of_a_checkpoint_is_found(run: Path, name: str) -> None:
    path = checkpoints(run / "run")[-1]

    def fails() -> bool:
        try:
            load(path)
        except DamagedStateError as error:
            return str(path) in str(error)
        return False

    check_all(path / name, fails)


def test_every_damage_of_the_best_weights_is_found(run: Path) -> None:
    def fails() -> bool:
        try:
            load_params(run / "best", START)
        except ValueError as error:
            return str(run / "best") in str(error)
        return False

    check_all(run / "best", fails)


@pytest.mark.parametrize("ending", [".so", ".sha256"])
def test_every_damage_of_a_kernel_is_found(run: Path, ending: str) -> None:
    library = max((run / "cache").glob("*.so"))

    def fails() -> bool:
        return not compiler._intact(library, library.with_suffix(".sha256"))

    check_all(library.with_suffix(ending), fails)


def test_a_run_goes_on_from_the_checkpoint_before_the_damaged_one(
    run: Path, tmp_path: Path
) -> None:
    fit(MINE, START, 2, [Checkpoint(tmp_path)])
    file = checkpoints(tmp_path)[-1] / "tensors.safetensors"
    for what, damaged in list(damages(file.read_bytes()))[:: times(20, 5)]:
        file.write_bytes(damaged)
        with pytest.warns(UserWarning, match="skipped a checkpoint"):
            end = fit(MINE, START, 2, resume=tmp_path)
        assert identical(vars(end), vars(fit(MINE, START, 2))), what


def test_all_checkpoints_are_whole_in_the_end(run: Path) -> None:
    assert load_latest(run / "run").done == (2,)
