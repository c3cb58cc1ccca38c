"""Saved states that somebody has made up: what is read is bounded by what is there, and typed."""

import os
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from loop import StateFileError, load, load_latest, save, save_in
from loop.disk import files, reading
from loop.disk.store import DamagedStateError
from tests.loop.disk.test_store_damage import FILES, STATE, Document, rewritten
from tests.loop.saving import identical, tiny


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save(STATE, tmp_path / "a")


def fields(**values: Any) -> Callable[[Document], None]:
    return lambda document: document["fields"].update(values)


TYPES: dict[str, tuple[Callable[[Document], None], str]] = {
    "seed": (fields(seed="0"), "seed is of type str, expected int"),
    "a bool is no number": (fields(epoch=True), "epoch is of type bool, expected int"),
    "params": (fields(params=[1]), "params is of type list, expected dict"),
    "a param": (
        fields(params={"dict": [["w", 3]]}),
        r"params\['w'\] is of type int, expected Tensor",
    ),
    "a key": (fields(buffers={"dict": [[1, 2]]}), "a key of buffers is of type int, expected str"),
    "history": (fields(history=None), "history is of type NoneType, expected History"),
    "done": (fields(done={"tuple": [0, "x"]}), r"done\[1\] is of type str, expected int"),
    "position": (fields(position={"tuple": [0]}), r"position has 1 entries, expected tuple\[int"),
    "n_iter": (fields(n_iter=[]), r"n_iter is of type list, expected int \| None"),
    "hyper": (fields(hyper="lr"), "hyper is of type str, expected .*Mapping"),
    "stopped": (fields(stopped=9), "stopped is of type int, expected str"),
    "losses": (
        fields(
            history={"object": ["History", "loop.history", dict(losses=[], hypers={"dict": []},
                                                               rows={"tuple": []})]}
        ),
        r"history\.losses is of type list, expected Log",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TYPES)
def test_fields_of_another_type(path: Path, kind: str) -> None:
    change, message = TYPES[kind]
    with pytest.raises(StateFileError, match=f"state.json: {message}"):
        load(rewritten(path, change))


@pytest.mark.parametrize("name", [name for name in files.saved_fields() if name != "pct_train"])
def test_every_field_has_a_type_that_is_checked(path: Path, name: str) -> None:
    with pytest.raises(StateFileError, match=f"state.json: {name} is of type float"):
        load(rewritten(path, fields(**{name: 0.5})))


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_is_not_waited_for(path: Path, name: str) -> None:
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(DamagedStateError, match=f"{name} .*is no regular file"):
        load(path)


def test_a_device_is_not_read_for_ever(path: Path) -> None:
    (path / "SHA256SUMS").unlink()
    (path / "SHA256SUMS").symlink_to("/dev/zero")
    with pytest.raises(DamagedStateError, match="is no regular file"):
        load(path)


def test_a_checkpoint_of_pipes_is_skipped(tmp_path: Path) -> None:
    save_in(tiny(1), tmp_path)
    newest = save_in(tiny(2), tmp_path)
    for name in FILES:
        (newest / name).unlink()
        os.mkfifo(newest / name)
    with pytest.warns(UserWarning, match="is no regular file"):
        assert identical(load_latest(tmp_path), tiny(1))


def test_a_list_of_sums_that_goes_on_and_on_is_not_read(path: Path) -> None:
    with (path / "SHA256SUMS").open("ab") as file:
        file.truncate(10**12)  # takes no room
    with pytest.raises(DamagedStateError, match="SHA256SUMS has more than 8,388,608 bytes"):
        load(path)


def test_text_that_is_too_long_is_neither_written_nor_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LARGEST", 100)
    with pytest.raises(ValueError, match=r"save: state.json would have .* less than 100\. Keep"):
        save(STATE, path, overwrite=True)
    monkeypatch.setattr(reading, "LARGEST", 100)
    with pytest.raises(DamagedStateError, match="state.json has more than 100 bytes"):
        load(path)


BOMBS = {
    "a tensor of 10**9 rows of nothing": (torch.ones(10**9, 0), {"log": [{"scalars": "bomb"}]}),
    "a tensor used 1000 times": (
        torch.ones(10**6, dtype=torch.bool),
        {"log": [{"scalars": "bomb"}] * 1000},
    ),
    "a million items of one byte": (
        torch.ones(3 * 10**6, dtype=torch.bool),
        {"log": [{"scalars": "bomb"}]},
    ),
    "a tree of many columns": (
        torch.ones(10**6, dtype=torch.float64),
        {"log": [{"trees": [list(range(1000)), ["bomb"] * 1000]}]},
    ),
}


def craft(path: Path, bomb: torch.Tensor, node: Any) -> Path:
    """Put a tensor into a saved state, and a node that stands for it into its memory."""
    stored = safetensors.torch.load_file(path / FILES[2])
    safetensors.torch.save_file({**stored, "bomb": bomb}, path / FILES[2])

    def change(document: Document) -> None:
        entry = {
            "dtype": str(bomb.dtype).removeprefix("torch."),
            "shape": list(bomb.shape),
            "device": "cpu",
            "sha256": files.digest_of(bomb),
        }
        document["tensors"]["bomb"] = entry
        document["fields"]["memory"] = {"dict": [["bomb", node]]}

    return rewritten(path, change)


@pytest.mark.parametrize("kind", BOMBS)
def test_little_text_does_not_become_much_memory(path: Path, kind: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    crafted = craft(path, *BOMBS[kind])
    with suppress(StateFileError):  # refused, or loaded: both will do
        load(crafted)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000  # kilobytes


def test_nothing_in_a_state_is_imported(path: Path) -> None:
    rewritten(path, fields(memory={"object": ["system", "antigravity", {"command": "echo"}]}))
    with pytest.raises(StateFileError, match="class system that is not known here"):
        load(path)
    assert "antigravity" not in sys.modules
