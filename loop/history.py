"""What happened: a log that grows by returning new logs, and the table of a run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload


class Log(Sequence[Any]):
    """An immutable sequence; `append` returns a new one in constant time.

    All logs grown from one share a list, of which each sees its own length; one that is grown twice
    is copied first.

    >>> short = Log().append(1)
    >>> long, other = short.append(2), short.append(3)
    >>> list(short), list(long), list(other)
    ([1], [1, 2], [1, 3])
    """

    __slots__ = ("_items", "_length")

    def __init__(self, items: Sequence[Any] = ()) -> None:
        self._items = list(items)
        self._length = len(self._items)

    def append(self, item: Any) -> "Log":
        """A log with one more item at the end."""
        items = self._items
        if len(items) != self._length:  # somebody else has grown it already
            items = items[: self._length]
        items.append(item)
        grown = Log.__new__(Log)
        grown._items, grown._length = items, self._length + 1
        return grown

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self._items[: self._length][index]
        position = index + self._length if index < 0 else index
        if not 0 <= position < self._length:
            raise IndexError(f"Log: index {index} is out of range for {self._length} items.")
        return self._items[position]

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items[: self._length])

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Log({list(self)!r})" if len(self) <= 8 else f"Log of {len(self)} items"

    def __reduce__(self) -> Any:
        return Log, (list(self),)


@dataclass(frozen=True)
class History:
    """The table of what happened, written by the Recorder.

    `losses` has the loss of every training batch and `hypers[name]` the hyper that it was trained
    with (0-d tensors or numbers, or trees of them, so that recording never waits for a device);
    `rows` has a dict for every epoch: epoch, train_iter, train_loss (smoothed), valid_loss and the
    metrics, None where there was nothing to measure.
    """

    losses: Log = field(default_factory=Log)
    hypers: Mapping[str, Sequence[Any]] = field(default_factory=dict)
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
        """One column of the table, a value for each epoch."""
        return [row.get(name) for row in self.rows]
