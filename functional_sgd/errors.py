"""What error messages have in common."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

NAMES_ELSEWHERE: dict[str, tuple[str, ...]] = {
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

_OTHER_NAMES = {
    "max_grad_norm": ("max_norm",),
    "params": ("param",),
    "grads": ("grad",),
    "updates": ("update",),
    "max_steps": ("steps",),
    "num_steps": ("steps",),
    "max_epochs": ("epochs",),
    "num_train_epochs": ("epochs",),
    "n_epoch": ("epochs",),
    "n_epochs": ("epochs",),
    "cbs": ("callbacks",),
    "lr_max": ("lr",),
    "max_lr": ("lr",),
}
"""The same for columns of rules, and for what a run is told."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name.

    >>> did_you_mean("lerning_rate", ["learning_rate", "mom"])
    "Did you mean 'learning_rate'? Known names: learning_rate, mom."
    >>> did_you_mean("weight_decay", ["lr", "wd"])
    "'weight_decay' is called wd here. Known names: lr, wd."
    """
    names = sorted(known)
    return f"{meant(name, names)}Known names: {', '.join(names) or 'none'}."


def meant(name: str, known: Iterable[str]) -> str:
    """What a name is called here, or a question with the one that is close to it; empty if there is
    none.

    >>> meant("gradient", ["param", "grad"]), meant("x", ["param", "grad"])
    ("Did you mean 'grad'? ", '')
    """
    names = sorted(known)
    here = {**NAMES_ELSEWHERE, **_OTHER_NAMES}.get(name, ())
    ours = [other for other in here if other in names]
    if ours:
        return f"{name!r} is called {' and '.join(ours)} here. "
    close = difflib.get_close_matches(name, names, n=1)
    return f"Did you mean {close[0]!r}? " if close else ""


def elsewhere(owner: object, name: str, hints: Mapping[str, str]) -> Any:
    """For a __getattr__: the error of an attribute that is not there, with what it is called here.

    Without a hint it is looked up once more, which raises what it has raised: that of a property,
    say.
    """
    if name in hints:
        kind = type(owner).__name__
        raise AttributeError(
            f"{kind!r} object has no attribute {name!r}. Here it is {hints[name]}."
        )
    return object.__getattribute__(owner, name)
