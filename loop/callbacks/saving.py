"""Keep the best parameters of a run, or write parameters to a file as it goes on; and read them."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from functional_sgd.errors import did_you_mean
from loop.callback import Callback, Order
from loop.callbacks.recorder import Recorder
from loop.callbacks.tracking import better, check_monitor, check_tracking, mode_of, monitored
from loop.disk.atomic import make
from loop.disk.finite import not_finite
from loop.disk.plain import check_path
from loop.disk.weights import read_tensors
from loop.disk.weights import write_tensors as write_tensors
from loop.replaced import evaluated, with_weights
from loop.run.stages import learner_of
from loop.state import State, Tensors


def as_evaluated(state: State) -> State:
    """The state with the params that its optimizer wants to be evaluated: mostly its own.

    `schedule_free` and `average_params` keep an average for that.
    """
    return state.replace(params=evaluated(state, learner_of(state).opt))


@dataclass(frozen=True)
class SaveModel(Callback):
    """Keep the params and buffers of the best epoch, and end with them; or write those of every
    n-th epoch or the last.

    The best epoch is the one whose `monitor` (a column of the history: valid_loss, train_loss or a
    metric) beats all before it by more than `min_delta`; `mode` says whether "min" or "max" is
    good, None decides by the name. With `restore_best` the state keeps that epoch's tensors, which
    costs their memory once more, and has them as its own again after the run (`at_best(state)`
    gives them when it was stopped before its end). Every run starts fresh, unless `reset_on_fit` is
    False. Instead, `every=n` writes after every n-th epoch, and `at_end` after the last; then
    nothing is compared or restored.

    `path` is a safetensors file, complete or not there at any time, whose metadata has epoch (how
    many the state has seen), train_iter, the monitored value and a digest of the file; "{epoch}" in
    it is filled in, which makes a file for each. None writes none. `load_params` reads it, and so
    does `model.load_state_dict(safetensors.torch.load_file(path))`. `weights` says what is kept:
    `at_average` for the averages of an AverageParams, which its validation measures. Weights that
    are not finite are never kept or written, however good their monitor; a UserWarning says so.

    Raises ValueError for settings that make no sense, and for a monitor that is no column: before
    the run if there is no validation data, else after the first epoch. So does `fit`, on all ranks,
    for a path where params are in pieces (`shard`). Source: fastai.
    """

    path: str | Path | None
    monitor: str = "valid_loss"
    mode: str | None = None
    min_delta: float = 0.0
    every: int | None = None
    at_end: bool = False
    restore_best: bool = True
    reset_on_fit: bool = True
    weights: Callable[[State], State] = as_evaluated
    order: ClassVar[int] = Order.KEEP
    reports: ClassVar[bool] = True
    run_after: ClassVar[tuple[type, ...]] = (Recorder,)

    def __post_init__(self) -> None:
        check_tracking("SaveModel", self.mode, self.min_delta)
        if self.every is not None and self.every < 1:
            raise ValueError(f"SaveModel: every must be at least 1 epoch, got {self.every}.")
        if self.path is None and not (self.keeps_best and self.restore_best):
            raise ValueError(
                "SaveModel: without a path there is nothing to do but restore_best. Give a path."
            )

    @property
    def keeps_best(self) -> bool:
        """Whether epochs are compared."""
        return self.every is None and not self.at_end

    def elsewhere(self) -> "SaveModel | None":
        """The same without a file: every rank ends with the best params."""
        return replace(self, path=None) if self.keeps_best and self.restore_best else None

    @contextmanager
    def around_fit(self, state: State) -> Iterator[Callable[[State], None]]:
        """The function that writes a state's tensors; the folder is made now, so that a bad path
        fails early.
        """
        if self.path is not None:
            # Only the path before {epoch} is known. The underscore stands for the rest: Path drops
            # a slash at the end, so `parent` would be one folder too high.
            known = str(Path(self.path).absolute()).partition("{epoch}")[0]
            make(Path(f"{known}_").parent)
            if Path(self.path).is_dir():
                raise ValueError(
                    f"SaveModel: {self.path} is a folder. Give the path of a file, such as "
                    f"model.safetensors."
                )
        del state  # its tensors would live as long as the run
        yield self._write

    def before_fit(self, state: State) -> State | None:
        """Nothing is best yet."""
        if not self.keeps_best:
            return None
        check_monitor("SaveModel", state, self.monitor)
        if self.name in state.memory and not self.reset_on_fit:
            return None
        return state.remember(self.name, {"best": None})

    def after_epoch(self, state: State) -> State | None:
        """Keep this epoch, if it is its turn or if it is the best."""
        if not self.keeps_best:
            # epochs_seen already counts the epoch that ends here.
            if self.every is not None and state.epochs_seen % self.every == 0:
                state.resources[self.name](state)
            return None
        value = monitored("SaveModel", state, self.monitor)
        best = state.memory.get(self.name, {}).get("best")
        mode = mode_of(self.monitor, self.mode)
        if value is None or not better(value, best, mode, self.min_delta):
            return None
        kept = self.weights(state)
        if _is_refused(kept):
            return None
        state.resources[self.name](state)
        tensors: dict[str, Tensors] = {}
        if self.restore_best:
            # Buffers need no copy: a run that donates overwrites only params and opt_state.
            tensors = {"params": state.kept(kept.params), "buffers": kept.buffers}
        return state.remember(self.name, {"best": value, "epoch": state.epochs_seen, **tensors})

    def after_fit(self, state: State) -> State | None:
        """Write the last; or go back to the best."""
        if self.at_end:
            state.resources[self.name](state)
        if self.keeps_best and self.restore_best and "params" in state.memory.get(self.name, {}):
            return at_best(state, self.name)
        return None

    def _write(self, state: State) -> None:
        if self.path is None:
            return
        about = {"epoch": str(state.epochs_seen), "train_iter": str(state.train_iter)}
        row = state.history.rows[-1] if state.history.rows else {}
        if row.get(self.monitor) is not None:
            about[self.monitor] = repr(row[self.monitor])
        kept = self.weights(state)
        if _is_refused(kept):
            return
        # Not str.format, which would stumble over other braces in the path.
        path = Path(str(self.path).replace("{epoch}", str(state.epochs_seen)))
        write_tensors(path, {**kept.params, **kept.buffers}, about)


def _is_refused(kept: State) -> bool:
    """Whether these weights are worth nothing, whatever was measured; a warning says so."""
    found = not_finite(kept.params, kept.buffers)
    if found:
        warnings.warn(
            f"SaveModel: {found} is not finite (NaN or inf), so this epoch is not kept. What was "
            f"kept before stays. TerminateOnNaN ends such a run.",
            UserWarning,
            stacklevel=4,
        )
    return bool(found)


def at_best(state: State, name: str = "save_model") -> State:
    """The state with the params and buffers of the best epoch, as far as a SaveModel of this name
    has kept one.

    Raises ValueError if it has kept none.
    """
    memory = state.memory.get(name, {})
    if "params" not in memory:
        raise ValueError(
            f"at_best: the state has kept no epoch as {name!r}. "
            f"Fit for at least an epoch with SaveModel(..., restore_best=True) among the callbacks."
        )
    return with_weights(state, memory["params"], memory["buffers"])


def load_params(path: str | Path, state: State) -> State:
    """The state with params and buffers from a safetensors file, on the device of its own.

    Every bit of a file that SaveModel wrote is verified. Raises FileNotFoundError, and ValueError
    if the file is damaged or no safetensors file, or if names, shapes or dtypes are not those of
    the state.
    """
    check_path("load_params", path, "load_params(path, state)")
    found = read_tensors(Path(path))
    known = {**state.params, **state.buffers}
    missing, strange = sorted(known.keys() - found.keys()), sorted(found.keys() - known.keys())
    if strange:
        raise ValueError(
            f"load_params: the state has no tensor {strange[0]!r} of {path}. "
            f"{_hint(strange[0], missing)}"
        )
    if missing:
        raise ValueError(
            f"load_params: {path} has no {', '.join(map(repr, missing))}. Is it of another model?"
        )
    for name, value in known.items():
        _check(name, found[name], value, path)
    params = {name: found[name].to(value.device) for name, value in state.params.items()}
    buffers = {name: found[name].to(value.device) for name, value in state.buffers.items()}
    return with_weights(state, params, buffers)


def _check(name: str, found: Tensor, value: Tensor, path: str | Path) -> None:
    pairs = {
        "shape": (tuple(found.shape), tuple(value.shape)),
        "dtype": (found.dtype, value.dtype),
    }
    for what, (read, expected) in pairs.items():
        if read != expected:
            raise ValueError(
                f"load_params: {name!r} of {path} has {what} {read}, but the state's has "
                f"{expected}. "
                f"Is it of another model?"
            )


def _hint(name: str, missing: list[str]) -> str:
    return did_you_mean(name, missing) if missing else "Is it of another model?"
