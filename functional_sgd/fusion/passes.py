"""Plan how a chain runs: passes over memory, and the rules between them that torch must run.

Rules are run on symbols once, when the chain is fused. What they do becomes a graph of pointwise
operations, cut where a number must be known that is made of whole columns: everything up to there
is one stage, and a kernel makes one pass over memory for each stage. The reductions of a stage are
taken in the pass that has their columns at hand, so that a number costs no pass of its own if some
rule before it works on the same columns anyway.

    clip_norm, adamw:   pass 0 reads grad, takes its norm;   pass 1 is clip_norm and adamw
    lamb:               pass 0 is adam, writes its averages, and takes the norms of param and update
                        pass 1 scales the update and moves the params
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from functional_sgd.call import Plan
from functional_sgd.fusion.arithmetic import LOGICAL, Graph, Node, NotPointwise, SymbolKey
from functional_sgd.fusion.check import check
from functional_sgd.randomness import SHORT
from functional_sgd.reduction import Reduction
from functional_sgd.signature import DTYPE, KEY, STEP
from functional_sgd.wiring import Call

Sources: TypeAlias = dict[int, str]
"""Node (by its index) -> the column in memory that has its values."""

WORTH_RECOMPUTING = 2
"""Columns that a later pass may read more to compute a value again, rather than having it stored.

