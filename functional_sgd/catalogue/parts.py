"""What recipes are made with."""

from functional_sgd.rule import Rule
from functional_sgd.rules import l2_reg


def l2(wd: float | None) -> list[Rule]:
    """The L2 penalty, if there is one."""
    return [] if wd is None else [l2_reg]


def given(**hypers: float | None) -> dict[str, float]:
    """The hypers that are not None."""
    return {name: value for name, value in hypers.items() if value is not None}
