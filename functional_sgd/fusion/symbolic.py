"""Run the rules of a chain on symbols, once, when it is fused: what each of them computes.

What rules do becomes one graph of pointwise operations, in stages: a number that is made of whole
columns is there one stage after the columns. A rule that does anything else is left to torch; what
it writes are new columns of the graph, which are there when it has run.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from functional_sgd.call import Plan
from functional_sgd.fusion.arithmetic import Graph, Node, NotPointwise
from functional_sgd.fusion.check import check
from functional_sgd.fusion.passes import Take
from functional_sgd.fusion.symbol_key import SymbolKey
from functional_sgd.randomness import SHORT
from functional_sgd.signature import DTYPE, KEY, STEP
from functional_sgd.wiring import Call, Reduced


@dataclass(frozen=True)
class LeftRule:
    """A rule that is left to torch, while nobody knows yet where its inputs will be."""

    time: int  # it runs when all passes before this stage are done
    call: Call
    reason: str
    inputs: Mapping[str, Node]
    outputs: Mapping[str, str]
    numbers: Mapping[str, Node]
    sets: Mapping[str, str]


@dataclass(frozen=True)
class Origin:
    """Which nodes a rule has made."""

    rule: str
    nodes: range


class SymbolicChain:
    """A chain whose rules have been run on symbols."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.graph = plan, Graph()
        first = ("param", "grad", *plan.slots, *plan.given)
        self.taken = {*first, *plan.defaults, *plan.numbers, STEP}
        of_blocks = set(plan.blocks.values())
        self.now: dict[str, Node] = {}  # what rules see under each name
        for name in first:
            self.now[name] = self.graph.column(name, block=name in of_blocks)
        self.kept: dict[str, Node] = {}  # slots, as their owners wrote them
        self.numbers = {name: self.graph.scalar(name) for name in plan.numbers}
        self.takes: list[Take] = []
        self.left: list[LeftRule] = []
        self.origins: list[Origin] = []
        for call in plan.calls:
            reason = self._run(call)
            if reason:
                self._leave_to_torch(call, reason)

    def ends(self) -> dict[str, Node]:
        """The values that must be in memory after a step, by column."""
        ends = dict(self.kept)
        ends["param"] = self.now["param"]
        if "update" in self.plan.results:
            ends["update"] = self.now.get("update", self.now["grad"])
        return ends

    def fresh(self, name: str) -> str:
        """This name, or one like it, that no rule has given to anything of its own."""
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name

    def _run(self, call: Call) -> str:
        """Run one rule on symbols; the reason if that cannot be done."""
        rule = call.rule
        if rule.scope not in ("elementwise", "blockwise"):
            return f"it is {rule.scope}"
        for _, name in call.reads:
            if self.now[name].op == "column" and not self._has_shape_of_leaf(name):
                return f"it reads {name!r}, which may have another shape than its leaf"
        columns = {name: self.now[name] for _, name in call.reads}
        try:
            # On numbers too: a rule may look at types or shapes, and be another function on
            # symbols.
            check(call, self.numbers)
            scalars = self._scalars(call)
            takes = []
            for reduced in call.reductions:
                take = Take(
                    self._name(call, reduced),
                    self.graph.reduced(reduced, columns),
                    reduced.reduction,
                )
                takes.append(take)
                scalars[reduced.name] = self.graph.scalar(take.name, take.node.stage + 1)
            if rule.signature.random:
                scalars[call.key] = self._key(call)
            # Equal nodes are made once, so what a later rule repeats counts as the first one's.
            begin = len(self.graph.nodes)
            written = self.graph.run(call, columns, scalars)
        except NotPointwise as problem:
            return str(problem)
        # Only now: of a rule that torch runs after all, nothing may stay.
        self.takes += takes
        self.origins.append(Origin(repr(rule), range(begin, len(self.graph.nodes))))
        for _, name in call.numbers:
            self.numbers[name] = written.pop(name)
        self.now.update(written)
        for name in rule.slots:
            if name in written:
                self.kept[name] = written[name]
        return ""

    def _name(self, call: Call, reduced: Reduced) -> str:
        """The name of a reduction among the scalars of kernels."""
        # Another rule may have a hyper of this name.
        if reduced.name in self.plan.defaults or reduced.name in self.plan.numbers:
            return self.fresh(f"{reduced.name}_of_{call.position}")
        return reduced.name

    def _scalars(self, call: Call) -> dict[str, object]:
        """The hypers and numbers that a rule gets, by the chain's names."""
        scalars: dict[str, object] = {}
        for _, name in call.scalars:
            of_tree = self.numbers.get(name)
            scalars[name] = self.graph.scalar(name) if of_tree is None else of_tree
        scalars[DTYPE] = None  # whatever it is: a kernel is compiled for one
        return scalars

    def _key(self, call: Call) -> SymbolKey:
        own = (self.graph.word(f"{call.key}_0"), self.graph.word(f"{call.key}_1"))
        # Short draws of all rules are made of one key, so that its bits are computed once.
        short = f"{KEY}_{SHORT}"
        for_short = (self.graph.word(f"{short}_0"), self.graph.word(f"{short}_1"))
        return SymbolKey(own, for_short, call.position)

    def _has_shape_of_leaf(self, name: str) -> bool:
        if name not in self.plan.slots or name in self.plan.shaped:
            return True
        return name in self.plan.blocks or name in self.plan.blocks.values()

    def _leave_to_torch(self, call: Call, reason: str) -> None:
        """Torch runs the rule as soon as what it reads is in memory."""
        inputs = {name: self.now[name] for _, name in call.reads}
        numbers = {name: self.numbers[name] for _, name in call.scalars if name in self.numbers}
        time = 0
        for node in inputs.values():
            # A column is in memory when its stage begins, other values when their pass is done.
            there = node.stage if node.op == "column" else node.stage + 1
            time = max(time, there)
        for node in numbers.values():
            time = max(time, node.stage)
        outputs = {}
        for _, name in call.writes:
            # Not the old column: a later pass may recompute values of earlier rules from it.
            outputs[name] = self.fresh(f"{name}_by_{call.position}")
            self.now[name] = self.graph.column(outputs[name], time)
            if name in call.rule.slots:
                self.kept[name] = self.now[name]
        sets = {}
        for _, name in call.numbers:
            # The rule sets it when it runs; a name of its own keeps it apart from the old value.
            sets[name] = self.fresh(f"{name}_by_{call.position}")
            self.numbers[name] = self.graph.scalar(sets[name], time)
        self.left.append(LeftRule(time, call, reason, inputs, outputs, numbers, sets))
