"""What a run's numbers are when written down: names and floats, lines of a table, lines of a log.
All pure.
"""

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import optree
from torch import Tensor

from functional_sgd.tree import Tree
from loop.history import column_names
from loop.state import State

MOST_GROUPS = 16
"""Of a hyper with more different values than these, only the ends are reported."""


def numbers_of(state: State) -> dict[str, float]:
    """What a state has to report: in a batch its loss and hypers, else the latest row of the
    history.

    The names are those of the hypers and columns. A hyper that is a tree has a name for each group
    of leaves with one value, that of its first leaf, as in "lr/head.weight"; for more than 16
    groups, "lr/lowest" and "lr/highest" alone. What is None, or no single number, is left out, and
    so is train_iter, which is the step to report at. Reads tensors, so it waits for the device.

    >>> state = State({}, {}, {}, {"lr": [0.1, 0.2], "mom": 0.9}, xb=(), loss=Tensor([2.0])[0])
    >>> numbers_of(state)
    {'loss': 2.0, 'lr/0': 0.1, 'lr/1': 0.2, 'mom': 0.9}
    """
    # Between batches a state has no xb.
    if state.xb is not None:
        values = {"loss": state.loss, **state.hyper}
    else:
        rows = state.history.rows
        values = dict(rows[-1]) if rows else {}
        values.pop("train_iter", None)
    named: dict[str, float] = {}
    for name, value in values.items():
        named |= _named(name, value)
    return named


def _named(name: str, value: Tree) -> dict[str, float]:
    """The numbers in a value, by name; equal ones in a tree once."""
    paths, leaves, _ = optree.tree_flatten_with_path(value)
    numbers: dict[str, float] = {}
    seen: set[float] = set()
    for path, leaf in zip(paths, leaves, strict=True):
        number = _plain(leaf)
        if isinstance(number, (int, float)) and number not in seen:
            seen.add(number)
            numbers["/".join([name, *map(str, path)])] = float(number)
    if len(numbers) > MOST_GROUPS:
        low, high = min(numbers.values()), max(numbers.values())
        return {f"{name}/lowest": low, f"{name}/highest": high}
    return numbers


def csv_text(rows: Iterable[Mapping[str, object]]) -> str:
    """A table as CSV: a header of all columns as they first come, then a line for each row, with
    nothing for None.

    Floats are written such that reading them gives the same floats.

    >>> print(csv_text([{"epoch": 0, "loss": 0.1}, {"epoch": 1, "loss": None}]), end="")
    epoch,loss
    0,0.1
    1,
    """
    rows = list(rows)
    if not rows:
        return ""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, column_names(rows), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(_cells(row) for row in rows)
    return file.getvalue()


def rows_of_others(text: str, rows: Sequence[Mapping[str, object]]) -> list[dict[str, str]]:
    """The rows of a table, as text, up to where a history begins that has these rows; all of them
    if it does not.

    >>> rows_of_others("epoch,loss\\n0,0.3\\n0,0.1\\n1,0.05\\n", rows=[{"epoch": 0, "loss": 0.1}])
    [{'epoch': '0', 'loss': '0.3'}]
    """
    found = list(csv.DictReader(io.StringIO(text, newline="")))
    # The csv module puts cells beyond the header under None.
    if any(None in row for row in found):
        raise ValueError("it has a line with more cells than the header")
    if not rows:
        return found
    # Ignore empty cells: the file may have columns that this history lacks.
    first = _known(_cells(rows[0]))
    # Take the last match: an earlier history in the file may have begun with an equal row.
    for index in reversed(range(len(found))):
        if _known(found[index]) == first:
            return found[:index]
    return found


def json_line(values: Mapping[str, object]) -> str:
    """An object on one line; null for what JSON has no number for.

    >>> json_line({"epoch": 0, "loss": float("nan")})
    '{"epoch": 0, "loss": null}\\n'
    """
    finite: dict[str, object] = {}
    for name, value in values.items():
        plain = _plain(value)
        missing = isinstance(plain, float) and not math.isfinite(plain)
        finite[name] = None if missing else plain
    return json.dumps(finite) + "\n"


def lines_up_to(
    lines: Iterable[str], train_iter: int, rows: Sequence[Mapping[str, object]]
) -> list[str]:
    """Of a log of JSON lines, those of batches up to train_iter, and those of epochs that are in
    the history's rows.

    A line that was cut off, as by a crash, ends it. Raises ValueError for a line of something else.
    """
    # Count the rows: a run that failed between writing a row and committing it writes the row again
    # when it is resumed.
    epochs = Counter((row.get("epoch"), row.get("train_iter")) for row in rows)
    kept = []
    for line in lines:
        if not line.endswith("\n"):
            break
        try:
            entry = json.loads(line)
            place = entry.get("epoch"), entry["train_iter"]
            known = epochs[place] > 0 if "epoch" in entry else entry["train_iter"] <= train_iter
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f"it has the line {line[:80]!r}") from None
        if known:
            kept.append(line)
            epochs[place] -= 1
    return kept


def common_start(one: bytes, other: bytes) -> int:
    """How many bytes both begin with.

    >>> common_start(b"abcd", b"abxd"), common_start(b"ab", b"abcd")
    (2, 2)
    """
    # By halves: slices are compared 100 times as fast as bytes one by one, and logs grow long.
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _plain(value: object) -> object:
    """A tensor of one element, or a number of numpy's, as a number of Python's."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.detach().item()
    if isinstance(value, np.generic):
        return value.item()
    return value


def _cells(row: Mapping[str, object]) -> dict[str, str]:
    cells = {}
    for name, value in row.items():
        plain = _plain(value)
        cells[name] = "" if plain is None else str(plain)
    return cells


def _known(row: Mapping[str, str]) -> dict[str, str]:
    return {name: cell for name, cell in row.items() if cell}
