"""An optimizer is a chain of rules: a value that can be called, compared, printed and nested."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload

from functional_sgd.call import Plan
from functional_sgd.chained import Chained, Front, Planned, in_words
from functional_sgd.hyper import Hyper
from functional_sgd.notebook import html_table, show
from functional_sgd.optimizer import Optimizer
from functional_sgd.rule import Rule
from functional_sgd.signature import REQUIRED, STEP
from functional_sgd.state import (
    State,
    like_params,
)
from functional_sgd.step import leaf_by_leaf
from functional_sgd.table import aligned
from functional_sgd.tree import Tree
from functional_sgd.wiring import Call, Reduced


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
        return f"part({in_words(self.rules, self.given)})"


class Chain(Planned):
    """An optimizer made of rules; `chain` makes one. Equal when rules and defaults are equal."""

    def __call__(
        self,
        params: Tree,
        grads: Tree,
        state: State,
        hyper: Mapping[str, Hyper] | None = None,
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

    def describe(self) -> None:
        """Print, as a table, what each rule reads, writes and keeps; a notebook shows it in HTML.

        >>> from functional_sgd import momentum
        >>> momentum(lr=0.1).describe()
        rule          scope        reads           hypers   writes            keeps
        average_grad  elementwise  grad, grad_avg  mom=0.9  grad_avg, update  grad_avg
        sgd_step      elementwise  param, update   lr=0.1   param
        """
        rows = [_row(self.plan, call) for call in self.plan.calls]
        show(aligned([_Row._fields, *rows]), html_table(rows, _Row._fields))


@overload
def chain(*parts: Rule | Part | Chain, **hyper_defaults: Hyper) -> Chain: ...
@overload
def chain(*parts: Rule | Part | Optimizer, **hyper_defaults: Hyper) -> Chain | Chained: ...
def chain(*parts: Rule | Part | Optimizer, **hyper_defaults: Hyper) -> Any:
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
    known: set[str] = set()
    for one in (*front, *after):
        known |= _names(one)
    for name in hyper_defaults:
        if name not in known:
            raise ValueError(
                f"chain: no rule in front of {opt!r}, or after it, reads {name!r}. "
                f"Give the optimizer its defaults where it is made."
            )
    # A default may be for both sides; each gets those that its own rules read.
    for_front = {name: v for name, v in hyper_defaults.items() if name in _names(*front)}
    for_after = {name: v for name, v in hyper_defaults.items() if name in _names(*after)}
    return Chained(Front(*_flat(front, for_front)), opt, Chain(*_flat(after, for_after)))


def part(*rules: Rule | Part, **hyper_defaults: Hyper) -> Part:
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


def _flat(
    parts: Sequence[object], hyper_defaults: Mapping[str, Hyper]
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


def _is_other(one: object) -> bool:
    return isinstance(one, Optimizer) and not isinstance(one, Chain)


def _names(*parts: object) -> set[str]:
    """The hypers that these rules read, by the chain's names."""
    names: set[str] = set()
    # One by one: their defaults may differ, which is for `chain` to decide.
    for one in parts:
        rules, _ = _flat([one], {})
        for rule in rules:
            names.update(map(rule.outer, rule.scalars))
    return names


class _Row(NamedTuple):
    """A rule in words, under the titles that a table of them has."""

    rule: str
    scope: str
    reads: str  # columns, and numbers that the state keeps
    hypers: str  # and reductions
    writes: str
    keeps: str


def _row(plan: Plan, call: Call) -> _Row:
    hypers, kept = [], []  # numbers that the state keeps are no hypers
    for _, name in call.scalars:
        default = plan.defaults.get(name, REQUIRED)
        if name in (*plan.numbers, STEP):
            kept.append(name)
        elif default is REQUIRED:
            hypers.append(name)
        else:
            hypers.append(f"{name}={default!r}")
    for one in call.reductions:
        hypers.append(f"{one.parameter}={_reduction_words(call, one)}")
    read = [outer for _, outer in call.reads]
    reads = ", ".join([*read, *kept])
    writes = ", ".join(outer for _, outer in (*call.writes, *call.numbers))
    keeps = ", ".join((*call.rule.slots, *call.rule.numbers))
    return _Row(repr(call.rule), call.rule.scope, reads, ", ".join(hypers), writes, keeps)


def _reduction_words(call: Call, one: Reduced) -> str:
    columns = ", ".join(outer for _, outer in one.columns)
    kind = {"root": "norm", "mean": "mean"}.get(one.reduction.finish, one.reduction.combine)
    where = ", over tree" if one.reduction.over == "tree" else ""
    return f"{kind}({columns}{where})"
