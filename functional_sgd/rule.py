"""What a rule is: a plain function on tensors; its signature says what it reads, its dict what it
writes.
"""

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor

Scope: TypeAlias = Literal["elementwise", "leafwise", "treewise"]
RuleFunction: TypeAlias = Callable[..., Mapping[str, Any]]
Initializer: TypeAlias = Callable[[Tensor], Tensor]

FROM_CALLER = ("param", "grad", "update")
"""Columns that are there before any rule has run; `update` is `grad` until a rule writes it."""

COUNTER = "step"
"""The one scalar that the state itself provides: how many updates, counted from 1."""

REQUIRED = inspect.Parameter.empty
"""Stands for "no default": the caller must pass this hyper or extra."""

_known_rules: weakref.WeakSet["Rule"] = weakref.WeakSet()


@dataclass(frozen=True, eq=False)
class Rule:
    """A step of an optimizer, as a value: call it like the function it was, or put it into a chain.

    Made by `elementwise`, `leafwise` and `treewise`. Two rules are equal when they are the same
    function with the same scope, slots and names.

    >>> from functional_sgd import average_grad
    >>> average_grad, average_grad.scope, average_grad.columns, average_grad.slots
    (average_grad, 'elementwise', ('grad', 'grad_avg'), ('grad_avg',))
    """

    function: RuleFunction
    scope: Scope
    initializers: Mapping[str, Initializer]  # slot -> its first value, by the function's own names
    declared_writes: tuple[str, ...] | None = None  # what it writes, if a trial run cannot tell
    renames: Mapping[str, str] = field(
        default_factory=dict
    )  # the function's name -> the chain's name
    columns: tuple[str, ...] = field(
        init=False
    )  # what it reads of every leaf, by the function's names
    optional: frozenset[str] = field(init=False)  # the columns it can do without
    scalars: Mapping[str, Any] = field(init=False)  # hypers and extras -> default or REQUIRED

    def __post_init__(self) -> None:
        columns, optional, scalars = _read_signature(self.function, self.initializers)
        for name, value in (("columns", columns), ("optional", optional), ("scalars", scalars)):
            object.__setattr__(self, name, value)
        for name in ("__name__", "__qualname__", "__module__", "__doc__"):
            object.__setattr__(self, name, getattr(self.function, name))
        object.__setattr__(self, "__signature__", inspect.signature(self.function))
        _known_rules.add(self)

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.__name__

    @property
    def slots(self) -> tuple[str, ...]:
        """The named state that this rule owns, by the chain's names."""
        return tuple(self.outer(slot) for slot in self.initializers)

    def outer(self, name: str) -> str:
        """What the chain calls the function's `name`."""
        return self.renames.get(name, name)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Call the function; after `rename`, keywords and results have the new names."""
        inner = {outer: name for name, outer in self.renames.items()}
        result = self.function(
            *args, **{inner.get(name, name): value for name, value in kwargs.items()}
        )
        return {self.outer(name): value for name, value in result.items()}

    def _identity(self) -> tuple[Any, ...]:
        return (
            self.function,
            self.scope,
            tuple(self.initializers.items()),
            tuple(sorted(self.renames.items())),
        )

    def __eq__(self, other: object) -> bool:
        return self._identity() == other._identity() if isinstance(other, Rule) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.function, self.scope, tuple(sorted(self.renames.items()))))

    def __repr__(self) -> str:
        if not self.renames:
            return self.name
        return f"rename({self.name}, {', '.join(f'{old}={new!r}' for old, new in self.renames.items())})"

    def __reduce__(self) -> str | tuple[Any, ...]:
        plain = inspect.getattr_static(inspect.getmodule(self.function), self.name, None)
        if self == plain:
            return self.name
        if isinstance(plain, Rule) and plain.function is self.function:
            return _rename_from, (plain, dict(self.renames))
        return Rule, (
            self.function,
            self.scope,
            self.initializers,
            self.declared_writes,
            self.renames,
        )


@overload
def elementwise(function: RuleFunction, /) -> Rule: ...
@overload
def elementwise(
    *, writes: Iterable[str] | None = None, **slots: Initializer
) -> Callable[[RuleFunction], Rule]: ...
def elementwise(
    function: RuleFunction | None = None, /, *, writes: Any = None, **slots: Any
) -> Any:
    """A rule in which the result for each element depends on that element alone.

    The decorated function takes columns (a tensor for each leaf) by position and hypers (scalars)
    by keyword, and returns a dict of what it writes. A column or hyper with a default is optional.
    The keywords of the decorator declare the state slots that the rule owns: `slot=first_value`,
    where `first_value(param)` returns a tensor; half-precision parameters are seen as float32.

    `writes` lists the names of the dict, for a rule that cannot be tried on a 2 x 2 tensor of ones.

    Raises TypeError when the signature cannot be read that way.

    >>> import torch
    >>> @elementwise
    ... def sign_step(param, update, *, lr):
    ...     return dict(param=param - lr * update.sign())
    >>> sign_step(torch.tensor([1.0]), torch.tensor([-3.0]), lr=0.5)
    {'param': tensor([1.5000])}
    """
    return _decorate("elementwise", function, writes, slots)


@overload
def leafwise(function: RuleFunction, /) -> Rule: ...
@overload
def leafwise(
    *, writes: Iterable[str] | None = None, **slots: Initializer
) -> Callable[[RuleFunction], Rule]: ...
def leafwise(function: RuleFunction | None = None, /, *, writes: Any = None, **slots: Any) -> Any:
    """A rule that sees one whole leaf with its shape; other leaves do not matter. Used like
    `elementwise`.

    >>> import torch
    >>> @leafwise
    ... def unit_norm(update):
    ...     return dict(update=update / update.norm())
    >>> unit_norm(torch.tensor([3.0, 4.0]))
    {'update': tensor([0.6000, 0.8000])}
    """
    return _decorate("leafwise", function, writes, slots)


@overload
def treewise(function: RuleFunction, /) -> Rule: ...
@overload
def treewise(
    *, writes: Iterable[str] | None = None, **slots: Initializer
) -> Callable[[RuleFunction], Rule]: ...
def treewise(function: RuleFunction | None = None, /, *, writes: Any = None, **slots: Any) -> Any:
    """A rule that sees whole trees, built like params (None where a leaf has no gradient). Used
    like `elementwise`.

    >>> import optree, torch
    >>> @treewise
    ... def subtract_mean(grad):
    ...     leaves = optree.tree_leaves(grad)
    ...     mean = sum(leaf.sum() for leaf in leaves) / sum(leaf.numel() for leaf in leaves)
    ...     return dict(grad=optree.tree_map(lambda leaf: leaf - mean, grad))
    >>> subtract_mean({"a": torch.tensor([1.0]), "b": torch.tensor([3.0])})
    {'grad': {'a': tensor([-1.]), 'b': tensor([1.])}}
    """
    return _decorate("treewise", function, writes, slots)


def rename(rule: Rule, **names: str) -> Rule:
    """The same rule under other names: `rename(average_grad, grad_avg="slow_avg", mom="slow_mom")`.

    Each keyword is a column, slot or hyper of the rule; its value is the name it has in the chain.
    So a chain can keep two averages, or apply a rule of gradients to the update. Raises ValueError
    for a name that the rule does not have.

    >>> from functional_sgd import average_grad
    >>> rename(average_grad, grad_avg="slow_avg", mom="slow_mom").slots
    ('slow_avg',)
    """
    if not isinstance(rule, Rule):
        raise TypeError(
            f"rename: expected a rule, got {rule!r}. Rename the rules before chaining them."
        )
    known = {rule.outer(name): name for name in (*rule.columns, *rule.scalars, *_own_writes(rule))}
    for old in names:
        if old not in known or old == COUNTER:
            raise ValueError(
                f"rename: rule {rule.name} has no name {old!r}; it has {', '.join(sorted(known))}."
            )
    renames = {**rule.renames, **{known[old]: new for old, new in names.items()}}
    kept = {inner: outer for inner, outer in renames.items() if inner != outer}
    for group in ((*rule.columns, *rule.scalars), _own_writes(rule)):
        outer = [kept.get(name, name) for name in group]
        if len(set(outer)) < len(outer):
            twice = next(name for name in outer if outer.count(name) > 1)
            raise ValueError(
                f"rename: two things in rule {rule.name} would be called {twice!r}. Choose another "
                f"name."
            )
    return Rule(rule.function, rule.scope, rule.initializers, rule.declared_writes, kept)


@functools.lru_cache(maxsize=4096)
def writes_of(rule: Rule, available: frozenset[str]) -> tuple[str, ...]:
    """What the rule writes (its own names) when these of its columns are available: found by a
    trial run on ones.

    Raises TypeError, with the cure, if the run fails or returns anything but a dict of tensors of
    the right shape.
    """
    if rule.declared_writes is not None:
        return rule.declared_writes
    ones = torch.ones(2, 2, device="cpu")
    value = {"leaf": ones} if rule.scope == "treewise" else ones
    columns = {name: value for name in rule.columns if name in available}
    scalars = {
        name: 0.5 if default is REQUIRED else default for name, default in rule.scalars.items()
    }
    if COUNTER in scalars:
        scalars[COUNTER] = torch.ones((), dtype=torch.float64, device="cpu")
    try:
        with torch.no_grad():
            result = rule.function(**columns, **scalars)
    except Exception as error:
        raise TypeError(
            f"rule {rule.name}: its trial run on a 2 x 2 tensor of ones raised "
            f"{type(error).__name__}: {error}. "
            f"Mend the rule, or say what it writes: @{rule.scope}(writes=('update',))."
        ) from error
    _check_result(rule, result)
    return tuple(result)


def providers(name: str) -> list[str]:
    """The rules, known so far, that would provide a column of this name (for error messages)."""
    found = {rule.name for rule in _known_rules if not rule.renames and name in rule.initializers}
    return sorted(found)


def _own_writes(rule: Rule) -> tuple[str, ...]:
    return writes_of(rule, frozenset(rule.columns))


def _decorate(
    scope: Scope, function: RuleFunction | None, writes: Iterable[str] | None, slots: Any
) -> Any:
    if function is not None:
        return Rule(function, scope, {})
    declared = None if writes is None else tuple(writes)
    return lambda decorated: Rule(decorated, scope, dict(slots), declared)


def _rename_from(rule: Rule, names: Mapping[str, str]) -> Rule:
    return rename(rule, **names)


def _read_signature(
    function: RuleFunction, slots: Mapping[str, Initializer]
) -> tuple[tuple[str, ...], frozenset[str], Mapping[str, Any]]:
    """(columns, optional columns, scalars with defaults) of a rule's function."""
    who = f"rule {getattr(function, '__name__', function)!s}"
    if not callable(function):
        raise TypeError(f"{who}: expected a function, got {type(function).__name__}.")
    columns, optional, scalars = [], set(), {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            scalars[name] = parameter.default
        elif parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            columns.append(name)
            if parameter.default is not REQUIRED:
                optional.add(name)
        else:
            raise TypeError(
                f"{who}: parameter {name!r} must have a plain name: no *args, **kwargs or '/'."
            )
    if COUNTER in columns:
        raise TypeError(f"{who}: {COUNTER!r} is a scalar; write it after a '*' in the signature.")
    for slot, initializer in slots.items():
        if slot not in columns or slot in FROM_CALLER or slot in optional:
            raise TypeError(
                f"{who}: slot {slot!r} must be one of its own required columns, which are "
                f"{columns}."
            )
        if not callable(initializer):
            raise TypeError(
                f"{who}: slot {slot!r} needs a function param -> first value, got {initializer!r}."
            )
    return tuple(columns), frozenset(optional), scalars


def _check_result(rule: Rule, result: Any) -> None:
    if not isinstance(result, Mapping):
        raise TypeError(
            f"rule {rule.name}: expected a dict of what it writes, got {type(result).__name__}. "
            f"End it with, for example, return dict(update=...)."
        )
    for name, value in result.items():
        if name == COUNTER:
            raise TypeError(
                f"rule {rule.name}: may not write {COUNTER!r}, which the state counts itself."
            )
        if rule.scope != "treewise" and not isinstance(value, Tensor):
            raise TypeError(
                f"rule {rule.name}: {name!r} must be a tensor, got {type(value).__name__}."
            )
        if rule.scope == "elementwise" and value.shape != (2, 2):
            raise TypeError(
                f"rule {rule.name}: an elementwise rule keeps the shape of its leaf, but {name!r} "
                f"came out as "
                f"{tuple(value.shape)} for a leaf of (2, 2). Use @leafwise if it looks at the "
                f"whole leaf."
            )
    for slot in rule.initializers:
        if slot not in result:
            raise TypeError(
                f"rule {rule.name}: owns slot {slot!r} but does not write it. Return it in the "
                f"dict."
            )
