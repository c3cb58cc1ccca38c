"""Which backends an optimizer has now: those that fail are left out for a while."""

import sys
import time
import warnings
from collections.abc import Sequence

from functional_sgd.fusion.backends.backend import Backend, Unavailable

_PACKAGE = __name__.partition(".")[0]


class AvailableBackends:
    """The backends of an optimizer, best first, but for those that have failed a short time ago."""

    def __init__(self, backends: Sequence[Backend]) -> None:
        self.every = list(backends)
        self._away: dict[str, float] = {}  # those that failed, and when to try them again
        # A missing compiler is reported to the caller of fuse, not at the first step.
        for backend in self.every:
            try:
                backend.probe()
            except Unavailable as error:
                self.give_up(error)

    def working(self) -> list[Backend]:
        """Those that can be asked."""
        if not self._away:
            return self.every
        now = time.monotonic()
        return [one for one in self.every if self._away.get(one.name, 0.0) <= now]

    def give_up(self, error: Unavailable) -> None:
        """Do without a backend for a while, and say what is lost, once for each reason."""
        self._away[error.backend.name] = error.retry_at
        if (error.backend.name, str(error)) in _warned:
            return
        _warned.add((error.backend.name, str(error)))
        others = [one.name for one in self.working()]
        lost = f"{error.backend.name} is left out; what is left is {', '.join(others) or 'nothing'}"
        if others == ["foreach"]:
            lost = "Optimizers run with foreach operators, several times slower"
        warnings.warn(f"fuse: {error}. {lost}. {error.cure}", stacklevel=_callers())


_warned: set[tuple[str, str]] = set()


def _callers() -> int:
    """The `stacklevel` of the nearest frame that is not of this package: it is asked by `fuse`, and
    by steps.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        level, frame = level + 1, frame.f_back
    return level
