"""An optimizer is a chain of rules: a value that can be called, compared, printed and nested."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

from functional_sgd.call import Plan
from functional_sgd.optimizer import Optimizer, check_names
from functional_sgd.rule import Rule
from functional_sgd.signature import REQUIRED
from functional_sgd.state import (
    State,
    check_params,
    check_state,
    init_state,
    like_params,
    new_calls,
)
from functional_sgd.step import leaf_by_leaf
from functional_sgd.table import aligned
from functional_sgd.tree import Tree, flatten
from functional_sgd.wiring import CALLS, Call, Reduced, wire


@dataclass(frozen=True, repr=False)
class Part:
    """Rules in a row that are not an optimizer yet; `part` makes one, `chain` continues it.

    >>> from functional_sgd import average_grad, debias
    >>> part(average_grad, debias, mom=0.5)
    part(average_grad, debias, mom=0.5)
    """

    rules: tuple[Rule, ...]
    given: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __repr__(self) -> str:
        return f"part({_words(self.rules, self.given)})"


@dataclass(frozen=True, repr=False)
class Chain(Optimizer):
    """An optimizer made of rules; `chain` makes one. Equal when rules and defaults are equal."""

    rules: tuple[Rule, ...]
    given: Mapping[str, Any] = field(hash=False)  # hyper defaults that win over the rules' own
    plan: Plan = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "plan", _plan(repr(self), self.rules, self.given, ("param",)))

    @property
    def hyper(self) -> dict[str, Any]:
        """The hypers and their defaults; those that must be passed at the call are not in it.

        >>> from functional_sgd import adamw
        >>> adamw(lr=3e-3).hyper
        {'lr': 0.003, 'wd': 0.01, 'mom': 0.9, 'sqr_mom': 0.999, 'eps': 1e-08}
        """
        return _hyper(self.plan)

    @property
    def required(self) -> tuple[str, ...]:
        """The hypers, extras and columns that have no default: the caller must pass them."""
        return _required(self.plan)

    def init(self, params: Tree) -> State:
        """A fresh state: no leaf has taken a step, and every slot has its first value.

        >>> import torch
        >>> from functional_sgd import momentum
        >>> momentum().init({"w": torch.ones(2)})
        {'step': tensor([0]), 'grad_avg': {'w': tensor([0., 0.])}}
        """
        return init_state(self.rules, self.plan.numbers, params)

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
        some rules read besides: columns (trees like params), and whatever else.

        Raises ValueError or TypeError, before anything is computed, if a tree, a shape, a name or
        the value of a hyper does not fit.

        >>> import torch
        >>> from functional_sgd import sgd
        >>> opt, params = sgd(lr=0.1), {"w": torch.tensor([1.0])}
        >>> opt(params, {"w": torch.tensor([2.0])}, opt.init(params))
        ({'w': tensor([0.8000])}, {'step': tensor([1])})
        """
        result: tuple[Tree, State]
        result = leaf_by_leaf(self.plan, params, grads, state, hyper, extras)
        return result

    @property
    def averages(self) -> bool:
        """Whether some rule keeps what is to be evaluated."""
        return any(rule.declared.evaluate for rule in self.rules)

    def evaluated(self, params: Tree, state: State) -> Tree:
        """The slot that is to be evaluated, in the dtypes of the params; else the params."""
        for rule in reversed(self.rules):
            if rule.declared.evaluate is not None:
                return like_params(params, state[rule.outer(rule.declared.evaluate)])
        return params

    def __repr__(self) -> str:
        return f"chain({_words(self.rules, self.given)})"

    def describe(self) -> None:
        """Print, as a table, what each rule reads, writes and keeps.

        >>> from functional_sgd import momentum
        >>> momentum(lr=0.1).describe()
        rule          scope        reads           hypers   writes            keeps
        average_grad  elementwise  grad, grad_avg  mom=0.9  grad_avg, update  grad_avg
        sgd_step      elementwise  param, update   lr=0.1   param
        """
        titles = ("rule", "scope", "reads", "hypers", "writes", "keeps")
        print(aligned([titles, *(_row(self.plan, call) for call in self.plan.calls)]))


