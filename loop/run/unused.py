"""Parameters that a run does not train, though nobody has frozen them: the loss does not depend on
them.
"""

import warnings
from collections.abc import Collection, Mapping

from torch import Tensor

_SHOWN = 8  # names in the warning


class Unused:
    """Which parameters have got no gradient yet, in the first training phase of a run."""

    def __init__(self) -> None:
        self.names: list[str] | None = None  # None before the first batch
        self.batches = 0

    def look(self, grads: Mapping[str, Tensor | None], frozen: Collection[str]) -> None:
        """Count a batch in."""
        if self.names is None:
            self.names = [*grads]
        if self.names:  # of most models none is left after the first batch
            self.batches += 1
            self.names = [one for one in self.names if grads[one] is None and one not in frozen]

    def warn(self) -> None:
        """The phase is over: say which are left, once."""
        names, self.names = self.names, []
        if not names:
            return
        count, more = len(names), len(names) - _SHOWN
        listed = ", ".join(map(repr, names[:_SHOWN]))
        if more > 0:
            listed += f" and {more} more"
        what = "1 parameter" if count == 1 else f"{count} parameters"
        when = "the one batch" if self.batches == 1 else f"any of the {self.batches} batches"
        warnings.warn(
            f"Learner: the loss does not depend on {what} in {when} of the first epoch, so there "
            f"was no gradient, and no training: {listed}. Does forward leave a layer out, or "
            f"detach it? Mend that; or, if it is meant so, freeze what is not trained, and this is "
            f"not said: callbacks=[Freeze({names[0]!r})].",
            stacklevel=2,
        )
