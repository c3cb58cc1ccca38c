"""What recipes are made with."""

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from functional_sgd.errors import did_you_mean
from functional_sgd.rule import Rule
from functional_sgd.rules import l2_reg

Given = ParamSpec("Given")
Made = TypeVar("Made")


def recipe(make: Callable[Given, Made]) -> Callable[Given, Made]:
    """The recipe, whose error about a keyword that it does not have says what that is called here.

    >>> from functional_sgd import adamw
    >>> adamw(weight_decay=0.1)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    TypeError: adamw: got an unexpected keyword 'weight_decay'. 'weight_decay' is called wd here...
    """

    @functools.wraps(make)
    def made(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        try:
            return make(*args, **kwargs)
        except TypeError:
            known = inspect.signature(make).parameters
            for name in kwargs:
                if name not in known:
                    raise TypeError(
                        f"{make.__name__}: got an unexpected keyword {name!r}. "
                        f"{did_you_mean(name, known)}"
                    ) from None
            raise

    return made


def l2(wd: float | None) -> list[Rule]:
    """The L2 penalty, if there is one."""
    # wd = 0 has its rule: a schedule may raise it later.
    return [] if wd is None else [l2_reg]


def given(**hypers: float | None) -> dict[str, float]:
    """The hypers that are not None."""
    return {name: value for name, value in hypers.items() if value is not None}
