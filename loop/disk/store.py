"""States on disk: save one, load it again, and keep the newest few in a folder."""

import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from functional_sgd.sharded import any_distributed, distributed
from functional_sgd.tree import Tree
from loop.disk.atomic import aside, discard, find, locked, put, scratch, sync
from loop.disk.files import CPU, FILES, REST, home, pack, shaped, write
from loop.disk.files import DamagedStateError as DamagedStateError
from loop.disk.files import StateFileError as StateFileError
from loop.disk.finite import not_finite
from loop.disk.pieces import FILE, Targets
from loop.disk.plain import check_path, told
from loop.disk.reading import read
from loop.disk.undisturbed import undisturbed
from loop.layout import any_rank
from loop.state import State

# Said in the name, so that the newest finite checkpoint is found without reading any.
_NOT_FINITE = "-not-finite"
_CHECKPOINT = re.compile(rf"(\d+)-train_iter-\d+({_NOT_FINITE})?")


def save(state: State, path: str | Path, overwrite: bool = False) -> Path:
    """Write a state, at rest, as the directory `path`, which is returned.

    In it are `tensors.safetensors` (complex numbers as pairs); `state.json`, with everything else,
    and name, dtype, shape and SHA-256 of each tensor; and `SHA256SUMS`, which `sha256sum -c`
    checks. The directory appears when it is whole and on the disk, so nothing that ends the process
    leaves half of it. With `overwrite`, a state that is there stays until then.

    Raises TypeError for what cannot be saved, saying where it is, before anything is written; and
    FileExistsError if there is something already, or, with `overwrite`, something that is no state.

    >>> path = save(State({"weight": torch.ones(2)}, {}, {}, {"lr": 0.1}), "saved")
    >>> load(path).params
    {'weight': tensor([1., 1.])}
    """
    check_path("save", path, "save(state, path)")
    path = Path(path)
    document, tensors = pack(state.at_rest())
    if path.parent.is_dir():
        with locked(path.parent):  # or another process could be moving what is looked at
            _check_place(path, overwrite)
    with scratch(path.parent) as new:
        write(new, document, tensors)
        with locked(path.parent):
            # Again: somebody else may have saved there meanwhile.
            _check_place(path, overwrite)
            put(new, path)
    return path


def load(path: str | Path, like: State | None = None) -> State:
    """The state that was saved as `path`: equal in values and types, every byte verified, in memory
    of its own.

    With `like`, a fresh state of the learner (`learner.init()`), params, buffers and the
    optimizer's state must be built as they are there, and go to their devices; other tensors that
    were where the params were go to where the params of `like` are. Everything else, and everything
    without `like`, is on the CPU. If `like` is in pieces (`shard`), every rank reads its own, from
    whatever number of ranks the state was saved by; without `like`, tensors are whole.

    Raises DamagedStateError, which says what is damaged; StateFileError for another version, class
    or model; and FileNotFoundError if there is nothing at `path`.
    """
    check_path("load", path, "load(path, like=learner.init())")
    device = CPU if like is None else home(like)
    while True:
        place = find(Path(path))
        before = _identity(place)
        try:
            with undisturbed():  # or what is raised by chance is taken for damage
                state = read(place, device, _targets(like))
        except DamagedStateError:
            # The same files before and after: they are damaged. Others by now: somebody has
            # replaced them while they were read.
            if before is not None and before == _identity(place):
                raise
        else:
            return state if like is None else _fitted(state, like, place)


def save_in(state: State, folder: str | Path, keep: int = 3) -> Path:
    """Save a state as the newest checkpoint in a folder, and remove all but the newest `keep`; the
    new directory.

    Its name is a running number and the state's train_iter, and "not-finite" if there is NaN or inf
    in params (or NaN in buffers). The newest one whose params are finite is never removed. Several
    processes may save into one folder. Raises ValueError if keep is below 1, and TypeError as
    `save` does.
    """
    if keep < 1:
        raise ValueError(f"save_in: keep must be at least 1, got {keep}.")
    return saving(state, Path(folder), keep)()


