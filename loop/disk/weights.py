"""Tensors in one safetensors file that any tool reads, with a digest of everything in it."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from loop.disk.atomic import scratch, sync
from loop.disk.files import DamagedStateError, library
from loop.disk.plain import regular, told
from loop.disk.undisturbed import undisturbed

_DIGEST, _WRITER = "sha256", "written_by"  # two, so that a flip in one is told by the other
_BLANK = "0" * 64


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write a safetensors file that is complete, and on the disk, once it has its name; one of that
    name is replaced.

    Its metadata is `about`, who wrote it, and the SHA-256 of the file (with 64 zeros in the place
    of the digest itself). Raises TypeError for a dtype that such files do not know, and OSError.
    """
    # Copies, since safetensors refuses tensors that share memory.
    apart = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    try:
        data = safetensors.torch.save(apart, {**about, _WRITER: library(), _DIGEST: _BLANK})
    except KeyError as error:
        raise TypeError(
            f"SaveModel: a safetensors file cannot hold {error}. Use Checkpoint, which can."
        ) from error
    path = path.absolute()
    with undisturbed(), scratch(path.parent) as folder, told(path):
        new = folder / "tensors"
        new.write_bytes(_with_digest(data, _BLANK, hashlib.sha256(data).hexdigest()))
        sync(new)
        os.replace(new, path)
    with told(path):
        sync(path.parent)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file; one that `write_tensors` wrote is verified.

    Raises DamagedStateError, a ValueError, for a damaged file or one of another kind, and OSError.
    """
    # Read once, so that what is verified is what is used.
    with regular(path) as file:
        data = file.read()
    try:
        found = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError) as error:
        raise DamagedStateError(
            f"load_params: {path} is not a safetensors file, or damaged: {error}. Load another "
            f"copy."
        ) from error
    about = _metadata(data)
    if not {_DIGEST, _WRITER} & about.keys():
        return found  # of another tool
    expected = about.get(_DIGEST, "")
    digest = hashlib.sha256(_with_digest(data, expected, _BLANK)).hexdigest()
    if digest != expected:
        raise DamagedStateError(
            f"load_params: {path} is damaged: its SHA-256 is {digest}, expected {expected}. Load "
            f"another copy."
        )
    return found


def _metadata(data: bytes) -> dict[str, str]:
    size = int.from_bytes(data[:8], "little")
    found: dict[str, str] = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    return found


def _with_digest(data: bytes, before: str, after: str) -> bytes:
    """The file with another digest in the place of this one."""
    size = 8 + int.from_bytes(data[:8], "little")
    field = f'"{_DIGEST}":"{{}}"'
    header = data[:size].replace(field.format(before).encode(), field.format(after).encode(), 1)
    return header + data[size:]
