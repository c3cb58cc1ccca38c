"""Rules around another optimizer: in front of it, and after it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from functional_sgd.call import Plan
from functional_sgd.hyper import Hyper
from functional_sgd.optimizer import Optimizer, check_names
from functional_sgd.rule import Rule
from functional_sgd.signature import REQUIRED, RuleFunction
from functional_sgd.state import State, check_params, check_state, init_state, new_calls, seeded
from functional_sgd.step import leaf_by_leaf
from functional_sgd.tree import Tree, flatten
from functional_sgd.wiring import CALLS, wire


@dataclass(frozen=True, repr=False)
class Planned(Optimizer):
    """Rules with the plan of their run: what `Chain` and `Front` have in common.

    Equal when rules and defaults are equal.
    """

    rules: tuple[Rule, ...]
    given: Mapping[str, Hyper] = field(hash=False)  # hyper defaults that win over the rules' own
    plan: Plan = field(init=False, compare=False)

    results: ClassVar[tuple[str, ...]] = ("param",)
    """The columns that a call returns."""

    def __post_init__(self) -> None:
        plan = make_plan(repr(self), self.rules, self.given, self.results)
        object.__setattr__(self, "plan", plan)

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.rules, self.given)  # whose plan is made anew

    @property
    def hyper(self) -> dict[str, Hyper]:
        """The hypers and their defaults; those that must be passed at the call are not in it.

        >>> from functional_sgd import adamw
        >>> adamw(lr=3e-3).hyper
        {'lr': 0.003, 'wd': 0.01, 'mom': 0.9, 'sqr_mom': 0.999, 'eps': 1e-08}
        """
        return {n: value for n, value in self.plan.defaults.items() if value is not REQUIRED}

    @property
    def required(self) -> tuple[str, ...]:
        """The hypers, extras and columns that have no default: the caller must pass them."""
        open_ones = [name for name, value in self.plan.defaults.items() if value is REQUIRED]
        return (*open_ones, *self.plan.given)

    def init(self, params: Tree) -> State:
        """A fresh state: no leaf has taken a step, and every slot has its first value.

        >>> import torch
        >>> from functional_sgd import momentum
        >>> momentum().init({"w": torch.ones(2)})
        {'step': tensor([0]), 'grad_avg': {'w': tensor([0., 0.])}}
        """
        return init_state(self.rules, self.plan.numbers, params)

    def __repr__(self) -> str:
        return f"chain({in_words(self.rules, self.given)})"


def functions_in(opt: Optimizer) -> list[RuleFunction]:
    """The functions of all rules in an optimizer that is not fused."""
    if isinstance(opt, Planned):
        return [rule.function for rule in opt.rules]
    found = []
    for one in opt.inner:
        found += functions_in(one)
    return found


class Front(Planned):
    """Rules that condition what another optimizer gets; a call returns (params, update, state)."""

    results = ("param", "update")

    def __call__(
        self,
        params: Tree,
        grads: Tree,
        state: State,
        hyper: Mapping[str, Hyper] | None = None,
        **extras: Any,
    ) -> Any:
        """One step: (new params, the update as a tree of gradients, new state)."""
        return leaf_by_leaf(self.plan, params, grads, state, hyper, extras)


@dataclass(frozen=True, repr=False)
class Chained(Optimizer):
    """Rules, another optimizer, and rules after it; `chain` makes one.

    The optimizer gets the params and the update of the rules in front, as gradients; the rules
    after it get its params. Its state is {"calls", "front", "inner", "after"}.
    """

    front: Optimizer  # a Front, or one that has been fused
    opt: Optimizer
    after: Optimizer

    def __post_init__(self) -> None:
        known: dict[str, Hyper] = {}
        for one in self.inner:
            for name, value in one.hyper.items():
                if known.setdefault(name, value) != value:
                    raise ValueError(
                        f"chain: two of its parts give {name!r} different defaults, "
                        f"{known[name]!r} and {value!r}. Decide with chain(..., {name}=...)."
                    )

    @property
    def inner(self) -> tuple[Optimizer, ...]:
        """The rules in front, the optimizer, and the rules after it."""
        return self.front, self.opt, self.after

    def with_inner(self, inner: tuple[Optimizer, ...]) -> "Chained":
        """The same with others in their places."""
        front, opt, after = inner
        return replace(self, front=front, opt=opt, after=after)

    @property
    def hyper(self) -> dict[str, Hyper]:
        """The hypers of all three and their defaults."""
        hyper: dict[str, Hyper] = {}
        for one in self.inner:
            hyper.update(one.hyper)
        return hyper

    @property
    def required(self) -> tuple[str, ...]:
        """The hypers, extras and columns that none of them has a default for."""
        every: list[str] = []
        for one in self.inner:
            every.extend(one.required)
        # What one of them requires may be the default of another.
        hyper = self.hyper
        return tuple(dict.fromkeys(name for name in every if name not in hyper))

    @property
    def names(self) -> frozenset[str]:
        """Every hyper, extra and column that is understood."""
        return self.front.names | self.opt.names | self.after.names

    @property
    def donates(self) -> bool:
        """Whether it overwrites params and state."""
        return any(one.donates for one in self.inner)

    def init(self, params: Tree) -> State:
        """A fresh state."""
        leaves, _ = flatten(params)
        check_params(leaves)
        front, inner, after = (one.init(params) for one in self.inner)
        # Each numbers its rules from 0, so each draws its random numbers from its own seed.
        sides = {"front": seeded(front, "front"), "inner": inner, "after": seeded(after, "after")}
        return {CALLS: new_calls(leaves), **sides}

    def __call__(
        self,
        params: Tree,
        grads: Tree,
        state: State,
        hyper: Mapping[str, Hyper] | None = None,
        **extras: Any,
    ) -> tuple[Tree, State]:
        """One step: (new params, new state)."""
        check_state("chain", state, (CALLS, "front", "inner", "after"))
        hyper = check_names("chain", hyper, extras, self.names)
        front: Any = self.front
        own, more = self._split(front, hyper, extras)
        params, update, front_state = front(params, grads, state["front"], own, **more)
        own, more = self._split(self.opt, hyper, extras)
        params, inner = self.opt(params, update, state["inner"], own, **more)
        own, more = self._split(self.after, hyper, extras)
        params, after = self.after(params, grads, state["after"], own, **more)
        calls = state[CALLS] + 1
        return params, {CALLS: calls, "front": front_state, "inner": inner, "after": after}

    def explain(self, params: Tree = None) -> None:
        """Print what the rules in front, the optimizer, and the rules after it run; a side without
        rules is left out.
        """
        for one in self.inner:
            rules = getattr(getattr(one, "opt", one), "rules", None)  # it may have been fused
            if one is self.opt or rules != ():
                one.explain(params)

    def extend(self, state: State, before: Tree, params: Tree) -> State:
        """The state for more params."""
        grown: State = {CALLS: state[CALLS]}
        for name, one in zip(("front", "inner", "after"), self.inner, strict=True):
            grown[name] = one.extend(state[name], before, params)
        return grown

    def perturb(
        self, params: Tree, grads: Tree, state: State, hyper: Mapping[str, Hyper] | None = None
    ) -> Tree:
        """Where the optimizer wants the gradient."""
        given = {} if hyper is None else hyper
        own, _ = self._split(self.opt, given, {})
        return self.opt.perturb(params, grads, state["inner"], own)

    def evaluated(self, params: Tree, state: State) -> Tree:
        """What the rules after the optimizer want to be evaluated, or else the optimizer."""
        if self.after.averages:
            return self.after.evaluated(params, state["after"])
        return self.opt.evaluated(params, state["inner"])

    def _split(
        self, one: Optimizer, hyper: Mapping[str, Hyper], extras: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The hypers and extras that one of them reads; what it requires may be the default of
        another, but what it schedules may not.
        """
        required, names = one.required, one.names
        defaults = {name: value for name, value in self.hyper.items() if name in required}
        given = {name: value for name, value in hyper.items() if name in names}
        own = {**defaults, **given}
        # A default of another part must not clash with what is given by keyword.
        for name in extras:
            own.pop(name, None)
        return own, {name: value for name, value in extras.items() if name in names}

    def __repr__(self) -> str:
        front, front_defaults = _side(self.front)
        after, after_defaults = _side(self.after)
        # `chain` takes a default once, for both sides.
        given = dict.fromkeys([*front_defaults, *after_defaults])
        return f"chain({', '.join([*front, repr(self.opt), *after, *given])})"


