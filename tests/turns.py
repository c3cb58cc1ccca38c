"""Where a matrix of recipes and ways to run them is slow, recipes take turns with the ways.

Each recipe is tried, and each way with many of them; what goes wrong with one recipe in one way
only is for the long form, LAWS=long, which tries all of them.
"""

import os
from collections.abc import Iterable, Sequence
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")

LONG = os.environ.get("LAWS") == "long"


def in_turns(ones: Iterable[A], others: Sequence[B], each: int = 1) -> list[tuple[A, B]]:
    """Pairs: for each of the first, so many of the second, the next ones every time.

    >>> in_turns("abc", [1, 2])
    [('a', 1), ('b', 2), ('c', 1)]
    """
    count = len(others) if LONG else min(each, len(others))
    return [
        (one, others[(number * count + k) % len(others)])
        for number, one in enumerate(ones)
        for k in range(count)
    ]


def of_turn(ones: Iterable[A], turn: int, turns: int) -> list[A]:
    """Those whose turn it is; all of them in the long form.

    >>> of_turn("abcde", 1, 3)
    ['b', 'e']
    """
    return [*ones] if LONG else [*ones][turn % turns :: turns]
