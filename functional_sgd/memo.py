"""Remember what a function says of objects, by their identity."""

from collections.abc import Callable
from typing import Any

_ROOM = 64

_known: dict[tuple[int, ...], tuple[object, Any]] = {}


def by_identity(function: Callable[..., Any], *columns: tuple[Any, ...]) -> Any:
    """`function(*columns)`, once for the same objects; the function may depend on nothing else.

    For objects that take longer to compare than the function's caller has, and mostly are the same
    from call to call. As long as they are remembered, nothing else has their addresses.

    >>> column = (object(), object())
    >>> by_identity(list, column) is by_identity(list, column)
    True
    """
    # With the sizes, two columns are not taken for one column of the same objects.
    ids = [id(function), *map(len, columns)]
    for column in columns:
        ids += map(id, column)
    key = tuple(ids)
    found = _known.get(key)
    if found is None:
        if len(_known) >= _ROOM:
            _known.clear()
        found = _known[key] = columns, function(*columns)
    return found[1]
