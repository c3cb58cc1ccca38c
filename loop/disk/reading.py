"""A saved state, read with every byte verified: nothing in the files is believed, or run."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from functional_sgd.sharded import distributed
from loop.disk.encoding import DTYPES, decode
from loop.disk.files import (
    FILES,
    FORMAT,
    LARGEST,
    REST,
    SUMS,
    TENSORS,
    VERSION,
    DamagedStateError,
    StateFileError,
    digest_of,
    file_digest,
    library,
    saved_fields,
    shaped,
)
from loop.disk.kinds import check_fields
from loop.disk.pieces import (
    FILE,
    Piece,
    Targets,
    file_name,
    files_of,
    read_pieces,
)
from loop.disk.plain import content
from loop.layout import Box, cut_like, laid_out
from loop.state import State

Entry: TypeAlias = Mapping[str, Any]
"""What state.json says of a tensor."""

_ENTRY = frozenset({"dtype", "shape", "device", "sha256"})
_IN_PIECES = frozenset({"dtype", "shape", "device", "pieces"})

LONGEST_SUMS = 2**23
"""The most bytes that SHA256SUMS may have: a line for each rank."""


def read(directory: Path, device: torch.device, targets: Targets) -> State:
    """The state in a directory; tensors that were on its params' device are put on `device`, others
    on the CPU. What has a target becomes a DTensor that lies like it.

    Raises DamagedStateError or StateFileError.
    """
    sums = _read_sums(directory / SUMS)
    document = _read_rest(directory / REST, sums[REST])
    entries = document["tensors"]
    whole: dict[str, Entry] = {}
    cut: dict[str, Entry] = {}
    for name, entry in entries.items():
        if "pieces" in entry:
            cut[name] = entry
        else:
            whole[name] = entry
    tensors = _read_tensors(directory / TENSORS, sums[TENSORS], whole)
    tensors |= _read_pieces(directory, sums, cut, targets)
    for name, tensor in tensors.items():
        target = targets.of(name, entries[name]["shape"])
        if target is not None and not distributed(tensor):
            tensors[name] = cut_like(tensor, target)
        elif entries[name]["device"] == document["device"] and not distributed(tensor):
            tensors[name] = tensor.to(device)
    try:
        nodes = [[name, node] for name, node in document["fields"].items()]
        values = decode({"dict": nodes}, tensors)
        check_fields(State, values)
    except (ValueError, RecursionError, OverflowError) as error:
        raise StateFileError(f"load: {directory / REST}: {error}") from None
    return State(**values)


def _damaged(path: Path | str, what: str) -> DamagedStateError:
    return DamagedStateError(
        f"load: {path} is damaged: {what}. Load another copy, or another checkpoint: load_latest "
        f"takes the newest "
        f"that is whole."
    )


def _disagreeing(path: Path, digest: str, expected: str, known: str = "") -> DamagedStateError:
    """One of two files is damaged, and nobody can tell which."""
    what = f"the SHA-256 of the first{known} is {digest}, the second says {expected}"
    return _damaged(f"{path} or {path.with_name(SUMS)}", what)


def _read_sums(path: Path) -> dict[str, str]:
    """File name -> SHA-256."""
    text = _bytes(path, LONGEST_SUMS).decode("utf-8", "replace")
    names = rf"{re.escape(REST)}|{re.escape(TENSORS)}|{FILE.pattern}"
    form = rf"(?P<digest>[0-9a-f]{{64}})  (?P<name>{names})"
    lines = text.split("\n")[:-1]
    sums: dict[str, str] = {}
    for line in lines:
        found = re.fullmatch(form, line)
        if found is not None:
            sums[found["name"]] = found["digest"]
    # As many as lines: every line is of this form, and no name is there twice.
    if not text.endswith("\n") or len(sums) != len(lines) or [*sums][:2] != [REST, TENSORS]:
        raise _damaged(
            path,
            f"expected a line with the SHA-256 of {REST} and one of {TENSORS}, got something else",
        )
    return sums


def _read_rest(path: Path, expected: str) -> dict[str, Any]:
    """state.json, of our format and version."""
    found = _bytes(path, LARGEST)
    digest = hashlib.sha256(found).hexdigest()
    if digest != expected:
        raise _disagreeing(path, digest, expected)
    try:
        document: Any = json.loads(found)
    except (ValueError, RecursionError) as error:
        raise StateFileError(
            f"load: {path} is not JSON: {error}. Was it written by save?"
        ) from None
    _check_format(path, document)
    for name, entry in document["tensors"].items():
        if not _is_entry(entry):
            raise StateFileError(
                f"load: {path} does not describe {name}: expected {', '.join(sorted(_ENTRY))}, the "
                f"dtype one of "
                f"{', '.join(DTYPES)}, got {entry}. Was it written by save?"
            )
    expected_fields = saved_fields()
    if document["fields"].keys() != set(expected_fields):
        raise StateFileError(
            f"load: {path}, written by {document.get('library')}, has the fields "
            f"{', '.join(document['fields'])}; "
            f"expected {', '.join(expected_fields)}. Load it with the library that wrote it."
        )
    rest: dict[str, Any] = document
    return rest


def _check_format(path: Path, document: Any) -> None:
    """Raise StateFileError for JSON of another format or version."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise StateFileError(
            f"load: {path} does not hold a state: expected the format {FORMAT!r} in it. Check the "
            f"path."
        )
    if document.get("version") != VERSION:
        raise StateFileError(
            f"load: {path} has version {document.get('version')!r} of the format, written by "
            f"{document.get('library')}; expected version {VERSION}, as read by {library()}. Load "
            f"it with the library "
            f"that wrote it."
        )
    for name, kind in (("fields", dict), ("tensors", dict), ("device", str)):
        if not isinstance(document.get(name), kind):
            raise StateFileError(
                f"load: {path} has no {name} in it, or of another type. Was it written by save?"
            )


