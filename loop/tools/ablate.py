"""Which callback is worth what: the same run, with each left out in turn."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import SupportsFloat

from functional_sgd.errors import did_you_mean
from functional_sgd.notebook import html_table
from loop.callback import Wish, name_of, without_reports
from loop.callbacks import Recorder
from loop.history import column_names
from loop.learner import Learner
from loop.state import State
from loop.tools.table import aligned
from loop.training.fit import fit

Scores = Mapping[str, tuple[float, ...]]
"""Column of the history -> its last value in the run with every seed, NaN if it was not measured.
"""


@dataclass(frozen=True, repr=False)
class Ablation:
    """What `ablate` found; print it to read it."""

    full: Scores  # with all callbacks
    without: Mapping[str, Scores]  # by the name of the callback that was left out
    seeds: tuple[int, ...]

    def differences(self, name: str) -> Scores:
        """What leaving out the callback of this name has added to every column, for each seed."""
        found: dict[str, tuple[float, ...]] = {}
        for column, values in self.without[name].items():
            pairs = zip(values, self.full[column], strict=True)
            found[column] = tuple(value - full for value, full in pairs)
        return found

    def __str__(self) -> str:
        return "\n".join([*aligned(self._rows()), *self._notes()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The same as a table."""
        titles, *rows = self._rows()
        return html_table(rows, titles, left=1, caption=" ".join(self._notes()))

    def _rows(self) -> list[list[str]]:
        """The titles, the run with all callbacks, and a row for each that was left out."""
        titles, everyone = [""], ["all"]  # each column is followed by one for its changes
        for column, values in self.full.items():
            titles += [column, ""]
            everyone += [_mean(values), ""]
        rows = [titles, everyone]
        for name, scores in self.without.items():
            changes, row = self.differences(name), [f"without {name}"]
            for column in self.full:
                row += [_mean(scores[column]), _change(changes[column])]
            rows.append(row)
        return rows

    def _notes(self) -> list[str]:
        """What the numbers are, if there is more than one seed."""
        if len(self.seeds) == 1:
            return []
        return [
            f"(means over {len(self.seeds)} seeds, and mean differences to all ± their "
            f"standard deviation)"
        ]


def ablate(
    learner: Learner,
    state: State,
    epochs: int,
    keep: Sequence[Wish] = (),
    metric: str | None = None,
    seeds: Sequence[int] = (0,),
    run: Callable[[Learner, State, int], State] = fit,
) -> Ablation:
    """Train with all callbacks of the learner, then without each in turn, and compare the last rows
    of the history.

    Every run begins with `state`, once with each of `seeds`, which decide the order of the data and
    the chance inside batches; the parameters at the start are those of the state. `keep` are
    callbacks, classes or names, that stay in all runs, as a Recorder does. Callbacks that only show
    or write down what happens take part in none (see `without_reports`). `metric` is the column to
    compare, all if None. `run` is how to train: `functools.partial(fit_one_cycle, lr=0.1)`, say.

    Raises ValueError if there is nothing to leave out or to compare, and KeyboardInterrupt if
    Ctrl-C ended a run.

    >>> import torch
    >>> from functional_sgd import sgd
    >>> from loop import DataLoaders, GradientClip
    >>> x = torch.linspace(-1, 1, 8)[:, None]
    >>> model, data = torch.nn.Linear(1, 1), DataLoaders([(x, 3 * x + 1)])
    >>> loss, clip = torch.nn.functional.mse_loss, GradientClip(0.1)
    >>> learner = Learner(model, data, loss, sgd(lr=0.1), callbacks=[clip])
    >>> table = ablate(learner, learner.init(), epochs=50)
    >>> table.differences("gradient_clip")["train_loss"][0] < 0  # without it, the loss is smaller
    True
    """
    callbacks = without_reports(learner.callbacks)
    tried = [callback for callback in callbacks if not _stays(callback, keep)]
    if not tried or not seeds:
        raise ValueError(
            f"ablate: nothing to compare, with {len(tried)} callbacks to leave out and "
            f"{len(seeds)} seeds. "
            f"Put callbacks into the learner (and not all into keep), and give at least one seed."
        )

    def scores(callbacks: Sequence[object]) -> Scores:
        alone = replace(learner, callbacks=tuple(callbacks))
        rows = []
        for seed in seeds:
            end = run(alone, state.replace(seed=seed), epochs)
            rows.append(_last_row(end, state, metric))
        return _by_column(rows)

    full = scores(callbacks)
    without: dict[str, Scores] = {}
    for one in tried:
        others = [other for other in callbacks if other is not one]
        without[name_of(one)] = _like(full, scores(others))
    return Ablation(full, without, tuple(seeds))


def _stays(callback: object, keep: Sequence[Wish]) -> bool:
    for wish in keep:
        if isinstance(wish, str):
            if name_of(callback) == wish:
                return True
        elif isinstance(callback, wish):
            return True
    return isinstance(callback, Recorder)


def _last_row(end: State, start: State, metric: str | None) -> dict[str, float]:
    """The measured columns of the last epoch of a run, as numbers; none if the run had no epoch."""
    # `run` may have been given stop="return", and half a run must not be compared.
    if end.stopped:
        raise KeyboardInterrupt(f"ablate: a run was ended by {end.stopped}.")
    rows = end.history.rows[len(start.history.rows) :]
    last = rows[-1] if rows else {}
    measured = {name: value for name, value in last.items() if name not in _COUNTERS}
    if metric is not None and metric not in measured:
        raise ValueError(
            f"ablate: the history has no column {metric!r}. {did_you_mean(metric, measured)}"
        )
    if metric is not None:
        return {metric: _number(measured[metric])}
    return {name: _number(value) for name, value in measured.items()}


def _by_column(rows: Sequence[Mapping[str, float]]) -> Scores:
    columns: dict[str, tuple[float, ...]] = {}
    for name in column_names(rows):
        values = [row.get(name, math.nan) for row in rows]
        columns[name] = tuple(values)
    return columns


def _like(full: Scores, found: Scores) -> Scores:
    """The columns of the full run; NaN where the other does not have them."""
    columns: dict[str, tuple[float, ...]] = {}
    for name, values in full.items():
        missing = (math.nan,) * len(values)
        columns[name] = found.get(name, missing)
    return columns


_COUNTERS = ("epoch", "train_iter")


def _number(value: SupportsFloat | None) -> float:
    return math.nan if value is None else float(value)


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.6f}"


def _change(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:+.6f}"
    squares = [(value - mean) * (value - mean) for value in values]
    spread = math.sqrt(sum(squares) / (len(values) - 1))
    return f"{mean:+.6f} ± {spread:.6f}"
