"""Damage of every kind is found, and said: which file, which leaf, what was expected, what is
there.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loop import State, StateFileError, load, load_latest, save, save_in
from loop.disk.store import DamagedStateError, checkpoints
from tests.loop.saving import identical, tiny

FILES = ("SHA256SUMS", "state.json", "tensors.safetensors")

STATE = State(
    {"w": torch.arange(4.0)},
    {"b": torch.tensor([5 + 6j])},
    {"step": torch.tensor(3)},
    {"lr": 0.1},
    memory={"note": "x"},
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save(STATE, tmp_path / "a")


def fails(path: Path) -> str:
    with pytest.raises(DamagedStateError) as caught:
        load(path)
    return str(caught.value)


def flip(file: Path, position: int, bit: int = 1) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= bit
    file.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found(path: Path, name: str) -> None:
    """One bit of every byte (of every third of the long file), another each time; the message names
    the file.
    """
    file, content = path / name, (path / name).read_bytes()
    for position in range(0, len(content), 3 if name == "state.json" else 1):
        flip(file, position, 1 << position % 8)
        assert str(file) in fails(path), position
        file.write_bytes(content)
    assert identical(load(path), STATE)


@pytest.mark.parametrize("name", FILES)
def test_every_truncated_file_is_found(path: Path, name: str) -> None:
    file, content = path / name, (path / name).read_bytes()
    for length in range(0, len(content), 7):
        file.write_bytes(content[:length])
        assert str(file) in fails(path), length


@pytest.mark.parametrize("name", FILES)
def test_a_longer_file_is_found(path: Path, name: str) -> None:
    with (path / name).open("ab") as file:
        file.write(b"\n")
    assert str(path / name) in fails(path)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(path: Path, name: str) -> None:
    (path / name).unlink()
    assert (
        f"{path} is damaged: there is no {name} in it, expected SHA256SUMS, state.json, tensors.saf"
        in fails(path)
    )


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read(path: Path, name: str) -> None:
    (path / name).unlink()
    (path / name).mkdir()
    assert f"{path / name} is damaged: it cannot be read: " in fails(path)


@pytest.mark.parametrize(
    ("tensor", "leaf"),
    [
        (STATE.params["w"], "params['w']"),
        (STATE.buffers["b"], "buffers['b']"),
        (STATE.opt_state["step"], "opt_state['step']"),
    ],
    ids=["params", "buffers", "opt_state"],
)
def test_the_damaged_leaf_is_named(path: Path, tensor: torch.Tensor, leaf: str) -> None:
    """With the digest that was expected, and the one of what is there; and with what to do."""
    content = bytearray((path / FILES[2]).read_bytes())
    raw = (
        torch.view_as_real(tensor).numpy().tobytes()
        if tensor.is_complex()
        else tensor.numpy().tobytes()
    )
    content[content.rindex(raw) + len(raw) - 1] ^= 64
    (path / FILES[2]).write_bytes(content)
    message = fails(path)
    damaged = raw[:-1] + bytes([raw[-1] ^ 64])
    found, expected = (hashlib.sha256(part).hexdigest() for part in (damaged, raw))
    assert (
        f"{path / FILES[2]} is damaged: {leaf} has the SHA-256 {found}, expected {expected}. Load "
        f"another" in message
    )


def test_a_length_that_does_not_fit_is_said(path: Path) -> None:
    os.truncate(path / FILES[2], 300)
    assert f"{path / FILES[2]} is damaged: its 300 bytes and its header do not fit: " in fails(path)


def test_files_of_two_states_do_not_mix(path: Path, tmp_path: Path) -> None:
    other = save(STATE.replace(params={"w": torch.ones(4)}), tmp_path / "b")
    for name in FILES:
        mixed = shutil.copytree(path, tmp_path / f"mixed {name}")
        shutil.copy(other / name, mixed / name)
        assert str(mixed / name) in fails(mixed)


# Files that are whole, but not ours


Document = dict[str, Any]


def with_text(path: Path, text: str) -> Path:
    """The directory, with another state.json, and checksums that fit."""
    (path / "state.json").write_text(text)
    digests = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in FILES[1:]}
    (path / "SHA256SUMS").write_text(
        "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    )
    return path


def rewritten(path: Path, change: Callable[[Document], Any]) -> Path:
    """The directory, with state.json changed, and checksums that fit."""
    document = json.loads((path / "state.json").read_text())
    change(document)
    return with_text(path, json.dumps(document))


GONE = {"object": ["Gone", "my.callbacks", {}]}

FOREIGN: dict[str, tuple[Callable[[Document], Any], str]] = {
    "version": (
        lambda document: document.update(version=3, library="functional-sgd 9.9"),
        r"has version 3 of the format, written by functional-sgd 9\.9; "
        "expected version 2, as read by functional-sgd ",
    ),
    "format": (
        lambda document: document.update(format="other"),
        "does not hold a state: expected the format 'loop.State' in it. Check the path",
    ),
    "field": (
        lambda document: document["fields"].pop("seed"),
        "written by functional-sgd .*, has the fields params, .*; expected params, .*seed",
    ),
    "new field": (
        lambda document: document["fields"].update(new=1),
        "has the fields .*new; expected params",
    ),
    "class": (
        lambda document: document["fields"].update(memory=GONE),
        r"state.json: it holds an object of a class Gone that is not known here. "
        r"Import my\.callbacks",
    ),
    "node": (
        lambda document: document["fields"].update(memory={"pickle": ""}),
        "state.json: expected one of the tags .* got pickle",
    ),
    "lost leaf": (
        lambda document: document["tensors"].pop("params['w']"),
        r"tensors.safetensors is damaged: params\['w'\] is not in state.json",
    ),
    "more leaves": (
        lambda document: document["tensors"].update(extra=document["tensors"]["params['w']"]),
        "tensors.safetensors is damaged: extra is missing",
    ),
    "shape": (
        lambda document: document["tensors"]["params['w']"].update(shape=[2, 2]),
        r"expected params\['w'\] to be float32\[2, 2\], got float32\[4\]",
    ),
    "no leaves": (
        lambda document: document.pop("tensors"),
        "state.json has no tensors in it, or of another type",
    ),
    "no fields": (
        lambda document: document.update(fields=3),
        "state.json has no fields in it, or of another type",
    ),
    "no device": (
        lambda document: document.pop("device"),
        "state.json has no device in it, or of another type",
    ),
    "dtype": (
        lambda document: document["tensors"]["params['w']"].update(dtype="float4"),
        r"state.json does not describe params\['w'\]: expected .*, "
        r"the dtype one of bool, .*'float4'",
    ),
    "no digest": (
        lambda document: document["tensors"]["params['w']"].pop("sha256"),
        r"state.json does not describe params\['w'\]: expected .*sha256",
    ),
    "no dtype": (
        lambda document: document["fields"].update(hyper={"dtype": "load"}),
        "state.json: there is no dtype load",
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_files_that_are_whole_but_not_ours(path: Path, kind: str) -> None:
    change, message = FOREIGN[kind]
    with pytest.raises(StateFileError, match=message) as caught:
        load(rewritten(path, change))
    assert str(path) in str(caught.value)


def test_a_rewritten_file_that_says_the_same_is_taken(path: Path) -> None:
    assert identical(load(rewritten(path, lambda document: None)), STATE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON: .* Was it written by save?"),
        ("[1]", "does not hold a state"),
        ("[" * 200_000, "is not JSON: maximum recursion depth exceeded"),
    ],
)
def test_text_that_says_nothing(path: Path, text: str, message: str) -> None:
    with pytest.raises(StateFileError, match=f"state.json {message}"):
        load(with_text(path, text))


# The newest that is whole


def test_damaged_checkpoints_are_skipped_with_a_warning(tmp_path: Path) -> None:
    paths = [save_in(tiny(count), tmp_path) for count in (1, 2, 3)]
    flip(paths[2] / FILES[2], -1)
    (paths[1] / FILES[1]).unlink()
    with pytest.warns(UserWarning, match="load_latest: skipped a checkpoint") as caught:
        assert load_latest(tmp_path).train_iter == 1
    newest, middle = (str(warning.message) for warning in caught)
    assert newest.startswith(
        f"load_latest: skipped a checkpoint. load: {paths[2] / FILES[2]} is damaged: params['w'] "
        f"has"
    )
    assert f"{paths[1]} is damaged: there is no state.json in it" in middle
    assert {warning.filename for warning in caught} == {__file__}


def test_if_all_are_damaged_that_is_an_error(tmp_path: Path) -> None:
    (save_in(tiny(1), tmp_path) / FILES[0]).unlink()
    with (
        pytest.warns(UserWarning, match="SHA256SUMS"),
        pytest.raises(DamagedStateError, match="every checkpoint in"),
    ):
        load_latest(tmp_path)


def test_the_checkpoint_of_another_model_or_version_is_not_skipped(tmp_path: Path) -> None:
    save_in(tiny(1), tmp_path)
    save_in(tiny(2).replace(params={"v": torch.ones(3)}), tmp_path)
    with pytest.raises(
        StateFileError, match=r"another model or optimizer: params\['w'\] is missing"
    ):
        load_latest(tmp_path, tiny())
    rewritten(checkpoints(tmp_path)[-1], lambda document: document.update(version=1))
    with pytest.raises(StateFileError, match="has version 1 of the format"):
        load_latest(tmp_path)