def saving(state: State, folder: Path, keep: int) -> Callable[[], Path]:
    """`save_in`, as far as it can fail by what the state is: what is left is to write it, which any
    thread may do.
    """
    document, tensors = pack(state.at_rest())

    def saved() -> Path:
        finite = not not_finite(state.params, state.buffers)
        with scratch(folder) as new:
            write(new, document, tensors)
            return put_newest(new, folder, state.train_iter, finite, keep)

    return saved


def put_newest(new: Path, folder: Path, train_iter: int, finite: bool, keep: int) -> Path:
    """Move a directory to where the newest checkpoint of a folder is, and remove what is too
    old.
    """
    mark = "" if finite else _NOT_FINITE
    # Or two processes could take the same number.
    with locked(folder):
        number = max(map(_number, checkpoints(folder)), default=0) + 1
        path = folder / f"{number:06d}-train_iter-{train_iter:08d}{mark}"
        put(new, path)
        for old in _superfluous(checkpoints(folder), keep):
            discard(old)
    return path


def probe(folder: str | Path) -> None:
    """Make a folder, and write into it what is removed again. Raises OSError, with the path, if
    nothing can be saved there.
    """
    folder = Path(folder)
    with told(folder), scratch(folder) as new:
        (new / REST).write_text("probe")
        sync(new / REST)


def load_latest(folder: str | Path, like: State | None = None) -> State:
    """The newest checkpoint in a folder that is whole; a UserWarning says which were skipped, and
    why.

    Raises FileNotFoundError if there is no checkpoint, DamagedStateError if all are damaged, and
    otherwise what `load` raises: the checkpoint of another model, class or version is not skipped.
    """
    check_path("load_latest", folder, "load_latest(folder, like=learner.init())")
    damaged: dict[Path, DamagedStateError] = {}
    while True:
        waiting = [path for path in checkpoints(folder) if path not in damaged]
        if not waiting:
            break
        failure: DamagedStateError | None = None
        gone = False
        try:
            state = load(waiting[-1], like)
        except FileNotFoundError:  # removed meanwhile, as there are newer ones
            gone = True
        except DamagedStateError as error:
            failure = error
        # Agreed, here and below, or ranks would go on from different checkpoints.
        if _on_any_rank(gone, like):
            continue
        if not _on_any_rank(failure is not None, like):
            return state
        if failure is None:
            failure = DamagedStateError(
                f"load: {waiting[-1]} is damaged, as another rank has found."
            )
        damaged[waiting[-1]] = failure
        warnings.warn(f"load_latest: skipped a checkpoint. {failure}", UserWarning, stacklevel=2)
    if damaged:
        raise DamagedStateError(
            f"load_latest: every checkpoint in {folder} is damaged: {', '.join(map(str, damaged))}."
        )
    raise FileNotFoundError(
        f"load_latest: there is no checkpoint in {folder}. Check the path, or begin a new run."
    )


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; none if there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        if _CHECKPOINT.fullmatch(path.name) and not _is_other(path):
            found.append(path)
    return sorted(found, key=_number)


def is_checkpoint(path: str | Path) -> bool:
    """Whether there is a saved state at a path, and not a folder of them."""
    return any((Path(path) / name).is_file() for name in FILES)


def is_finite(checkpoint: Path) -> bool:
    """Whether the params in a checkpoint are finite, as its name says."""
    return not checkpoint.name.endswith(_NOT_FINITE)


def _superfluous(paths: list[Path], keep: int) -> list[Path]:
    """All but the newest few, and but the newest whose params are finite."""
    newest_finite = next(filter(is_finite, reversed(paths)), None)
    return [path for path in paths[:-keep] if path != newest_finite]


