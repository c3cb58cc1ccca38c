"""What error messages have in common."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name.

    >>> did_you_mean("lerning_rate", ["learning_rate", "mom"])
    "Did you mean 'learning_rate'? Known names: learning_rate, mom."
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known names: {', '.join(names) or 'none'}."
