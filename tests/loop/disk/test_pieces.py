"""Pieces on the disk are what they are said to be, each element in one of them."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loop.disk.pieces import Piece, file_name, read_pieces
from loop.layout import Box


def read(folder: Path, pieces: Sequence[tuple[Tensor, int]], shape: Sequence[int]) -> Tensor:
    """A tensor of which each file has the rows from a given one on."""
    for number, (rows, _) in enumerate(pieces):
        plain = torch.view_as_real(rows) if rows.is_complex() else rows
        save_file({"w": plain}, folder / file_name(number))
    boxes = [
        Piece(number, Box((begin, *[0] * (rows.dim() - 1)), tuple(rows.shape)))
        for number, (rows, begin) in enumerate(pieces)
    ]
    return read_pieces(folder, "w", shape, pieces[0][0].dtype, boxes, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.bool])
def test_pieces_make_up_the_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = torch.arange(10).view(5, 2).to(dtype)
    found = read(tmp_path, [(whole[3:].clone(), 3), (whole[:3].clone(), 0)], [5, 2])
    assert torch.equal(found, whole)


def test_pieces_that_overlap_are_refused(tmp_path: Path) -> None:
    """They have as many elements as the tensor, so some of it would be in none of them."""
    with pytest.raises(ValueError, match="w has pieces that overlap"):
        read(tmp_path, [(torch.ones(2), 0), (torch.ones(2), 0)], [4])


def test_a_later_piece_of_another_dtype_is_refused(tmp_path: Path) -> None:
    words = re.escape("piece of torch.float64 in pieces-00001.safetensors, expected torch.float32")
    with pytest.raises(ValueError, match=words):
        read(tmp_path, [(torch.ones(2), 0), (torch.ones(2).double(), 2)], [4])


def test_pairs_are_refused_for_a_tensor_that_is_not_complex(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4, 2)}, tmp_path / file_name(0))
    with pytest.raises(ValueError, match=r"shape \[4, 2\] in .*, expected \[4\]"):
        read_pieces(tmp_path, "w", [4], torch.float32, [Piece(0, Box((0,), (4,)))], None)