@dataclass(frozen=True, repr=False)
class Front(Optimizer):
    """Rules that condition what another optimizer gets; a call returns (params, update, state)."""

    rules: tuple[Rule, ...]
    given: Mapping[str, Any] = field(hash=False)
    plan: Plan = field(init=False, compare=False)

    def __post_init__(self) -> None:
        plan = _plan(repr(self), self.rules, self.given, ("param", "update"))
        object.__setattr__(self, "plan", plan)

    @property
    def hyper(self) -> dict[str, Any]:
        """The hypers and their defaults."""
        return _hyper(self.plan)

    @property
    def required(self) -> tuple[str, ...]:
        """The hypers, extras and columns that have no default."""
        return _required(self.plan)

    def init(self, params: Tree) -> State:
        """A fresh state."""
        return init_state(self.rules, self.plan.numbers, params)

    def __call__(
        self,
        params: Tree,
        grads: Tree,
        state: State,
        hyper: Mapping[str, Any] | None = None,
        **extras: Any,
    ) -> Any:
        """One step: (new params, the update as a tree of gradients, new state)."""
        return leaf_by_leaf(self.plan, params, grads, state, hyper, extras)

    def __repr__(self) -> str:
        return f"chain({_words(self.rules, self.given)})"


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
        known: dict[str, Any] = {}
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
    def hyper(self) -> dict[str, Any]:
        """The hypers of all three and their defaults."""
        return {name: value for one in self.inner for name, value in one.hyper.items()}

    @property
    def required(self) -> tuple[str, ...]:
        """The hypers, extras and columns that none of them has a default for."""
        every = [name for one in self.inner for name in one.required]
        return tuple(dict.fromkeys(name for name in every if name not in self.hyper))

    @property
    def names(self) -> frozenset[str]:
        """Every hyper, extra and column that is understood."""
        return frozenset().union(*(one.names for one in self.inner))

    @property
    def donates(self) -> bool:
        """Whether it overwrites params and state."""
        return any(one.donates for one in self.inner)

    def init(self, params: Tree) -> State:
        """A fresh state."""
        leaves, _ = flatten(params)
        check_params(leaves)
        front, inner, after = (one.init(params) for one in self.inner)
        return {CALLS: new_calls(leaves), "front": front, "inner": inner, "after": after}

    def __call__(
        self,
        params: Tree,
        grads: Tree,
        state: State,
        hyper: Mapping[str, Any] | None = None,
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

    def extend(self, state: State, before: Tree, params: Tree) -> State:
        """The state for more params."""
        names = ("front", "inner", "after")
        grown = {
            name: one.extend(state[name], before, params)
            for name, one in zip(names, self.inner, strict=True)
        }
        return {CALLS: state[CALLS], **grown}

    def perturb(
        self, params: Tree, grads: Tree, state: State, hyper: Mapping[str, Any] | None = None
    ) -> Tree:
        """Where the optimizer wants the gradient."""
        own, _ = self._split(self.opt, {} if hyper is None else hyper, {})
        return self.opt.perturb(params, grads, state["inner"], own)

    def evaluated(self, params: Tree, state: State) -> Tree:
        """What the optimizer wants to be evaluated."""
        return self.opt.evaluated(params, state["inner"])

    def _split(
        self, one: Optimizer, hyper: Mapping[str, Any], extras: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The hypers and extras that one of them reads; what it requires may be the default of
        another, but what it schedules may not.
        """
        defaults = {name: value for name, value in self.hyper.items() if name in one.required}
        given = {name: value for name, value in hyper.items() if name in one.names}
        own = {**defaults, **given}
        for name in extras:
            own.pop(name, None)
        return own, {name: value for name, value in extras.items() if name in one.names}

    def __repr__(self) -> str:
        sides = [_parts(side) for side in (self.front, self.after)]
        given = dict.fromkeys([*sides[0][1], *sides[1][1]])
        return f"chain({', '.join([*sides[0][0], repr(self.opt), *sides[1][0], *given])})"


@overload
def chain(*parts: Rule | Part | Chain, **hyper_defaults: Any) -> Chain: ...
@overload
def chain(*parts: Rule | Part | Optimizer, **hyper_defaults: Any) -> Chain | Chained: ...
def chain(*parts: Rule | Part | Optimizer, **hyper_defaults: Any) -> Any:
    """An optimizer that applies rules in order: `(params, grads, state, hyper) -> (params, state)`.

    `parts` are rules, parts (`part`) and chains, which are flattened into this one; each keyword is
    the default of a hyper. One of them may be another optimizer, such as a partition: the rules
    in front of it condition the gradients that it gets, those after it see the params that it
    made: `chain(clip_norm, partition(...))` clips by the norm of all parts together.

    Checked here and now: every column that a rule reads comes from the caller (`param`, `grad`,
    `update`), from an earlier rule, or is one that no known rule provides, which the caller then
    gives by keyword; no slot has two owners; no rule is without effect; some rule writes `param`;
    every default is read by a rule, is in its range and is not ambiguous. Raises ValueError
    (TypeError for things that are not rules) with the rule, the name and the cure.

    >>> from functional_sgd import average_grad, sgd_step
    >>> chain(average_grad, sgd_step, lr=0.1)
    chain(average_grad, sgd_step, lr=0.1)
    """
    places = [place for place, one in enumerate(parts) if _is_other(one)]
    if not places:
        return Chain(*_flat(parts, hyper_defaults))
    if len(places) > 1:
        raise ValueError(
            f"chain: {parts[places[0]]!r} and {parts[places[1]]!r} are both optimizers that are "
            f"not chains of rules. Nest them: chain(one, chain(other, ...))."
        )
    opt: Any = parts[places[0]]
    front, after = parts[: places[0]], parts[places[0] + 1 :]
    known = {name for one in (*front, *after) for name in _names(one)}
    for name in hyper_defaults:
        if name not in known:
            raise ValueError(
                f"chain: no rule in front of {opt!r}, or after it, reads {name!r}. "
                f"Give the optimizer its defaults where it is made."
            )
    own = [
        {n: v for n, v in hyper_defaults.items() if n in _names(*side)} for side in (front, after)
    ]
    return Chained(Front(*_flat(front, own[0])), opt, Chain(*_flat(after, own[1])))


def part(*rules: Rule | Part, **hyper_defaults: Any) -> Part:
    """Rules in a row that are not an optimizer yet, with a name of your own.

    >>> from functional_sgd import average_grad, average_sqr_grad, debias, scale_by_rms, sgd_step
    >>> adaptive = part(average_grad, average_sqr_grad, debias, scale_by_rms, eps=1e-6)
    >>> chain(adaptive, sgd_step, lr=0.1)
    chain(average_grad, average_sqr_grad, debias, scale_by_rms, sgd_step, eps=1e-06, lr=0.1)
    """
    flat, given = _flat(rules, hyper_defaults)
    return Part(flat, given)


def identity() -> Chain:
    """The optimizer that leaves everything as it is (and counts steps); it vanishes in a chain.

    >>> from functional_sgd import sgd_step
    >>> chain(identity(), sgd_step) == chain(sgd_step)
    True
    """
    return chain()


def _plan(
    who: str, rules: tuple[Rule, ...], given: Mapping[str, Any], results: tuple[str, ...]
) -> Plan:
    wiring = wire(rules, given, results)
    shaped = tuple(s for rule in rules if rule.scope == "elementwise" for s in rule.slots)
    return Plan(
        who, wiring.calls, wiring.slots, shaped, wiring.numbers, wiring.given, wiring.defaults,
        wiring.ranges, results,
    )  # fmt: skip


def _hyper(plan: Plan) -> dict[str, Any]:
    return {name: value for name, value in plan.defaults.items() if value is not REQUIRED}


def _required(plan: Plan) -> tuple[str, ...]:
    open_ones = [name for name, value in plan.defaults.items() if value is REQUIRED]
    return (*open_ones, *plan.given)


def _flat(
    parts: Sequence[Any], hyper_defaults: Mapping[str, Any]
) -> tuple[tuple[Rule, ...], dict[str, Any]]:
    """All rules in order, and the defaults that were given for their hypers."""
    rules: list[Rule] = []
    given: dict[str, Any] = {}
    for one in parts:
        if isinstance(one, (Chain, Part)):
            rules.extend(one.rules)
            for name, value in one.given.items():
                if name not in hyper_defaults and given.get(name, value) != value:
                    raise ValueError(
                        f"chain: two of its parts give {name!r} different defaults, "
                        f"{given[name]!r} and {value!r}. Decide with chain(..., {name}=...)."
                    )
                given[name] = value
        elif isinstance(one, Rule):
            rules.append(one)
        else:
            raise TypeError(
                f"chain: expected rules, chains or an optimizer, got {one!r}. Decorate a function "
                f"with @elementwise, @leafwise or @treewise; call a recipe first: adam(), not adam."
            )
    return tuple(rules), {**given, **hyper_defaults}


def _is_other(one: Any) -> bool:
    return isinstance(one, Optimizer) and not isinstance(one, Chain)


def _names(*parts: Any) -> set[str]:
    """The hypers that these rules read, by the chain's names."""
    rules, _ = _flat(parts, {})
    return {rule.outer(name) for rule in rules for name in rule.scalars}


def _words(rules: tuple[Rule, ...], given: Mapping[str, Any]) -> str:
    return ", ".join([*map(repr, rules), *(f"{name}={value!r}" for name, value in given.items())])


def _parts(one: Optimizer) -> tuple[list[str], list[str]]:
    """A side of a Chained in words, without the chain(...) around it: (its rules, its defaults)."""
    if not isinstance(one, (Front, Chain)):
        return [repr(one)], []
    return list(map(repr, one.rules)), [f"{name}={value!r}" for name, value in one.given.items()]


def _row(plan: Plan, call: Call) -> tuple[str, ...]:
    hypers = []
    for _, name in call.scalars:
        default = plan.defaults.get(name, REQUIRED)
        hypers.append(name if default is REQUIRED else f"{name}={default!r}")
    hypers += [f"{one.parameter}={_reduction_words(call, one)}" for one in call.reductions]
    reads, writes = (", ".join(outer for _, outer in names) for names in (call.reads, call.writes))
    keeps = ", ".join((*call.rule.slots, *call.rule.numbers))
    return repr(call.rule), call.rule.scope, reads, ", ".join(hypers), writes, keeps


def _reduction_words(call: Call, one: Reduced) -> str:
    columns = ", ".join(outer for _, outer in one.columns)
    kind = {"root": "norm", "mean": "mean"}.get(one.reduction.finish, one.reduction.combine)
    return f"{kind}({columns}{', over tree' if one.reduction.over == 'tree' else ''})"
