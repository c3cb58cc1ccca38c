"""Check, when a chain is built, that every rule finds what it reads; and write down who does what.

The outcome is a list of calls: the rules in order, with every name resolved.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from functional_sgd.errors import did_you_mean, meant
from functional_sgd.ranges import Range, check_no_params, check_number
from functional_sgd.reduction import Reduction
from functional_sgd.rule import Rule, providers
from functional_sgd.signature import DTYPE, FROM_CALLER, KEY, REQUIRED, STEP
from functional_sgd.trial import writes_of

CALLS = "calls"
"""A number of the state: how many calls there were, for rules that write numbers of the tree."""

SEED = "seed"
"""A number of the state: what randomness is a function of, besides step, leaf and element."""

RESERVED = (STEP, CALLS, SEED, KEY, DTYPE)


@dataclass(frozen=True)
class Reduced:
    """A reduction in its place in a chain."""

    parameter: str  # the function's name for the number
    name: str  # the chain's: no two reductions of a chain share it
    reduction: Reduction
    columns: tuple[tuple[str, str], ...]  # (the function's column, the chain's)


@dataclass(frozen=True)
class Call:
    """One rule in its place in a chain, with every name resolved."""

    rule: Rule
    position: int
    reads: tuple[tuple[str, str], ...]  # (the function's parameter, the column that it gets)
    scalars: tuple[tuple[str, str], ...]  # (the function's parameter, the hyper, number or step)
    reductions: tuple[Reduced, ...]
    writes: tuple[tuple[str, str], ...]  # (the key in the function's dict, the column it becomes)
    numbers: tuple[tuple[str, str], ...]  # (the key in its dict, the number of the tree)

    def run(self, columns: Mapping[str, Any], scalars: Mapping[str, Any]) -> dict[str, Any]:
        """Call the rule on columns and scalars by the chain's names: name -> what it writes.

        `scalars` has hypers, numbers of the tree, the step, reductions by name, key and dtype.
        """
        arguments = {inner: columns[outer] for inner, outer in self.reads}
        for inner, outer in self.scalars:
            arguments[inner] = scalars[outer]
        for reduced in self.reductions:
            arguments[reduced.parameter] = scalars[reduced.name]
        if self.rule.signature.random:
            arguments[KEY] = scalars[self.key]
        if self.rule.signature.rounds:
            arguments[DTYPE] = scalars[DTYPE]
        try:
            result = self.rule.function(**arguments)
        except Exception as error:
            error.add_note(f"raised by rule {self.rule!r}, which got {_shapes(arguments)}")
            raise
        written = {}
        for inner, outer in (*self.writes, *self.numbers):
            written[outer] = result[inner]
        return written

    @property
    def key(self) -> str:
        """The name of its key among the scalars: rules of one chain draw different numbers."""
        return f"{KEY}_{self.position}"

    @property
    def treewise(self) -> bool:
        """Whether the rule's function takes whole trees."""
        return self.rule.scope == "treewise"


@dataclass(frozen=True)
class Wiring:
    """The calls of a chain, and what they need from outside."""

    calls: tuple[Call, ...]
    slots: tuple[str, ...]  # of each leaf
    numbers: tuple[str, ...]  # of the tree, `calls` and `seed` among them where they are needed
    given: tuple[str, ...]  # columns that the caller gives at every call
    defaults: Mapping[str, Any]  # every hyper and extra that is read -> default or REQUIRED
    ranges: Mapping[str, tuple[Range, ...]]  # of the hypers


