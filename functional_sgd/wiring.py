"""Check, when a chain is built, that every rule finds what it reads; and write down who reads and
writes what.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from functional_sgd.rule import COUNTER, FROM_CALLER, REQUIRED, Rule, providers, writes_of


@dataclass(frozen=True)
class Call:
    """One rule in its place in a chain, with every name resolved."""

    rule: Rule
    reads: tuple[tuple[str, str], ...]  # (the function's parameter, the column that it gets)
    scalars: tuple[
        tuple[str, str], ...
    ]  # (the function's parameter, the hyper, extra or step that it gets)
    writes: tuple[
        tuple[str, str], ...
    ]  # (the key in the function's dict, the column that it becomes)

    def run(self, columns: Mapping[str, Any], scalars: Mapping[str, Any]) -> dict[str, Any]:
        """Call the rule on columns and scalars by the chain's names: column -> what it writes
        there.
        """
        reads = {inner: columns[outer] for inner, outer in self.reads}
        result = self.rule.function(
            **reads, **{inner: scalars[outer] for inner, outer in self.scalars}
        )
        return {outer: result[inner] for inner, outer in self.writes}

    @property
    def treewise(self) -> bool:
        """Whether the rule must see all leaves at once."""
        return self.rule.scope == "treewise"


def wire(rules: Sequence[Rule]) -> tuple[Call, ...]:
    """The calls of a chain of rules, in order.

    Raises ValueError if a column is missing, a slot has two owners, or nothing writes `param`.
    """
    owners = slot_owners(rules)
    written: set[str] = set()
    calls = [_wire_one(rule, written, owners) for rule in rules]
    if rules and "param" not in written:
        raise ValueError(
            f"chain: no rule writes 'param', so nothing would move: {', '.join(map(repr, rules))}. "
            f"End the chain with a step, such as sgd_step."
        )
    return tuple(calls)


def slot_owners(rules: Iterable[Rule]) -> dict[str, Rule]:
    """Which rule keeps each slot. Raises ValueError if two rules want the same one."""
    owners: dict[str, Rule] = {}
    for rule in rules:
        for slot in rule.slots:
            if slot in FROM_CALLER or slot == COUNTER:
                raise ValueError(
                    f"chain: rule {rule!r} may not keep a slot called {slot!r}; rename it."
                )
            if slot in owners:
                raise ValueError(
                    f"chain: slot {slot!r} has two owners, {owners[slot]!r} and {rule!r}. "
                    f"Give one of them another name: rename({rule.name}, {slot}='slow_{slot}')."
                )
            owners[slot] = rule
    return owners


def scalar_defaults(rules: Iterable[Rule], given: Mapping[str, Any]) -> dict[str, Any]:
    """Every hyper and extra that the rules read -> its default, or REQUIRED; `given` wins over the
    rules' own defaults.

    Raises ValueError if two rules disagree and `given` does not decide, or if `given` has a name
    that no rule reads.
    """
    defaults: dict[str, Any] = {}
    source: dict[str, Rule] = {}
    for rule in rules:
        for inner, default in rule.scalars.items():
            name = rule.outer(inner)
            if name == COUNTER:
                continue
            if name not in defaults or (defaults[name] is REQUIRED and name not in given):
                defaults[name], source[name] = default, rule
            elif default is not REQUIRED and name not in given and default != defaults[name]:
                raise ValueError(
                    f"chain: hyper {name!r} has two defaults, {defaults[name]!r} from "
                    f"{source[name]!r} and "
                    f"{default!r} from {rule!r}. Decide with chain(..., {name}=...), or rename one."
                )
    for name in given:
        if name not in defaults:
            raise ValueError(f"chain: no rule reads {name!r}. {did_you_mean(name, defaults)}")
    return {**defaults, **given}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known names: {', '.join(names) or 'none'}."


def _wire_one(rule: Rule, written: set[str], owners: Mapping[str, Rule]) -> Call:
    available = {*FROM_CALLER, *written, *rule.slots}
    reads = []
    for inner in rule.columns:
        outer = rule.outer(inner)
        if outer in available:
            reads.append(
                (inner, "grad" if outer == "update" and "update" not in written else outer)
            )
        elif inner not in rule.optional:
            raise ValueError(_missing_column(rule, outer, owners))
    names = writes_of(rule, frozenset(inner for inner, _ in reads))
    writes = tuple((inner, rule.outer(inner)) for inner in names)
    for _, outer in writes:
        if outer in owners and outer not in written and owners[outer] is not rule:
            raise ValueError(
                f"chain: rule {rule!r} writes {outer!r} before its owner {owners[outer]!r} has run."
            )
    written.update(outer for _, outer in writes)
    scalars = tuple((inner, rule.outer(inner)) for inner in rule.scalars)
    return Call(rule, tuple(reads), scalars, writes)


def _missing_column(rule: Rule, name: str, owners: Mapping[str, Rule]) -> str:
    if name in owners:
        return f"chain: rule {rule!r} reads {name!r} before {owners[name]!r} has written it. Put it after that rule."
    found = providers(name)
    cure = f"Put {' or '.join(found)} before it." if found else "Put a rule that writes it before."
    return f"chain: rule {rule!r} reads {name!r}, which neither the caller nor an earlier rule provides. {cure}"