def _is_entry(entry: object) -> bool:
    """Whether this is what state.json says of a tensor, whole or in pieces."""
    if not isinstance(entry, dict):
        return False
    complete = entry.keys() >= _ENTRY or entry.keys() >= _IN_PIECES
    return complete and str(entry["dtype"]) in DTYPES


def _read_tensors(path: Path, expected: str, entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """The tensors, in memory of their own; of a damaged file, the error names the first that is
    damaged.
    """
    try:
        # All of it is read before safetensors maps it, since a bad block in mapped memory is a
        # crash.
        digest, size = file_digest(path), path.stat().st_size
    except OSError as error:
        raise _unreadable(path, error) from None
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for name in [*entries, *names]:
                if name not in names:
                    raise _damaged(path, f"{name} is missing")
                if name not in entries:
                    raise _damaged(path, f"{name} is not in {REST}")
            tensors: dict[str, Tensor] = {}
            for name, entry in entries.items():
                tensors[name] = _read_leaf(path, name, file.get_tensor(name), entry)
    # RuntimeError is torch's own, if the file is removed meanwhile.
    except (SafetensorError, RuntimeError, OSError) as error:
        raise _damaged(path, f"its {size:,} bytes and its header do not fit: {error}") from None
    # Only now, since the digest of a leaf says more: which one is damaged.
    if digest != expected:
        raise _disagreeing(path, digest, expected, " (all tensors in it are whole)")
    return tensors


def _read_pieces(
    directory: Path,
    sums: Mapping[str, str],
    entries: Mapping[str, Entry],
    targets: Targets,
) -> dict[str, Tensor]:
    """The tensors that ranks have written piece by piece; every file that is read is verified."""
    found: dict[str, Tensor] = {}
    verified: set[int] = set()
    for name, entry in entries.items():
        try:
            pieces = [Piece(file, Box(*map(tuple, box))) for file, box in entry["pieces"]]
            target, dtype = targets.of(name, entry["shape"]), DTYPES[entry["dtype"]]
            for number in files_of(pieces, target) - verified:
                _verify(directory / file_name(number), sums)
                verified.add(number)
            value = read_pieces(directory, name, entry["shape"], dtype, pieces, target)
        except DamagedStateError:
            # A ValueError too, which says more than the one below.
            raise
        except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise _damaged(directory, f"{error}") from None
        found[name] = value if target is None else laid_out(value, target)
    return found


def _verify(path: Path, sums: Mapping[str, str]) -> None:
    try:
        digest = file_digest(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    if digest != sums.get(path.name):
        raise _disagreeing(path, digest, f"{sums.get(path.name)}")


def _read_leaf(path: Path, name: str, found: Tensor, entry: Entry) -> Tensor:
    """A tensor as it was. It is verified after it has been copied, so that what was verified is
    what is used.
    """
    stored, dtype = found.clone(), DTYPES[entry["dtype"]]
    tensor = stored
    if dtype.is_complex and stored.is_floating_point() and stored.shape[-1:] == (2,):
        tensor = torch.view_as_complex(stored)
    if tensor.dtype != dtype or list(tensor.shape) != entry["shape"]:
        raise _damaged(
            path,
            f"expected {name} to be {shaped(dtype, entry['shape'])}, got "
            f"{shaped(tensor.dtype, tensor.shape)}",
        )
    digest = digest_of(stored)
    if digest != entry["sha256"]:
        raise _damaged(path, f"{name} has the SHA-256 {digest}, expected {entry['sha256']}")
    return tensor


def _bytes(path: Path, most: int) -> bytes:
    try:
        return content(path, most)
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> DamagedStateError:
    if isinstance(error, FileNotFoundError):
        return _damaged(
            path.parent, f"there is no {path.name} in it, expected {', '.join(sorted(FILES))}"
        )
    return _damaged(path, f"it cannot be read: {error}")