def wire(rules: Sequence[Rule], given: Mapping[str, Any], results: Sequence[str]) -> Wiring:
    """The wiring of a chain of rules whose results are these columns, and its slots.

    Raises ValueError if a column is missing, a slot has two owners, a rule has no effect, nothing
    writes a result, or a hyper's default is ambiguous or out of range.
    """
    owners = slot_owners(rules)
    numbers: set[str] = set()
    for rule in rules:
        numbers.update(rule.numbers)
    wires = _Wires(owners, numbers)
    for position, rule in enumerate(rules):
        wires.add(rule, position)
    # A part of a chain may do without a step; a whole one would silently train nothing.
    if rules and tuple(results) == ("param",) and "param" not in wires.writer:
        raise ValueError(
            f"chain: no rule writes 'param', so nothing would move: "
            f"{', '.join(map(repr, rules))}. End the chain with a step, such as sgd_step."
        )
    _check_effects(wires.calls, results, wires.writer)
    _check_update(wires.calls, results, wires.writer)
    defaults = scalar_defaults(rules, given, numbers)
    ranges = _ranges(rules)
    for name, value in defaults.items():
        check_no_params("chain", name, value, name in ranges)
        if callable(value) and name not in ranges:  # a function that a rule calls
            continue
        # Where no range is declared, None still lets text, booleans and NaN be refused.
        for allowed in ranges.get(name, (None,)):
            check_number("chain", name, value, allowed)
    slots: list[str] = []
    for rule in rules:
        slots.extend(rule.slots)
    return Wiring(
        tuple(wires.calls),
        tuple(slots),
        wires.all_numbers(),
        tuple(wires.given),
        defaults,
        ranges,
    )


def slot_owners(rules: Iterable[Rule]) -> dict[str, Rule]:
    """Which rule keeps each slot and number. Raises ValueError if two rules want the same one."""
    owners: dict[str, Rule] = {}
    for rule in rules:
        for slot in (*rule.slots, *rule.numbers):
            if slot in FROM_CALLER or slot in RESERVED:
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


def scalar_defaults(
    rules: Iterable[Rule], given: Mapping[str, Any], numbers: Iterable[str] = ()
) -> dict[str, Any]:
    """Every hyper and extra that the rules read -> its default, or REQUIRED.

    `given` wins over the rules' own defaults. Raises ValueError if two rules disagree and `given`
    does not decide, or if `given` has a name that no rule reads.
    """
    defaults: dict[str, Any] = {}
    source: dict[str, Rule] = {}
    for rule in rules:
        for inner, default in rule.scalars.items():
            name = rule.outer(inner)
            if name == STEP or name in numbers:
                continue
            if name not in defaults or (defaults[name] is REQUIRED and name not in given):
                defaults[name], source[name] = default, rule
            elif default is not REQUIRED and name not in given and default != defaults[name]:
                raise ValueError(
                    f"chain: hyper {name!r} has two defaults, {defaults[name]!r} from "
                    f"{source[name]!r} and {default!r} from {rule!r}. "
                    f"Decide with chain(..., {name}=...), or rename one."
                )
    for name in given:
        if name not in defaults:
            raise ValueError(f"chain: no rule reads {name!r}. {did_you_mean(name, defaults)}")
    return {**defaults, **given}


