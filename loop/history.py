"""What happened: a log that grows by returning new logs, and the table of a run."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, islice
from threading import Lock
from typing import Any, overload

from functional_sgd.errors import did_you_mean
from functional_sgd.hyper import Hyper
from functional_sgd.notebook import html_table
from loop.columns import Run, joined, packed

SEALED = 1024
"""How many of a log's latest items are kept as they came, before they are packed."""


class Log(Sequence[Any]):
    """An immutable sequence; `append` returns a new one in constant time.

    All logs grown from one share a store, of which each sees its own length; one that is grown
    twice is copied first. What is alike is kept as arrays (a loss takes 4 bytes, not 600), so items
    come out equal in type and value, but are other objects.

    >>> short = Log().append(1)
    >>> long, other = short.append(2), short.append(3)
    >>> list(short), list(long), list(other)
    ([1], [1, 2], [1, 3])
    """

    __slots__ = ("_length", "_store")

    def __init__(self, items: Sequence[object] = ()) -> None:
        items = list(items)
        whole = len(items) - len(items) % SEALED
        self._store = _Store(packed(items[:whole]), items[whole:])
        self._length = len(items)

    @classmethod
    def of(cls, runs: Iterable[Run]) -> "Log":
        """The log of what is in these runs."""
        return cls._seen(_Store(list(runs), []))

    def append(self, item: object) -> "Log":
        """A log with one more item at the end."""
        store = self._store
        with store.lock:
            if store.starts[-1] + len(store.tail) == self._length:
                log = Log.__new__(Log)  # every batch does this some six times
                log._store, log._length = store.add(item), self._length + 1
                return log
        return Log._seen(_Store(self.runs(), []).add(item))  # somebody else has grown it already

    def runs(self) -> list[Run]:
        """The items in runs of what is alike: whole columns, without an object for each item."""
        sealed, loose = self._parts()
        return joined([*sealed, *packed(loose)])

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> object:
        if isinstance(index, slice):
            return list(self)[index]
        position = index + self._length if index < 0 else index
        if not 0 <= position < self._length:
            raise IndexError(f"Log: index {index} is out of range for {self._length} items.")
        return self._store[position]

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        sealed, loose = self._parts()
        return chain(*sealed, loose)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Log({list(self)!r})" if len(self) <= 8 else f"Log of {len(self)} items"

    def __reduce__(self) -> tuple[Callable[[list[Run]], "Log"], tuple[list[Run]]]:
        # Not the store: its lock cannot be pickled, and it has the items of later logs too.
        return Log.of, (self.runs(),)

    @classmethod
    def _seen(cls, store: "_Store") -> "Log":
        """All that is in a store."""
        log = cls.__new__(cls)
        log._store, log._length = store, store.length
        return log

    def _parts(self) -> tuple[list[Run], list[object]]:
        """What this log sees of the store: sealed runs, and loose items after them."""
        store, left = self._store, self._length
        seen: list[Run] = []
        with store.lock:
            for run in store.runs:
                # Packed since this log was made: its last items are those of later logs.
                if left < len(run):
                    return seen, list(islice(run, left))
                seen.append(run)
                left -= len(run)
            return seen, store.tail[:left]


class _Store:
    """What logs share: sealed runs, and the latest items as they came. It only grows."""

    def __init__(self, runs: list[Run], tail: list[object]) -> None:
        self.runs = runs
        self.starts = list(accumulate(map(len, runs), initial=0))  # of the runs, and of the tail
        self.tail = tail
        self.lock = Lock()  # two fits in two threads may go on from one state

    @property
    def length(self) -> int:
        return self.starts[-1] + len(self.tail)

    def add(self, item: object) -> "_Store":
        """The store itself, with an item more."""
        self.tail.append(item)
        if len(self.tail) == SEALED:
            runs, self.tail = packed(self.tail), []
            self.runs.extend(runs)
            for run in runs:
                self.starts.append(self.starts[-1] + len(run))
        return self

    def __getitem__(self, position: int) -> object:
        with self.lock:
            at = bisect_right(self.starts, position) - 1
            held = self.runs[at] if at < len(self.runs) else self.tail
            return held[position - self.starts[at]]


@dataclass(frozen=True, repr=False)
class History:
    """The table of what happened, written by the Recorder.

    `losses` has the loss of every training batch and `hypers[name]` the hyper that it was trained
    with (0-d tensors or numbers, or trees of them, so that recording never waits for a device), or
    None if the batch had no such hyper: item k of each is that of losses[k].
    `rows` has a dict for every epoch: epoch, train_iter, train_loss (smoothed), valid_loss and the
    metrics, None where there was nothing to measure.
    """

    losses: Log = field(default_factory=Log)
    hypers: Mapping[str, Sequence[Hyper]] = field(default_factory=dict)
    rows: tuple[Mapping[str, Any], ...] = ()

    def smooth_losses(self, beta: float = 0.98) -> list[float]:
        """The losses averaged exponentially and debiased; over all runs, while a smooth_loss begins
        anew in each.

        >>> [round(loss, 3) for loss in History(losses=Log([1.0, 2.0])).smooth_losses()]
        [1.0, 1.505]
        """
        average, smooth = 0.0, []
        for count, loss in enumerate(self.losses, start=1):
            average = beta * average + (1 - beta) * float(loss)
            smooth.append(average / (1 - beta**count))
        return smooth

    def column(self, name: str) -> list[Any]:
        """One column of the table, a value for each epoch, None where a row has none.

        Raises ValueError if there are rows, and none of them has it.
        """
        if self.rows and all(name not in row for row in self.rows):
            known = column_names(self.rows)
            raise ValueError(
                f"History: there is no column {name!r} in any row. {did_you_mean(name, known)}"
            )
        return [row.get(name) for row in self.rows]

    def __repr__(self) -> str:
        last = self.rows[-1] if self.rows else {}
        values = "".join(f", {name} {number_text(value)}" for name, value in last.items())
        return f"History({len(self.rows)} rows, {len(self.losses)} losses{values})"

    def _repr_html_(self) -> str:
        """The rows as a table."""
        titles = column_names(self.rows)
        rows = []
        for row in self.rows:
            cells = [number_text(row.get(name)) for name in titles]
            rows.append(cells)
        caption = "" if rows else repr(self)
        return html_table(rows, titles, left=0, caption=caption)


def column_names(rows: Iterable[Mapping[str, object]]) -> list[str]:
    """The columns of a table, in the order in which they first come.

    >>> column_names([{"epoch": 0}, {"epoch": 1, "accuracy": 0.5}])
    ['epoch', 'accuracy']
    """
    # A dict, not a set, which would lose the order.
    return list(dict.fromkeys(chain.from_iterable(rows)))


def number_text(value: float | str | None) -> str:
    """A cell of the table of a run: "-" for what was not measured.

    >>> number_text(None), number_text(3), number_text(0.25)
    ('-', '3', '0.250000')
    """
    if value is None:
        return "-"
    if isinstance(value, (int, str)):
        return str(value)
    return f"{value:.6f}"
