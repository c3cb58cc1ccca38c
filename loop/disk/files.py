"""The three files of a saved state: what is in them, and how they are written."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from functional_sgd.sharded import distributed
from loop.disk.atomic import sync
from loop.disk.encoding import Node, encode, text_of
from loop.disk.pieces import FILE, Piece
from loop.disk.plain import regular, told
from loop.state import State

FORMAT, VERSION = "loop.State", 2
TENSORS, REST, SUMS = "tensors.safetensors", "state.json", "SHA256SUMS"
FILES = frozenset({TENSORS, REST, SUMS})

NOT_SAVED = frozenset({"xb", "yb", "pred", "loss", "grads", "learner", "resources", "donated"})
"""The fields of a state that it has only during a run."""

LARGEST = 2**28
"""The most bytes that state.json may have: what is read at once is bounded."""

CPU = torch.device("cpu")


class StateFileError(ValueError):
    """What is on the disk is not the state that was asked for: damaged, or of another version,
    class or model.
    """


class DamagedStateError(StateFileError):
    """What is on the disk is not what was written there."""


def pack(state: State) -> tuple[dict[str, object], dict[str, Tensor]]:
    """A state as what goes into state.json, and the tensors by name. Raises TypeError for what
    cannot be saved.
    """
    nodes: dict[str, Node] = {}
    tensors: dict[str, Tensor] = {}
    for name in saved_fields():
        nodes[name], found = encode(getattr(state, name), name)
        tensors |= found
    document = {
        "format": FORMAT,
        "version": VERSION,
        "library": library(),
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "device": str(home(state)),
    }
    return {**document, "fields": nodes}, tensors


def write(
    directory: Path,
    document: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    pieces: Mapping[str, Sequence[Piece]] | None = None,
) -> None:
    """Write what `pack` has given into a directory, onto the disk. In it are the files of `pieces`
    already, if there are any: by the tensors' names, all pieces of all ranks.

    Raises OSError, with the path and the number of the system's error; TypeError for tensors in
    pieces of which nobody has written any.
    """
    whole: dict[str, Tensor] = {}
    cut: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if distributed(tensor):
            cut[name] = tensor
        else:
            whole[name] = tensor
    if cut and pieces is None:
        raise TypeError(
            f"save: {next(iter(cut))} is in pieces (a DTensor), of which this process has one. "
            f"Give Checkpoint to the fit of a parallel learner, or save unshard(state), which is "
            f"called on all ranks."
        )
    pieces = {} if pieces is None else pieces
    stored = dict(as_stored(whole))
    entries: dict[str, dict[str, object]] = {}
    for name, tensor in whole.items():
        entries[name] = {**_entry(tensor), "sha256": digest_of(stored[name])}
    for name, tensor in cut.items():
        entries[name] = {**_entry(tensor), "pieces": pieces[name]}
    text = json.dumps({**document, "tensors": entries}, allow_nan=False)
    # `load` would refuse it. JSON is written in ASCII, so characters are bytes.
    if len(text) >= LARGEST:
        raise ValueError(
            f"save: {REST} would have {len(text):,} bytes, expected less than {LARGEST:,}. Keep "
            f"what is long as tensors, or as a Log."
        )
    with told(directory / TENSORS):
        save_file(stored, directory / TENSORS, metadata={"format": "pt"})
    _write_text(directory / REST, f"{text}\n")
    others = sorted(path.name for path in directory.iterdir() if FILE.fullmatch(path.name))
    names = (REST, TENSORS, *others)
    sums = "".join(f"{file_digest(directory / name)}  {name}\n" for name in names)
    _write_text(directory / SUMS, sums)
    for name in (TENSORS, *others):  # safetensors lets nobody else read them
        (directory / name).chmod((directory / REST).stat().st_mode)
    for path in (directory / TENSORS, directory / REST, directory / SUMS, directory):
        with told(path):
            sync(path)


def file_digest(path: Path) -> str:
    """The SHA-256 of a regular file."""
    with regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def home(state: State) -> torch.device:
    """Where the params of a state are."""
    return next((value.device for value in state.params.values()), CPU)


def shaped(dtype: torch.dtype, shape: Sequence[int]) -> str:
    """A kind of tensor in words: float32[4, 2]."""
    return f"{text_of(dtype)}{list(shape)}"


def saved_fields() -> list[str]:
    """The fields of a state that are saved."""
    return [entry.name for entry in fields(State) if entry.name not in NOT_SAVED]


@cache
def library() -> str:
    """What writes and reads: a name and a version."""
    try:
        return f"functional-sgd {version('functional-sgd')}"
    except PackageNotFoundError:
        return "functional-sgd of unknown version"


def _entry(tensor: Tensor) -> dict[str, object]:
    return {
        "dtype": text_of(tensor.dtype),
        "shape": list(tensor.shape),
        "device": str(tensor.device),
    }


def as_stored(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors as they are in the file: dense, on the CPU, complex numbers as pairs, none
    sharing memory.
    """
    memories = set()
    for name, tensor in tensors.items():
        try:
            plain = plainly(tensor)
        except (RuntimeError, NotImplementedError) as error:
            raise TypeError(
                f"save: {name}, {shaped(tensor.dtype, tensor.shape)}, cannot be saved: {error}. "
                f"Convert it."
            ) from error
        # safetensors refuses tensors that share memory.
        memory = plain.untyped_storage().data_ptr()
        if memory in memories:
            plain = plain.clone()
        yield name, plain
        memories.add(memory)


def plainly(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, its elements one after the other, complex numbers as pairs."""
    plain = tensor.to(CPU).resolve_conj().resolve_neg()
    if plain.is_complex():
        plain = torch.view_as_real(plain)
    plain = plain.contiguous()
    if plain.numel() > 1:
        return plain
    # safetensors looks at strides, and with one element or none torch takes any for contiguous.
    usual = torch.empty(plain.shape, device="meta").stride()
    if plain.stride() == usual:
        return plain
    return plain.new_empty(plain.shape).copy_(plain)


def digest_of(stored: Tensor) -> str:
    """The SHA-256 of the elements."""
    return hashlib.sha256(stored.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _write_text(path: Path, text: str) -> None:
    with told(path):
        path.write_text(text, encoding="utf-8", newline="\n")