@dataclass
class _Wires:
    """What is known while the rules are gone through in order."""

    owners: Mapping[str, Rule]
    numbers: set[str]  # of the tree, whoever owns them
    calls: list[Call] = field(default_factory=list)
    writer: dict[str, int] = field(default_factory=dict)  # column -> the last call that wrote it
    given: dict[str, None] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)  # names of reductions

    def add(self, rule: Rule, position: int) -> None:
        """Find everything that the next rule reads."""
        reads = self._reads(rule)
        columns = dict(reads)
        available = frozenset(columns)
        self._check_belonging(rule, available)
        writes: list[tuple[str, str]] = []
        numbers: list[tuple[str, str]] = []
        for inner in writes_of(rule, available):
            written = numbers if inner in rule.signature.numbers else writes
            written.append((inner, rule.outer(inner)))
        self._check_writes(rule, writes)
        self._check_hypers(rule)
        reductions = []
        for parameter, reduction in rule.signature.reductions.items():
            reductions.append(self._reduced(rule, parameter, reduction, columns))
        for _, outer in writes:
            self.writer[outer] = position
        call = Call(
            rule,
            position,
            reads,
            self._scalars(rule),
            tuple(reductions),
            tuple(writes),
            tuple(numbers),
        )
        self.calls.append(call)

    def all_numbers(self) -> tuple[str, ...]:
        """The numbers of the tree that the state has, in order."""
        names: list[str] = []
        counted = random = False
        for call in self.calls:
            names += [outer for _, outer in call.numbers]
            counted = counted or any(outer == CALLS for _, outer in call.scalars)
            random = random or call.rule.signature.random
        if counted:
            names.append(CALLS)
        if random:
            names.append(SEED)
        return tuple(names)

    def _reads(self, rule: Rule) -> tuple[tuple[str, str], ...]:
        reads = []
        for inner in rule.columns:
            outer = rule.outer(inner)
            if outer == "update" and "update" not in self.writer:
                # Until a rule writes it the update is the gradient: so sgd_step alone is gradient
                # descent.
                reads.append((inner, "grad"))
            elif (
                outer in FROM_CALLER
                or outer in self.writer
                or outer in rule.slots
                or (inner in rule.declared.before and outer in self.owners)
            ):
                reads.append((inner, outer))
            elif inner not in rule.signature.optional:
                if outer in self.numbers:
                    raise ValueError(
                        f"chain: rule {rule!r} reads {outer!r} as a column, but "
                        f"{self.owners[outer]!r} keeps one number of the whole tree under that "
                        f"name. Write it after the '*'."
                    )
                # If a known rule keeps this column, that rule was forgotten. Only unknown names
                # come from the caller.
                if outer in self.owners or providers(outer):
                    raise ValueError(_missing_column(rule, outer, self.owners))
                self.given[outer] = None
                reads.append((inner, outer))
        return tuple(reads)

    def _scalars(self, rule: Rule) -> tuple[tuple[str, str], ...]:
        """The hypers and numbers that a rule reads, and whose step."""
        # What is of the whole tree belongs to no leaf, so neither does its step.
        step = CALLS if rule.numbers or rule.scope == "treewise" else STEP
        scalars = []
        for inner in (*rule.scalars, *rule.signature.numbers):
            outer = rule.outer(inner)
            scalars.append((inner, step if outer == STEP else outer))
        return tuple(scalars)

    def _check_writes(self, rule: Rule, writes: Iterable[tuple[str, str]]) -> None:
        """Raise ValueError for a number of the tree, or a slot whose owner has not run yet."""
        for _, outer in writes:
            owner = self.owners.get(outer)
            if outer in self.numbers:
                raise ValueError(
                    f"chain: rule {rule!r} writes the column {outer!r}, but {owner!r} keeps a "
                    f"number of the tree under that name. Rename one."
                )
            if owner is not None and outer not in self.writer and owner is not rule:
                raise ValueError(
                    f"chain: rule {rule!r} writes {outer!r} before its owner {owner!r} has run."
                )

    def _check_hypers(self, rule: Rule) -> None:
        """Raise ValueError if a hyper has the name of a column that an earlier rule writes."""
        for inner, default in rule.scalars.items():
            outer = rule.outer(inner)
            # `update` behind the * is a slip that Python does not see: the rule would wait for a
            # hyper. A slot may share its name with a hyper: the two are never mixed up.
            is_column = outer in self.writer and outer not in self.owners
            if is_column and default is REQUIRED and outer not in RESERVED:
                raise ValueError(
                    f"chain: rule {rule!r} reads {outer!r} as a hyper, but "
                    f"{self.calls[self.writer[outer]].rule!r} writes a column of that name. "
                    f"Write it before the '*' to read the column, or rename one."
                )

    def _check_belonging(self, rule: Rule, available: frozenset[str]) -> None:
        """Raise ValueError if a column was not written last by the owner of the slot it must be."""
        for inner, slot in rule.declared.belongs:
            if slot not in available:
                continue
            column, owner = rule.outer(inner), rule.outer(slot)
            last = self.writer.get(column)
            if last is not None and last != self.writer.get(owner):
                raise ValueError(
                    f"chain: rule {rule!r} treats {column!r} as the average {owner!r}, but "
                    f"{self.calls[last].rule!r} has written it since. Put {rule.name} right after "
                    f"the rule that keeps {owner!r}, or rename its {column!r}."
                )

    def _reduced(
        self, rule: Rule, parameter: str, reduction: Reduction, reads: Mapping[str, str]
    ) -> Reduced:
        name, count = rule.outer(parameter), 2
        # Executors look reductions up by name, and two rules may use the same one.
        while name in self.taken:
            name, count = f"{rule.outer(parameter)}_{count}", count + 1
        self.taken.add(name)
        columns = tuple((inner, reads[inner]) for inner in reduction.columns)
        return Reduced(parameter, name, reduction, columns)