def _is_other(path: Path) -> bool:
    """Whether there is something here that is no directory; a directory that is removed meanwhile
    was one.
    """
    return not path.is_dir() and os.path.lexists(path)


def _number(path: Path) -> int:
    return int(path.name.partition("-")[0])


def _check_place(path: Path, overwrite: bool) -> None:
    # A save that was killed between its renames has left the old state aside.
    for place in (path, aside(path)):
        if overwrite and place.is_dir() and _is_state(place):
            continue
        if not place.exists():
            continue
        if overwrite:
            raise FileExistsError(
                f"save: there is something at {place} that is no state, expected nothing or a "
                f"saved state. Choose another path."
            )
        raise FileExistsError(
            f"save: there is something at {place} already. Choose another path, or pass "
            f"overwrite=True."
        )


def _is_state(directory: Path) -> bool:
    """Whether nothing is in a directory but files of a state."""
    for entry in directory.iterdir():
        if entry.name not in FILES and not FILE.fullmatch(entry.name):
            return False
    return True


def _identity(place: Path) -> tuple[int, int, int] | None:
    """What distinguishes a directory from the one that takes its place."""
    try:
        found = place.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _fitted(state: State, like: State, place: Path) -> State:
    """The state with what was learned on the devices of `like`. Raises StateFileError if it is
    built otherwise; buffers may have other shapes, for some grow while a model is at work.
    """
    fitted: dict[str, Tree] = {}
    try:
        for name in ("params", "buffers", "opt_state"):
            fitted[name] = _built_like(getattr(state, name), getattr(like, name), name)
    except ValueError as error:
        raise StateFileError(
            f"load: {place} is of another model or optimizer: {error}. Load it with the learner it "
            f"was saved with."
        ) from None
    return state.replace(**fitted)


def _built_like(found: Tree, expected: Tree, where: str) -> Tree:
    """The same tree on other devices. Raises ValueError, saying where, for another tree."""
    both_tensors = isinstance(found, Tensor) and isinstance(expected, Tensor)
    if both_tensors and where.startswith("buffers["):
        expected = expected.new_empty(found.shape)
    if _built(found) != _built(expected):
        raise ValueError(f"expected {where} to be {_built(expected)}, got {_built(found)}")
    if isinstance(found, Tensor):
        return found if distributed(found) else found.to(expected.device)
    if isinstance(found, Mapping):
        for key in [*expected, *found]:
            if key not in found:
                raise ValueError(f"{where}[{key!r}] is missing")
            if key not in expected:
                raise ValueError(f"{where}[{key!r}] is not expected")
        built: dict[str | int, Tree] = {}
        for key, part in found.items():
            built[key] = _built_like(part, expected[key], f"{where}[{key!r}]")
        return built
    if isinstance(found, (list, tuple)):
        parts: list[Tree] = []
        for index, (part, other) in enumerate(zip(found, expected, strict=True)):
            place = f"{where}[{index}]"
            parts.append(_built_like(part, other, place))
        return type(found)(parts)
    return found


def _on_any_rank(flag: bool, like: State | None) -> bool:
    """Whether this is so on any rank that has pieces of the state, if it is in pieces."""
    if like is not None:
        for leaf in like.params.values():
            if distributed(leaf):
                return any_rank(flag, leaf)
    return flag


def _targets(like: State | None) -> Targets:
    """Where tensors are to lie: in pieces, if `like` is."""
    if like is None or not any_distributed(like.params.values()):
        return Targets(None, {})
    return Targets(like, pack(like.at_rest())[1])


def _built(value: object) -> str:
    """A leaf or the outermost container in words: float32[4, 2], dict, tuple of 3."""
    if isinstance(value, Tensor):
        return shaped(value.dtype, value.shape)
    kind = type(value).__name__
    if isinstance(value, (list, tuple)):
        return f"{kind} of {len(value)}"
    return "dict" if isinstance(value, Mapping) else kind