Stored, it is written once and read once: as many bytes, and memory for them.
"""


@dataclass(frozen=True)
class Take:
    """A reduction that is taken in a pass."""

    name: str  # of the number, among the scalars of later passes
    node: Node  # what is combined
    reduction: Reduction


@dataclass(frozen=True, eq=False)
class Pass:
    """One pass over memory: what a kernel reads, writes and takes the reductions of."""

    graph: Graph
    stage: int
    rules: tuple[str, ...]  # whose work this is, for people
    sources: Mapping[int, str]
    outputs: Mapping[str, Node]  # column -> its values
    takes: tuple[Take, ...]
    compiled: dict[object, Any] = field(default_factory=dict)  # kernels by backend and dtypes

    @functools.cached_property
    def nodes(self) -> list[Node]:
        """All that is computed or read, in order."""
        ends = [*self.outputs.values(), *(take.node for take in self.takes)]
        return self.graph.needed(ends, self.sources)

    @functools.cached_property
    def reads(self) -> tuple[str, ...]:
        """The columns that it reads."""
        found = [self.sources[n.index] for n in self.nodes if n.index in self.sources]
        return tuple(dict.fromkeys(found))

    @functools.cached_property
    def scalars(self) -> tuple[str, ...]:
        """The numbers that it is called with."""
        return tuple(n.args[0] for n in self.nodes if n.op in ("scalar", "word"))

    @functools.cached_property
    def random(self) -> bool:
        """Whether it draws random numbers, which depend on the order of elements."""
        return any(n.op in ("uniform", "tail", "short") for n in self.nodes)

    @functools.cached_property
    def blocked(self) -> bool:
        """Whether elements are treated in blocks, which have something in common."""
        return any(n.block or n.op == "short" for n in self.nodes)

    @functools.cached_property
    def of_blocks(self) -> frozenset[str]:
        """The columns with a number for each block."""
        read = {self.sources[n.index] for n in self.nodes if n.block and n.index in self.sources}
        return frozenset(read | {name for name, node in self.outputs.items() if node.block})

    @functools.cached_property
    def ordered(self) -> bool:
        """Whether elements must be in their logical order in memory."""
        return self.random or self.blocked

    @property
    def title(self) -> str:
        """What it does, in words."""
        return ", ".join((*self.rules, *(f"takes {take.name}" for take in self.takes)))


@dataclass(frozen=True)
class TorchRule:
    """A rule that torch runs between two passes."""

    call: Call
    reason: str
    inputs: Mapping[str, str]  # column, by the chain's name -> where it is
    outputs: Mapping[str, str]
    logical: frozenset[str]  # inputs that are true or false, stored as numbers
    numbers: Mapping[str, Node]  # the numbers of the tree that it reads, as they are by then
    sets: Mapping[str, str]  # those that it writes -> the names that they have from then on


Step: TypeAlias = Pass | TorchRule


@dataclass(frozen=True)
class Program:
    """The steps of a chain in order, and where its results are after them."""

    steps: tuple[Step, ...]
    results: Mapping[str, str]  # result or slot -> column; those that are not in it stay
    numbers: Mapping[str, Node]  # numbers of the tree -> what they become

    def needed_after(self, step: Step, column: str) -> bool:
        """Whether a column is among the results, or read by a later step."""
        later = self.steps[1 + next(n for n, one in enumerate(self.steps) if one is step) :]
        read = [one.reads if isinstance(one, Pass) else one.inputs.values() for one in later]
        return column in self.results.values() or any(column in names for names in read)


def make_program(plan: Plan, rounded: frozenset[str] = frozenset()) -> Program:
    """The program of a chain. `rounded` are the columns that are stored in less precision than
    rules calculate in: what is written there cannot be read again in their place.
    """
    return _Planner(plan, rounded).program()


@dataclass(frozen=True)
class _Left:
    """A rule that is left to torch, while nobody knows yet where its inputs will be."""

    time: int  # it runs when all passes before this stage are done
    call: Call
    reason: str
    inputs: Mapping[str, Node]
    outputs: Mapping[str, str]
    numbers: Mapping[str, Node]
    sets: Mapping[str, str]


class _Planner:
    def __init__(self, plan: Plan, rounded: frozenset[str]) -> None:
        self.plan, self.rounded, self.graph = plan, rounded, Graph()
        first = ("param", "grad", *plan.slots, *plan.given)
        self.taken = {*first, *plan.defaults, *plan.numbers, STEP}
        of_blocks = set(plan.blocks.values())
        self.now = {  # what rules see
            name: self.graph.column(name, block=name in of_blocks) for name in first
        }
        self.kept: dict[str, Node] = {}  # slots, as their owners wrote them
        self.numbers = {name: self.graph.scalar(name) for name in plan.numbers}
        self.takes: list[Take] = []
        self.torch_rules: list[_Left] = []
        self.made_by: list[tuple[str, range]] = []  # rule, the nodes that its body made
        self.temporaries: Sources = {}
        for call in plan.calls:
            reason = self._trace(call)
            if reason:
                self._leave_to_torch(call, reason)

    def _fresh(self, name: str) -> str:
        """This name, or one like it, that no rule has given to anything of its own."""
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name

    # Tracing.

    def _trace(self, call: Call) -> str:
        """Run one rule on symbols; the reason if that cannot be done."""
        rule = call.rule
        if rule.scope not in ("elementwise", "blockwise"):
            return f"it is {rule.scope}"
        for _, name in call.reads:
            if self.now[name].op == "column" and not self._shaped(name):
                return f"it reads {name!r}, which may have another shape than its leaf"
        columns = {name: self.now[name] for _, name in call.reads}
        try:
            # On numbers too: a rule may look at types or shapes, and be another function on
            # symbols.
            check(call)
            scalars: dict[str, object] = {}
            for _, name in call.scalars:
                of_tree = self.numbers.get(name)
                scalars[name] = self.graph.scalar(name) if of_tree is None else of_tree
            takes = []
            for reduced in call.reductions:
                node = self.graph.reduced(reduced, columns)
                # Another rule may have a hyper of this name.
                known = reduced.name in self.plan.defaults or reduced.name in self.plan.numbers
                name = reduced.name
                if known:
                    name = self._fresh(f"{name}_of_{call.position}")
                scalars[reduced.name] = self.graph.scalar(name, node.stage + 1)
                takes.append(Take(name, node, reduced.reduction))
            if rule.signature.random:
                own, for_short = (
                    (self.graph.word(f"{key}_0"), self.graph.word(f"{key}_1"))
                    for key in (call.key, f"{KEY}_{SHORT}")
                )
                scalars[call.key] = SymbolKey(own, for_short, call.position)
            scalars[DTYPE] = None  # whatever it is: a kernel is compiled for one
            # Equal nodes are made once, so what a later rule repeats counts as the first one's.
            begin = len(self.graph.nodes)
            written = self.graph.run(call, columns, scalars)
        except NotPointwise as problem:
            return str(problem)
        self.takes += takes
        self.made_by.append((repr(rule), range(begin, len(self.graph.nodes))))
        for _, name in call.numbers:
            self.numbers[name] = written.pop(name)
        self.now.update(written)
        self.kept.update({name: written[name] for name in rule.slots if name in written})
        return ""

    def _shaped(self, name: str) -> bool:
        known = name not in self.plan.slots or name in self.plan.shaped
        return known or name in self.plan.blocks or name in self.plan.blocks.values()

    def _leave_to_torch(self, call: Call, reason: str) -> None:
        """Torch runs the rule as soon as what it reads is in memory."""
        inputs = {name: self.now[name] for _, name in call.reads}
        time = 0
        for node in inputs.values():
            # A column is in memory when its stage begins, other values when their pass is done.
            time = max(time, node.stage if node.op == "column" else node.stage + 1)
        numbers = {name: self.numbers[name] for _, name in call.scalars if name in self.numbers}
        time = max([time, *(node.stage for node in numbers.values())])
        outputs = {}
        for _, name in call.writes:
            # Not the old column: a later pass may recompute values of earlier rules from it.
            outputs[name] = self._fresh(f"{name}_by_{call.position}")
            self.now[name] = self.graph.column(outputs[name], time)
            if name in call.rule.slots:
                self.kept[name] = self.now[name]
        sets = {}
        for _, name in call.numbers:
            # The rule sets it when it runs; a name of its own keeps it apart from the old value.
            sets[name] = self._fresh(f"{name}_by_{call.position}")
            self.numbers[name] = self.graph.scalar(sets[name], time)
        self.torch_rules.append(_Left(time, call, reason, inputs, outputs, numbers, sets))

    # Planning.

    def program(self) -> Program:
        """Decide what each pass writes, the last one first: later ones say what they miss."""
        # Backwards, since only a reader can say whether a value must be in memory at all: to
        # compute it again from columns that are at hand costs nothing beside a pass that writes it
        # and another that reads it.
        ends = dict(self.kept)
        ends["param"] = self.now["param"]
        if "update" in self.plan.results:
            ends["update"] = self.now.get("update", self.now["grad"])
        made_by_torch = {key for left in self.torch_rules for key in left.outputs.values()}
        computed = {
            name: node
            for name, node in ends.items()
            if node.op != "column" or node.args[0] not in {name, *made_by_torch}
        }
        # A column is written in place where that is allowed, so not before its last reader has run.
        written_at = {name: self._time_to_write(name, node) for name, node in computed.items()}
        last = max([0, *written_at.values(), *(take.node.stage for take in self.takes)])
        count = max([1 + last, *(left.time for left in self.torch_rules)])
        outputs: list[dict[str, Node]] = [{} for _ in range(count)]
        for name, node in computed.items():
            outputs[written_at[name]][name] = node
        # What is written in less precision than it was computed in is another number when it is
        # read again, and truth values are not stored as such: neither stands for the node.
        readable = {
            node.index: (name, written_at[name])
            for name, node in computed.items()
            if name not in self.rounded and node.op not in LOGICAL
        }
        inputs_of_rules = {}
        for left in self.torch_rules:
            places = {name: self._place(n, readable, outputs) for name, n in left.inputs.items()}
            inputs_of_rules[left.call.position] = places
        stages = reversed(range(count))
        passes = [self._pass(stage, outputs, readable, written_at) for stage in stages]
        steps: list[Step] = []
        for stage, one in enumerate(reversed(passes)):
            steps += self._torch_rules_at(stage, inputs_of_rules)
            if one.outputs or one.takes:
                steps.append(one)
        steps += self._torch_rules_at(count, inputs_of_rules)
        results = {name: name for name in computed}
        for name, node in ends.items():
            if name not in computed and node.args[0] != name:
                results[name] = node.args[0]
        return Program(tuple(steps), results, self.numbers)

    def _time_to_write(self, name: str, node: Node) -> int:
        """The stage that writes a result: when it is known, and nobody reads the old one."""
        time = node.stage
        for one in self.graph.nodes:
            if any(_is(name, argument) for argument in one.inputs):
                time = max(time, one.stage)
        for left in self.torch_rules:
            if any(_is(name, argument) for argument in left.inputs.values()):
                time = max(time, left.time)
        return time

    def _place(
        self,
        node: Node,
        readable: Mapping[int, tuple[str, int]],
        outputs: list[dict[str, Node]],
    ) -> str:
        """The column where a torch rule finds a value; a temporary one if it must be written."""
        if node.op == "column":
            return str(node.args[0])
        # A result may be written later than it is known, perhaps after the rule has run.
        if node.index in readable and readable[node.index][1] <= node.stage:
            return readable[node.index][0]
        return self._temporary(node, outputs)

    def _temporary(self, node: Node, outputs: list[dict[str, Node]]) -> str:
        if node.index not in self.temporaries:
            self.temporaries[node.index] = self._fresh(f"temporary_{len(self.temporaries)}")
            outputs[node.stage][self.temporaries[node.index]] = node
        return self.temporaries[node.index]

    def _torch_rules_at(
        self, stage: int, inputs: Mapping[int, Mapping[str, str]]
    ) -> Iterable[TorchRule]:
        for left in self.torch_rules:
            if left.time == stage:
                logical = frozenset(name for name, n in left.inputs.items() if n.op in LOGICAL)
                places = inputs[left.call.position]
                yield TorchRule(
                    left.call, left.reason, places, left.outputs, logical, left.numbers, left.sets
                )

    def _pass(
        self,
        stage: int,
        outputs: list[dict[str, Node]],
        readable: Mapping[int, tuple[str, int]],
        written_at: Mapping[str, int],
    ) -> Pass:
        """One pass, once all later ones have said what they want it to write."""
        takes = tuple(take for take in self.takes if take.node.stage == stage)
        ends = [*outputs[stage].values(), *(take.node for take in takes)]
        sources: Sources = {}
        earlier: dict[int, Node] = {}  # values of earlier stages that are in no column
        self._walk(ends, stage, readable, sources, earlier)
        columns = set(sources.values())
        # The latest first: the columns that it brings in are at hand for the others, which then
        # cost less.
        for node in sorted(earlier.values(), key=lambda one: -one.index):
            again: Sources = {}
            more: dict[int, Node] = {}
            self._walk([node], node.stage, readable, again, more, inside=True, until=stage)
            # A column that an earlier pass writes no longer has what the value was made of.
            overwritten = any(
                self.graph.nodes[index].op == "column" and written_at.get(name, stage) < stage
                for index, name in again.items()
            )
            extra = set(again.values()) - columns
            if overwritten or len(extra) > WORTH_RECOMPUTING:
                sources[node.index] = self._temporary(node, outputs)
            else:
                sources.update(again)
            columns = set(sources.values())
        done = {n.index for n in self.graph.needed(ends, sources)} - sources.keys()
        rules = tuple(name for name, nodes in self.made_by if done & {*nodes})
        return Pass(self.graph, stage, rules, sources, outputs[stage], takes)

    def _walk(
        self,
        ends: Iterable[Node],
        stage: int,
        readable: Mapping[int, tuple[str, int]],
        sources: Sources,
        earlier: dict[int, Node],
        inside: bool = False,
        until: int | None = None,
    ) -> None:
        """Go from values to what they are made of, down to columns that are in memory.

        Values of earlier stages are put aside, unless we are `inside` one of them.
        """
        before = stage if until is None else until
        waiting = list(ends)
        seen: set[int] = set()
        while waiting:
            node = waiting.pop()
            if node.index in seen or not node.element:
                continue
            seen.add(node.index)
            written = readable.get(node.index)
            if node.op == "column":
                sources[node.index] = node.args[0]
            elif node.index in self.temporaries and node.stage < before:
                sources[node.index] = self.temporaries[node.index]
            elif written is not None and written[1] < before:
                sources[node.index] = written[0]
            elif node.stage < before and not inside:
                earlier[node.index] = node
            else:
                waiting.extend(node.inputs)


def _is(name: str, node: Node) -> bool:
    """Whether a node is what is in this column to begin with."""
    return bool(node.op == "column" and node.args[0] == name)