def _check_effects(
    calls: Sequence[Call], results: Sequence[str], writer: Mapping[str, int]
) -> None:
    """Raise ValueError for a rule of which nothing is ever read: it would run for nothing."""
    needed = set(results)
    if "update" in results and "update" not in writer:
        needed.add("grad")  # the update is the gradient until a rule writes it
    dead: list[Call] = []
    # Backwards: whether a rule has an effect is known once its readers are.
    for call in reversed(calls):
        slots = set(call.rule.slots)
        written = {outer for _, outer in call.writes}
        if not (written & needed or slots or call.numbers):
            dead.append(call)
            continue
        # Earlier writers of these columns matter only if this call reads them as well.
        needed -= written
        needed |= {outer for _, outer in call.reads}
    if dead:
        call = dead[-1]
        names = [outer for _, outer in call.writes]
        written_names = ", ".join(map(repr, names)) or "nothing"
        hints = "".join(meant(name, FROM_CALLER) for name in names if name not in FROM_CALLER)
        raise ValueError(
            f"chain: rule {call.rule!r} has no effect: it writes {written_names}, which no later "
            f"rule reads. {hints}Put it before the rules that should see it, or leave it out."
        )


def _check_update(calls: Sequence[Call], results: Sequence[str], writer: Mapping[str, int]) -> None:
    """Raise ValueError for an update that is written when the step has been taken.

    Its rule keeps slots, so it is not without effect; but the params would go without it.
    """
    last, step = writer.get("update", -1), writer.get("param", -1)
    if "update" in results or not 0 <= step < last:
        return
    read: set[str] = set()
    for call in calls[last + 1 :]:
        read.update(outer for _, outer in call.reads)
    if "update" not in read:
        raise ValueError(
            f"chain: rule {calls[last].rule!r} writes 'update' behind {calls[step].rule!r}, which "
            f"has taken the step, and no later rule reads it. Put it before {calls[step].rule!r}."
        )


def _shapes(arguments: Mapping[str, Any]) -> str:
    """The tensors among the arguments, by their shapes."""
    words = []
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.dim() > 0:  # without hypers and other numbers
            words.append(f"{name}: {tuple(value.shape)}")
    return ", ".join(words)


def _ranges(rules: Iterable[Rule]) -> dict[str, tuple[Range, ...]]:
    found: dict[str, tuple[Range, ...]] = {}
    for rule in rules:
        for inner, allowed in rule.signature.ranges.items():
            name = rule.outer(inner)
            if allowed not in found.get(name, ()):
                found[name] = (*found.get(name, ()), allowed)
    return found


def _missing_column(rule: Rule, name: str, owners: Mapping[str, Rule]) -> str:
    if name in owners:
        return (
            f"chain: rule {rule!r} reads {name!r} before {owners[name]!r} has written it. "
            f"Put it after that rule."
        )
    found = " or ".join(providers(name))
    return (
        f"chain: rule {rule!r} reads {name!r}, which neither the caller nor an earlier rule "
        f"provides. Put {found} before it."
    )
