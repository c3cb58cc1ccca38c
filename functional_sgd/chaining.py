"""An optimizer is a chain of rules: a value that can be called, compared, printed and nested."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from functional_sgd.call import Plan
from functional_sgd.rule import REQUIRED, Rule
from functional_sgd.state import State, init_state
from functional_sgd.step import leaf_by_leaf
from functional_sgd.tree import Tree
from functional_sgd.wiring import scalar_defaults, wire


@runtime_checkable
class Optimizer(Protocol):
    """What every optimizer, plain or wrapped, can do."""

    @property
    def hyper(self) -> dict[str, Any]:
        """The hypers and their defaults."""

    def init(self, params: Tree) -> State:
        """A fresh state for these parameters."""

    def __call__(
        self,
        params: Tree,
        grads: Tree,
        state: State,
        hyper: Mapping[str, Any] | None = None,
        **extras: Any,
    ) -> tuple[Tree, State]:
        """One step: (new params, new state)."""


@dataclass(frozen=True, repr=False)
class Chain:
    """An optimizer made of rules; `chain` makes one. Equal when rules and given defaults are equal."""

    rules: tuple[Rule, ...]
    given: Mapping[str, Any] = field(hash=False)  # hyper defaults that win over the rules' own
    plan: Plan = field(init=False, compare=False)

    def __post_init__(self) -> None:
        calls = wire(self.rules)
        slots = tuple(slot for rule in self.rules for slot in rule.slots)
        defaults = scalar_defaults(self.rules, self.given)
        shaped = tuple(
            slot for rule in self.rules if rule.scope == "elementwise" for slot in rule.slots
        )
        object.__setattr__(self, "plan", Plan(repr(self), calls, slots, shaped, defaults))

    @property
    def hyper(self) -> dict[str, Any]:
        """The hypers and their defaults; those that must be passed at the call are not in it.

        >>> from functional_sgd import adamw
        >>> adamw(lr=3e-3).hyper
        {'lr': 0.003, 'wd': 0.01, 'mom': 0.9, 'sqr_mom': 0.999, 'eps': 1e-08}
        """
        return {name: value for name, value in self.plan.defaults.items() if value is not REQUIRED}

    @property
    def required(self) -> tuple[str, ...]:
        """The hypers and extras that have no default: the caller must pass them."""
        return tuple(name for name, value in self.plan.defaults.items() if value is REQUIRED)

    def init(self, params: Tree) -> State:
        """A fresh state: {"step": 0, slot: tree like params, ...}; float32 for half-precision
        parameters.

        Raises TypeError if a leaf is not a floating or complex tensor.

        >>> import torch
        >>> from functional_sgd import momentum
        >>> momentum().init({"w": torch.ones(2)})
        {'step': tensor(0), 'grad_avg': {'w': tensor([0., 0.])}}
        """
        return init_state(self.rules, params)

    def __call__(
        self,
        params: Tree,
        grads: Tree,
        state: State,
        hyper: Mapping[str, Any] | None = None,
        **extras: Any,
    ) -> tuple[Tree, State]:
        """One step: (new params, new state). The arguments are not touched.

        `grads` is a tree like params; a leaf that is None is left alone. `hyper` overrides
        defaults, each with a number, a 0-d tensor, or a tree prefix of params. `extras` are what
        some rules read besides.

        Raises ValueError or TypeError, before anything is computed, if a tree, a shape or a name
        does not fit.

        >>> import torch
        >>> from functional_sgd import sgd
        >>> opt, params = sgd(lr=0.1), {"w": torch.tensor([1.0])}
        >>> opt(params, {"w": torch.tensor([2.0])}, opt.init(params))
        ({'w': tensor([0.8000])}, {'step': tensor(1)})
        """
        return leaf_by_leaf(self.plan, params, grads, state, hyper, extras)

    def __repr__(self) -> str:
        parts = [
            *map(repr, self.rules),
            *(f"{name}={value!r}" for name, value in self.given.items()),
        ]
        return f"chain({', '.join(parts)})"

    def describe(self) -> None:
        """Print, as a table, what each rule reads, writes and keeps.

        >>> from functional_sgd import momentum
        >>> momentum(lr=0.1).describe()
        rule          scope        reads           hypers   writes            keeps
        average_grad  elementwise  grad, grad_avg  mom=0.9  grad_avg, update  grad_avg
        sgd_step      elementwise  param, update   lr=0.1   param
        """
        print(
            _table(
                [
                    ("rule", "scope", "reads", "hypers", "writes", "keeps"),
                    *map(self._row, self.plan.calls),
                ]
            )
        )

    def _row(self, call: Any) -> tuple[str, ...]:
        defaults = self.plan.defaults
        hypers = [name if defaults.get(name, REQUIRED) is REQUIRED else f"{name}={defaults[name]!r}"
                  for _, name in call.scalars]  # fmt: skip
        reads, writes = (
            ", ".join(outer for _, outer in names) for names in (call.reads, call.writes)
        )
        return (
            repr(call.rule),
            call.rule.scope,
            reads,
            ", ".join(hypers),
            writes,
            ", ".join(call.rule.slots),
        )


def chain(*rules: Rule | Chain, **hyper_defaults: Any) -> Chain:
    """An optimizer that applies the rules one after the other: `(params, grads, state, hyper) ->
    (params, state)`.

    `rules` are rules or other chains, which are flattened into this one. Each keyword is the
    default of a hyper.

    Checked here and now: every column that a rule reads comes from the caller (`param`, `grad`,
    `update`) or from an earlier rule; no slot has two owners; some rule writes `param`; every
    default is read by a rule and is not ambiguous. Raises ValueError (TypeError for things that are
    not rules) with the rule, the name and the cure.

    >>> from functional_sgd import average_grad, sgd_step
    >>> chain(average_grad, sgd_step, lr=0.1)
    chain(average_grad, sgd_step, lr=0.1)
    """
    flat: list[Rule] = []
    given: dict[str, Any] = {}
    for part in rules:
        if isinstance(part, Chain):
            flat.extend(part.rules)
            for name, value in part.given.items():
                if name not in hyper_defaults and given.get(name, value) != value:
                    raise ValueError(
                        f"chain: two of its parts give {name!r} different defaults, "
                        f"{given[name]!r} and {value!r}. "
                        f"Decide with chain(..., {name}=...)."
                    )
                given[name] = value
        elif isinstance(part, Rule):
            flat.append(part)
        else:
            raise TypeError(
                f"chain: expected rules or chains, got {part!r}. Decorate a function with "
                f"@elementwise, "
                f"@leafwise or @treewise; call a recipe first: adam(), not adam."
            )
    return Chain(tuple(flat), {**given, **hyper_defaults})


def identity() -> Chain:
    """The optimizer that leaves everything as it is (and counts its steps); it vanishes inside a
    chain.

    >>> from functional_sgd import sgd_step
    >>> chain(identity(), sgd_step) == chain(sgd_step)
    True
    """
    return chain()


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
