"""What a rule is: a plain function on tensors.

Its signature says what it reads, its dict what it writes.

    @elementwise(grad_avg=torch.zeros_like, weight=0.0)       slots: of each leaf, of the whole tree
    def rule(param, grad, update, grad_avg, hessian,          columns: a tensor for each leaf
             *, lr, mom=0.9,                                  hypers
             weight,                                          a number of the whole tree
             length=norm("grad", over="tree"),                a number made of columns
             step, key, dtype): ...      updates of this leaf; randomness; in what it is kept
"""

import inspect
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, overload

import torch

from functional_sgd.signature import KEY as KEY
from functional_sgd.signature import REQUIRED as REQUIRED
from functional_sgd.signature import STEP as STEP
from functional_sgd.signature import (
    Initializer,
    RuleFunction,
    Scope,
    Signature,
    Slot,
    read_signature,
)

_known_rules: weakref.WeakSet["Rule"] = weakref.WeakSet()
_lock = threading.Lock()  # a thread may make a rule while another one looks through them


@dataclass(frozen=True)
class Declared:
    """What the decorator says besides slots, by the function's own names."""

    writes: tuple[str, ...] | None = None  # what it writes, if a trial run cannot tell
    belongs: tuple[tuple[str, str], ...] = ()  # (a column, the slot that it must be)
    before: tuple[str, ...] = ()  # slots of later rules, read as the step before left them
    evaluate: str | None = None  # the slot that is to be evaluated in place of the params
    positive: tuple[str, ...] = ()  # slots that are never negative
    blocks: tuple[tuple[str, str], ...] = ()  # (a slot of codes, that of their blocks' scales)


