"""Tensors of which every rank holds a piece: each rank writes its own, and reads what it needs."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from functional_sgd.sharded import distributed, local
from loop.disk.atomic import sync
from loop.disk.plain import told
from loop.layout import Box, box_of, is_first
from loop.state import State


class Piece(NamedTuple):
    """A box that is on the disk, and the number of the file that it is in."""

    file: int
    box: Box


def file_name(number: int) -> str:
    """The file of a rank."""
    return f"pieces-{number:05d}.safetensors"


FILE = re.compile(r"pieces-(\d{5})\.safetensors")
"""The names of such files."""


def write_pieces(
    directory: Path, number: int, tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor]
) -> dict[str, Piece]:
    """Write this rank's pieces, onto the disk; where each of them lies. `stored` are the pieces as
    they are in the file.
    """
    path = directory / file_name(number)
    # Ranks may have no row of a small tensor; nobody reads a piece without elements.
    mine = {name: piece for name, piece in stored.items() if piece.numel()}
    with told(path):
        save_file(mine, path, metadata={"format": "pt"})
        sync(path)
    return {name: Piece(number, box_of(tensors[name])) for name in mine}


def nobody(tensor: Tensor) -> bool:
    """False."""
    return False


def own_pieces(
    tensors: Mapping[str, Tensor], others: Callable[[Tensor], bool] = nobody
) -> dict[str, Tensor]:
    """The pieces that this rank is to write; not those of which `others` is true."""
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if distributed(tensor) and is_first(tensor) and not others(tensor):
            own[name] = local(tensor).detach()
    return own


class Targets:
    """Where the tensors of a state are to lie: as they do in another one, `like`."""

    def __init__(self, like: State | None, tensors: Mapping[str, Tensor]) -> None:
        self.exact = {name: tensor for name, tensor in tensors.items() if distributed(tensor)}
        self.params: dict[str, Tensor] = {}  # by the end of a name: ['weight']
        params = {} if like is None else like.params
        for name, value in params.items():
            if distributed(value):
                self.params[f"[{name!r}]"] = value

    def of(self, name: str, shape: Sequence[int]) -> Tensor | None:
        """The DTensor that this one is to lie like; None for a plain tensor.

        What a callback remembers of a param, such as an average, lies as the param does.
        """
        found: Tensor | None = self.exact.get(name)
        if found is None and name.startswith("memory["):
            found = self._param_at_end(name)
        if found is None or list(found.shape) != list(shape):
            return None
        return found

    def _param_at_end(self, name: str) -> Tensor | None:
        # What is remembered of `w` ends in ['w'], however deep it lies.
        for end, param in self.params.items():
            if name.endswith(end):
                return param
        return None


def read_pieces(
    directory: Path,
    name: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    pieces: Sequence[Piece],
    target: Tensor | None,
) -> Tensor:
    """This rank's part of a tensor, where `target` has its; all of it if there is no target.

    Raises ValueError, saying what is wrong, if pieces are missing, lie over each other, or are not
    what they are said to be.
    """
    boxes = [piece.box for piece in pieces]
    count = sum(math.prod(box.shape) for box in boxes)
    if count != math.prod(shape):
        raise ValueError(f"{name} has {math.prod(shape)} elements, and {count} are in pieces")
    _check_apart(name, boxes)
    wanted = Box((0,) * len(shape), tuple(shape)) if target is None else box_of(target)
    stored, pairs = dtype, list[int]()
    if dtype.is_complex:  # safetensors has no complex numbers
        stored, pairs = dtype.to_real(), [2]
    whole: Tensor | None = None
    filled = 0
    for piece in pieces:
        part = _overlap(wanted, piece.box)
        if part is None:
            continue
        path = directory / file_name(piece.file)
        values = _read_part(path, name, part, piece.box, pairs)
        if values.dtype != stored:
            raise ValueError(
                f"{name} has a piece of {values.dtype} in {path.name}, expected {stored}"
            )
        if whole is None:
            whole = values.new_empty([*wanted.shape, *pairs])
        whole[_slices(part, wanted)] = values
        filled += math.prod(part.shape)
    if filled != math.prod(wanted.shape):
        raise ValueError(f"{name}: {filled} of {math.prod(wanted.shape)} elements are there")
    if whole is None:  # there are no elements
        return torch.empty(wanted.shape, dtype=dtype)
    return torch.view_as_complex(whole) if dtype.is_complex else whole


def _read_part(path: Path, name: str, part: Box, box: Box, pairs: list[int]) -> Tensor:
    """A part of the piece that lies in `box`; `pairs` are the dimensions that complex numbers have
    more in a file.
    """
    with safe_open(path, framework="pt") as file:
        found = file.get_slice(name)
        expected = [*box.shape, *pairs]
        if found.get_shape() != expected:
            raise ValueError(
                f"{name} has a piece of shape {found.get_shape()} in {path.name}, expected "
                f"{expected}"
            )
        # Of a 0-d tensor there are no slices.
        values: Tensor = found[_slices(part, box)] if box.shape else file.get_tensor(name)
    return values


def _check_apart(name: str, boxes: Sequence[Box]) -> None:
    """Raise ValueError if two boxes have something in common: then elements are in none, since
    there are as many in boxes as in the tensor.
    """
    ordered = sorted(boxes)
    for place, box in enumerate(ordered):
        for other in ordered[place + 1 :]:
            # Sorted by their first rows, those that come after it are all below this one.
            if box.start and other.start[0] >= box.start[0] + box.shape[0]:
                break
            if _overlap(box, other) is not None:
                raise ValueError(f"{name} has pieces that overlap: {box} and {other}")


def files_of(pieces: Sequence[Piece], target: Tensor | None) -> set[int]:
    """The files that are read for a tensor."""
    if target is None:
        return {piece.file for piece in pieces}
    wanted = box_of(target)
    return {piece.file for piece in pieces if _overlap(wanted, piece.box) is not None}


def _overlap(one: Box, other: Box) -> Box | None:
    """What two boxes have in common."""
    starts: list[int] = []
    sizes: list[int] = []
    for a, n, b, m in zip(one.start, one.shape, other.start, other.shape, strict=True):
        start, end = max(a, b), min(a + n, b + m)
        starts.append(start)
        sizes.append(end - start)
    if min(sizes, default=1) <= 0:  # a number without axes has no sizes
        return None
    return Box(tuple(starts), tuple(sizes))


def _slices(part: Box, inside: Box) -> tuple[slice, ...]:
    slices = []
    for at, size, begin in zip(part.start, part.shape, inside.start, strict=True):
        first = at - begin
        slices.append(slice(first, first + size))
    return tuple(slices)
