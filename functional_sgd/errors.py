"""What error messages have in common."""

import difflib
from collections.abc import Iterable

_ELSEWHERE = {
    "learning_rate": "lr",
    "momentum": "mom",
    "beta1": "mom",
    "beta2": "sqr_mom",
    "weight_decay": "wd",
    "epsilon": "eps",
    "max_grad_norm": "max_norm",
    "params": "param",
    "grads": "grad",
    "updates": "update",
    "max_steps": "steps",
    "num_steps": "steps",
    "max_epochs": "epochs",
    "num_train_epochs": "epochs",
}
"""What other libraries call it -> what it is called here."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name.

    >>> did_you_mean("lerning_rate", ["learning_rate", "mom"])
    "Did you mean 'learning_rate'? Known names: learning_rate, mom."
    >>> did_you_mean("weight_decay", ["lr", "wd"])
    "Did you mean 'wd'? Known names: lr, wd."
    """
    names = sorted(known)
    return f"{meant(name, names)}Known names: {', '.join(names) or 'none'}."


def meant(name: str, known: Iterable[str]) -> str:
    """A question with the known name that is close to this one, or what it is called here; empty
    if there is none.

    >>> meant("gradient", ["param", "grad"]), meant("x", ["param", "grad"])
    ("Did you mean 'grad'? ", '')
    """
    names = sorted(known)
    ours = _ELSEWHERE.get(name)
    close = [ours] if ours in names else difflib.get_close_matches(name, names, n=1)
    return f"Did you mean {close[0]!r}? " if close else ""