def make_plan(
    who: str, rules: tuple[Rule, ...], given: Mapping[str, Hyper], results: tuple[str, ...]
) -> Plan:
    """What an executor needs to know of these rules. Raises what `wire` raises."""
    wiring = wire(rules, given, results)
    shaped: list[str] = []
    for rule in rules:
        if rule.scope == "elementwise":
            shaped.extend(rule.slots)
    return Plan(
        who, wiring.calls, wiring.slots, tuple(shaped), wiring.numbers, wiring.given,
        wiring.defaults, wiring.ranges, results,
    )  # fmt: skip


def in_words(rules: tuple[Rule, ...], given: Mapping[str, Hyper]) -> str:
    """Rules and defaults as they are written."""
    return ", ".join([*map(repr, rules), *_defaults_in_words(given)])


def _defaults_in_words(given: Mapping[str, Hyper]) -> list[str]:
    return [f"{name}={value!r}" for name, value in given.items()]


def _side(one: Optimizer) -> tuple[list[str], list[str]]:
    """A side of a Chained in words, without the chain(...) around it: (its rules, its defaults)."""
    rules, given = getattr(one, "rules", None), getattr(one, "given", {})
    if rules is None:  # it has been fused
        return [repr(one)], []
    return list(map(repr, rules)), _defaults_in_words(given)