@dataclass(frozen=True, eq=False)
class Rule:
    """A step of an optimizer, as a value: call it like the function it was, or put it into a chain.

    Made by `elementwise`, `leafwise` and `treewise`. Two rules are equal when they are the same
    function with the same scope, slots and names, of which the same has been declared.

    >>> from functional_sgd import average_grad
    >>> average_grad, average_grad.scope, average_grad.columns, average_grad.slots
    (average_grad, 'elementwise', ('grad', 'grad_avg'), ('grad_avg',))
    """

    function: RuleFunction
    scope: Scope
    starts: Mapping[str, Slot]  # slot -> its first value, by the function's own names
    declared: Declared = Declared()
    renames: Mapping[str, str] = field(default_factory=dict)  # the function's name -> the chain's
    signature: Signature = field(init=False)

    def __post_init__(self) -> None:
        signature = read_signature(self.function, self.starts, self.scope)
        object.__setattr__(self, "signature", signature)
        for name in ("__name__", "__qualname__", "__module__", "__doc__"):
            object.__setattr__(self, name, getattr(self.function, name))
        object.__setattr__(self, "__signature__", inspect.signature(self.function))
        with _lock:
            _known_rules.add(self)

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.__name__

    @property
    def columns(self) -> tuple[str, ...]:
        """What it reads of every leaf, by the function's own names."""
        return self.signature.columns

    @property
    def scalars(self) -> Mapping[str, Any]:
        """Hypers, extras and the step, by the function's own names -> default or REQUIRED."""
        return self.signature.scalars

    @property
    def slots(self) -> tuple[str, ...]:
        """The state that it keeps of each leaf, by the chain's names."""
        numbers = self.signature.numbers
        return tuple(self.outer(slot) for slot in self.starts if slot not in numbers)

    @property
    def numbers(self) -> tuple[str, ...]:
        """The numbers that it keeps of the whole tree, by the chain's names."""
        return tuple(self.outer(name) for name in self.signature.numbers)

    @property
    def initializers(self) -> dict[str, Initializer]:
        """The slots of each leaf, by the chain's names -> a function of the param."""
        return {self.outer(slot): start for slot, start in self.starts.items() if callable(start)}

    @property
    def blocks(self) -> dict[str, str]:
        """The slots that are codes -> those with the scales of their blocks, by the chain's
        names.
        """
        return {self.outer(codes): self.outer(scales) for codes, scales in self.declared.blocks}

    @property
    def needs_tree(self) -> bool:
        """Whether all leaves must have come so far before it can run on one."""
        tree = any(one.over == "tree" for one in self.signature.reductions.values())
        return tree or self.scope == "treewise" or bool(self.signature.numbers)

    def outer(self, name: str) -> str:
        """What the chain calls the function's `name`."""
        return self.renames.get(name, name)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Call the function; after `rename`, keywords and results have the new names.

        A reduction that is not given is computed from the columns that are; a number will do.
        """
        inner = {outer: name for name, outer in self.renames.items()}
        named = {inner.get(name, name): value for name, value in kwargs.items()}
        self._check_tensors(args, named)
        if self.signature.reductions:
            columns = {**dict(zip(self.columns, args, strict=False)), **named}
            for name, reduction in self.signature.reductions.items():
                if name not in named:
                    named[name] = reduction.of(columns)
                elif isinstance(named[name], (int, float)):
                    # On the CPU whatever the default device is: CPU scalars combine with any
                    # tensor.
                    named[name] = torch.tensor(
                        float(named[name]), dtype=torch.float64, device="cpu"
                    )
        if self.signature.random and not hasattr(named.get(KEY), "bits"):
            raise TypeError(
                f"rule {self.name}: draws random numbers, so key must be what "
                f"functional_sgd.randomness.key_of(seed, step, leaf=0, position=0) gives, with two "
                f"0-d tensors of whole numbers; got {named.get(KEY)!r}."
            )
        result = self.function(*args, **named)
        return {self.outer(name): value for name, value in result.items()}

    def _check_tensors(self, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """Raise TypeError for a call with hypers alone, which is meant to make a rule."""
        numbers = bool(args) and isinstance(args[0], (int, float))
        if self.columns and (numbers or not (args or any(name in named for name in self.columns))):
            wanted = ", ".join(map(self.outer, self.columns))
            hyper = self.outer(next(iter((*named, *self.scalars)), "lr"))
            raise TypeError(
                f"rule {self.name}: is called with tensors ({wanted}), but got only numbers. Put "
                f"the rule itself into a chain, and its hypers behind the rules: "
                f"chain({self.name}, ..., {hyper}=0.1)."
            )

    def _identity(self) -> tuple[Any, ...]:
        starts, renames = tuple(self.starts.items()), tuple(sorted(self.renames.items()))
        return self.function, self.scope, starts, renames, self.declared

    def __eq__(self, other: object) -> bool:
        return self._identity() == other._identity() if isinstance(other, Rule) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.function, self.scope, tuple(sorted(self.renames.items()))))

    def __repr__(self) -> str:
        if not self.renames:
            return self.name
        names = ", ".join(f"{old}={new!r}" for old, new in self.renames.items())
        return f"rename({self.name}, {names})"

    def __reduce__(self) -> str | tuple[Any, ...]:
        # pickle stores functions by name, but the name now belongs to the rule. So a rule is stored
        # by name, and a variant of it as that rule and what differs.
        plain = inspect.getattr_static(inspect.getmodule(self.function), self.name, None)
        if self is plain:
            return str(self.name)
        if isinstance(plain, Rule) and plain.function is self.function:
            return _variant, (plain, self.starts, self.declared, dict(self.renames))
        return Rule, (self.function, self.scope, self.starts, self.declared, self.renames)


Decorator: TypeAlias = Callable[[RuleFunction], Rule]


@overload
def elementwise(function: RuleFunction, /) -> Rule: ...
@overload
def elementwise(
    *,
    writes: Iterable[str] | None = None,
    belongs: Mapping[str, str] | None = None,
    before: Iterable[str] = (),
    evaluate: str | None = None,
    positive: Iterable[str] = (),
    **slots: Slot,
) -> Decorator: ...
def elementwise(
    function: RuleFunction | None = None,
    /,
    *,
    writes: Iterable[str] | None = None,
    belongs: Mapping[str, str] | None = None,
    before: Iterable[str] = (),
    evaluate: str | None = None,
    positive: Iterable[str] = (),
    **slots: Slot,
) -> Any:
    """A rule in which the result for each element depends on that element and on numbers alone.

    The decorated function takes by position columns (a tensor for each leaf), by keyword numbers,
    and returns a dict of what it writes:

    - a positional parameter is `param`, `grad`, `update`, a slot, what an earlier rule wrote, or
      else a column that the caller gives: `opt(params, grads, state, hessian=tree)`;
    - a keyword is a hyper; `step`, how many updates this leaf has taken, this one included; `key`,
      for random numbers (`uniform`, `normal`); `dtype`, in which the leaf is kept; a number of the
      whole tree, if it is declared as a slot; or a number made of columns, if its default is a
      reduction (`norm("grad")`).

    A column or hyper with a default is optional. The keywords of the decorator declare the slots
    that the rule owns: `slot=first_value`, a function of the param for a slot of each leaf
    (half-precision parameters are seen as float32), a number for a slot of the whole tree.

    `writes` lists the names of the dict, for a rule that cannot be tried on small tensors.
    `belongs` says that one column must be what the owner of another wrote last:
    `belongs=dict(update="grad_avg")`. `before` are slots of later rules, which are read as the step
    before left them. `evaluate` is the slot that is to be evaluated in place of the params.
    `positive` are slots that are never negative, which `eight_bit` keeps without a sign.

    Raises TypeError when the signature cannot be read that way.

    >>> import torch
    >>> @elementwise
    ... def sign_step(param, update, *, lr):
    ...     return dict(param=param - lr * update.sign())
    >>> sign_step(torch.tensor([1.0]), torch.tensor([-3.0]), lr=0.5)
    {'param': tensor([1.5000])}
    """
    return _decorate(
        "elementwise", function, slots, _declared(writes, belongs, before, evaluate, positive)
    )


@overload
def leafwise(function: RuleFunction, /) -> Rule: ...
@overload
def leafwise(
    *,
    writes: Iterable[str] | None = None,
    belongs: Mapping[str, str] | None = None,
    before: Iterable[str] = (),
    evaluate: str | None = None,
    positive: Iterable[str] = (),
    **slots: Slot,
) -> Decorator: ...
def leafwise(
    function: RuleFunction | None = None,
    /,
    *,
    writes: Iterable[str] | None = None,
    belongs: Mapping[str, str] | None = None,
    before: Iterable[str] = (),
    evaluate: str | None = None,
    positive: Iterable[str] = (),
    **slots: Slot,
) -> Any:
    """A rule that sees one whole leaf with its shape, and may keep slots of any shape.

    Used like `elementwise`. A rule that only needs a number of the leaf, such as its norm, is
    elementwise with a reduction, and becomes part of a kernel.

    >>> import torch
    >>> @leafwise(rows=lambda param: param.new_zeros(param.shape[0]))
    ... def average_rows(grad, rows, *, mom=0.9):
    ...     return dict(rows=mom * rows + (1 - mom) * grad.flatten(1).mean(1))
    >>> average_rows(torch.ones(2, 3), torch.zeros(2), mom=0.5)
    {'rows': tensor([0.5000, 0.5000])}
    """
    return _decorate(
        "leafwise", function, slots, _declared(writes, belongs, before, evaluate, positive)
    )


@overload
def treewise(function: RuleFunction, /) -> Rule: ...
@overload
def treewise(
    *,
    writes: Iterable[str] | None = None,
    belongs: Mapping[str, str] | None = None,
    before: Iterable[str] = (),
    evaluate: str | None = None,
    positive: Iterable[str] = (),
    **slots: Slot,
) -> Decorator: ...
def treewise(
    function: RuleFunction | None = None,
    /,
    *,
    writes: Iterable[str] | None = None,
    belongs: Mapping[str, str] | None = None,
    before: Iterable[str] = (),
    evaluate: str | None = None,
    positive: Iterable[str] = (),
    **slots: Slot,
) -> Any:
    """A rule that sees whole trees, built like params (None where a leaf has no gradient).

    Used like `elementwise`. A rule that only needs a number of the tree, such as its norm, is
    elementwise with a reduction over="tree", and becomes part of a kernel.

    >>> import optree, torch
    >>> @treewise
    ... def subtract_mean(grad):
    ...     leaves = optree.tree_leaves(grad)
    ...     mean = sum(leaf.sum() for leaf in leaves) / sum(leaf.numel() for leaf in leaves)
    ...     return dict(grad=optree.tree_map(lambda leaf: leaf - mean, grad))
    >>> subtract_mean({"a": torch.tensor([1.0]), "b": torch.tensor([3.0])})
    {'grad': {'a': tensor([-1.]), 'b': tensor([1.])}}
    """
    return _decorate(
        "treewise", function, slots, _declared(writes, belongs, before, evaluate, positive)
    )


def _variant(
    rule: Rule, starts: Mapping[str, Slot], declared: Declared, names: Mapping[str, str]
) -> Rule:
    return replace(rule, starts=starts, declared=declared, renames=names)


def renamed(rule: Rule, names: Mapping[str, str]) -> Rule:
    """The rule with its function's names replaced; nothing is checked."""
    return replace(rule, renames=dict(names))


def providers(name: str) -> list[str]:
    """The rules of this package that would provide a column of this name.

    Not those of users: what a chain means does not depend on which other rules there are.
    """
    with _lock:
        known = list(_known_rules)
    own = [rule for rule in known if rule.function.__module__.startswith("functional_sgd.")]
    return sorted({rule.name for rule in own if not rule.renames and name in rule.slots})


def _declared(
    writes: Iterable[str] | None,
    belongs: Mapping[str, str] | None,
    before: Iterable[str],
    evaluate: str | None,
    positive: Iterable[str],
) -> Declared:
    named = dict(writes=writes, belongs=belongs, before=before, positive=positive)
    for name, value in named.items():
        if callable(value):
            raise TypeError(
                f"rule: a slot cannot be called {name!r}, which has a meaning for the decorator. "
                f"Choose another name."
            )
    written = None if writes is None else tuple(writes)
    belonging = tuple((belongs or {}).items())
    return Declared(written, belonging, tuple(before), evaluate, tuple(positive))


def _decorate(
    scope: Scope, function: RuleFunction | None, slots: Mapping[str, Slot], declared: Declared
) -> Any:
    if function is not None:
        return Rule(function, scope, {})
    return lambda decorated: Rule(decorated, scope, dict(slots), declared)
