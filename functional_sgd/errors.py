"""What error messages have in common."""

import difflib
from collections.abc import Iterable

ELSEWHERE = {
    "learning_rate": ("lr",),
    "momentum": ("mom",),
    "betas": ("mom", "sqr_mom"),
    "b1": ("mom",),
    "beta1": ("mom",),
    "b2": ("sqr_mom",),
    "beta2": ("sqr_mom",),
    "alpha": ("sqr_mom",),
    "rho": ("sqr_mom",),
    "weight_decay": ("wd",),
    "epsilon": ("eps",),
}
"""What hypers are called in torch.optim, optax and papers, and what they are called here."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name.

    >>> did_you_mean("lerning_rate", ["learning_rate", "mom"])
    "Did you mean 'learning_rate'? Known names: learning_rate, mom."
    >>> did_you_mean("weight_decay", ["lr", "wd"])
    "'weight_decay' is called wd here. Known names: lr, wd."
    """
    names = sorted(known)
    ours = [other for other in ELSEWHERE.get(name, ()) if other in names]
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    if ours:
        hint = f"{name!r} is called {' and '.join(ours)} here. "
    return f"{hint}Known names: {', '.join(names) or 'none'}."
