"""SaveModel's file: every flip in it is found, and files of other tools are read."""

import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from loop.disk.files import DamagedStateError
from loop.disk.weights import read_tensors, write_tensors
from tests.comparing import assert_same

TENSORS = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2, dtype=torch.bfloat16)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_tensors(tmp_path / "model", TENSORS, {"epoch": "3", "train_iter": "9"})
    return tmp_path / "model"


def test_what_was_written_is_read(path: Path) -> None:
    assert_same(read_tensors(path), TENSORS)


def test_every_flipped_bit_is_found(path: Path) -> None:
    content = path.read_bytes()
    for position in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(DamagedStateError, match=f"load_params: {path} is "):
                read_tensors(path)


def test_every_truncated_file_is_found(path: Path) -> None:
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(DamagedStateError, match=f"load_params: {path} is "):
            read_tensors(path)


def test_files_of_other_tools_are_read(tmp_path: Path) -> None:
    safetensors.torch.save_file(TENSORS, tmp_path / "other", {"format": "pt"})
    assert_same(read_tensors(tmp_path / "other"), TENSORS)
    safetensors.torch.save_file(TENSORS, tmp_path / "bare")
    assert_same(read_tensors(tmp_path / "bare"), TENSORS)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="is no regular file"):
        read_tensors(tmp_path / "pipe")
