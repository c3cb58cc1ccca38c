"""Plan how a chain runs: which pass over memory computes, reads and writes what.

The graph of a chain is cut where a number must be known that is made of whole columns: everything
up to there is one stage, and a kernel makes one pass over memory for each stage. The reductions of
a stage are taken in the pass that has their columns at hand, so that a number costs no pass of its
own if some rule before it works on the same columns anyway.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

from functional_sgd.call import Plan
from functional_sgd.fusion.arithmetic import LOGICAL, Node
from functional_sgd.fusion.passes import Pass, Program, Step, TorchRule
from functional_sgd.fusion.symbolic import LeftRule, SymbolicChain

Sources: TypeAlias = dict[int, str]
"""Node (by its index) -> the column in memory that has its values."""

WORTH_RECOMPUTING = 2
"""Columns that a later pass may read more to compute a value again, rather than having it stored.

Stored, it is written once and read once: as many bytes, and memory for them.
"""


def make_program(plan: Plan, rounded: frozenset[str] = frozenset()) -> Program:
    """The program of a chain. `rounded` are the columns that are stored in less precision than
    rules calculate in: what is written there cannot be read again in their place.
    """
    return _Planner(SymbolicChain(plan), rounded).program()


class _Written(NamedTuple):
    """Where a computed value is in memory."""

    column: str
    stage: int  # the pass that writes it; later ones may read it


class _Planner:
    """Decides what each pass writes, the last one first: later ones say what they miss.

    Backwards, since only a reader can say whether a value must be in memory at all: to compute it
    again from columns that are at hand costs nothing beside a pass that writes it and another that
    reads it.
    """

    def __init__(self, chain: SymbolicChain, rounded: frozenset[str]) -> None:
        self.chain, self.graph = chain, chain.graph
        self.ends = chain.ends()
        self.computed = self._computed()
        self.written_at: dict[str, int] = {}
        self.readable: dict[int, _Written] = {}
        for name, node in self.computed.items():
            # A column is written in place where that is allowed, so not before its last reader has
            # run.
            stage = self._time_to_write(name, node)
            self.written_at[name] = stage
            # What is written in less precision than it was computed in is another number when it is
            # read again, and truth values are not stored as such: neither stands for the node.
            if name not in rounded and node.op not in LOGICAL:
                self.readable[node.index] = _Written(name, stage)
        self.temporaries: Sources = {}
        self.count = self._count()
        self.outputs: list[dict[str, Node]] = [{} for _ in range(self.count)]  # of each stage
        for name, node in self.computed.items():
            self.outputs[self.written_at[name]][name] = node

    def program(self) -> Program:
        """The steps in order."""
        # Rules of torch first: they need their inputs in memory, and passes may use what is there.
        torch_rules = [self._torch_rule(left) for left in self.chain.left]
        passes = [self._pass(stage) for stage in reversed(range(self.count))]
        steps: list[Step] = []
        for stage, one in enumerate(reversed(passes)):
            steps += self._due(torch_rules, stage)
            if one.outputs or one.takes:
                steps.append(one)
        steps += self._due(torch_rules, self.count)
        return Program(tuple(steps), self._results(), self._numbers())

    def _computed(self) -> dict[str, Node]:
        """The results that a pass must write; the others are in a column already."""
        made_by_torch: set[str] = set()
        for left in self.chain.left:
            made_by_torch.update(left.outputs.values())
        computed = {}
        for name, node in self.ends.items():
            in_memory = node.op == "column" and node.args[0] in {name, *made_by_torch}
            if not in_memory:
                computed[name] = node
        return computed

    def _results(self) -> dict[str, str]:
        """In which column each result is, but for those that stay as they are."""
        results = {name: name for name in self.computed}
        for name, node in self.ends.items():
            if name not in self.computed and node.args[0] != name:
                results[name] = node.args[0]
        return results

    def _numbers(self) -> dict[str, Node]:
        """What the numbers of the tree become that do not stay as they are."""
        changed = {}
        for name, node in self.chain.numbers.items():
            if not (node.op == "scalar" and node.args[0] == name):
                changed[name] = node
        return changed

    def _count(self) -> int:
        """How many stages there are."""
        last = 0
        for stage in self.written_at.values():
            last = max(last, stage)
        for take in self.chain.takes:
            last = max(last, take.node.stage)
        count = last + 1
        for left in self.chain.left:
            count = max(count, left.time)
        return count

    def _time_to_write(self, name: str, node: Node) -> int:
        """The stage that writes a result: when it is known, and nobody reads the old one."""
        time = node.stage
        for one in self.graph.nodes:
            if any(_is_column(name, argument) for argument in one.inputs):
                time = max(time, one.stage)
        for left in self.chain.left:
            if any(_is_column(name, argument) for argument in left.inputs.values()):
                time = max(time, left.time)
        return time

    # Rules of torch.

    def _torch_rule(self, left: LeftRule) -> TorchRule:
        places, logical = {}, set()
        for name, node in left.inputs.items():
            places[name] = self._place(node)
            if node.op in LOGICAL:
                logical.add(name)
        return TorchRule(
            left.time,
            left.call,
            left.reason,
            places,
            left.outputs,
            frozenset(logical),
            left.numbers,
            left.sets,
        )

    def _due(self, rules: Iterable[TorchRule], stage: int) -> list[TorchRule]:
        return [rule for rule in rules if rule.time == stage]

    def _place(self, node: Node) -> str:
        """The column where a torch rule finds a value; a temporary one if it must be written."""
        if node.op == "column":
            return str(node.args[0])
        written = self.readable.get(node.index)
        # A result may be written later than it is known, perhaps after the rule has run.
        if written is not None and written.stage <= node.stage:
            return written.column
        return self._temporary(node)

    def _temporary(self, node: Node) -> str:
        """A column for a value that later steps read and that is no result."""
        if node.index not in self.temporaries:
            column = self.chain.fresh(f"temporary_{len(self.temporaries)}")
            self.temporaries[node.index] = column
            self.outputs[node.stage][column] = node
        return self.temporaries[node.index]

    # Passes.

    def _pass(self, stage: int) -> Pass:
        """One pass, once all later ones have said what they want it to write."""
        outputs = self.outputs[stage]
        takes = tuple(take for take in self.chain.takes if take.node.stage == stage)
        ends = [*outputs.values(), *(take.node for take in takes)]
        sources = self._sources(ends, stage)
        made = {node.index for node in self.graph.needed(ends, sources)} - sources.keys()
        rules = []
        for origin in self.chain.origins:
            if not made.isdisjoint(origin.nodes):
                rules.append(origin.rule)
        return Pass(self.graph, stage, tuple(rules), sources, outputs, takes)

    def _sources(self, ends: Iterable[Node], stage: int) -> Sources:
        """What a pass reads from memory: columns, and values that earlier passes write for it."""
        sources, earlier = self._walk(ends, stage)
        # The latest first: the columns that it brings in are at hand for the others, which then
        # cost less.
        for node in sorted(earlier, key=lambda one: -one.index):
            again, _ = self._walk([node], stage, into_earlier=True)
            more = set(again.values()) - set(sources.values())
            if self._overwritten(again, stage) or len(more) > WORTH_RECOMPUTING:
                sources[node.index] = self._temporary(node)
            else:
                sources.update(again)
        return sources

    def _overwritten(self, sources: Mapping[int, str], stage: int) -> bool:
        """Whether an earlier pass has written over a column that is among these."""
        for index, column in sources.items():
            is_original = self.graph.nodes[index].op == "column"
            if is_original and self.written_at.get(column, stage) < stage:
                return True
        return False

    def _walk(
        self, ends: Iterable[Node], stage: int, into_earlier: bool = False
    ) -> tuple[Sources, list[Node]]:
        """Go from values to what they are made of, down to columns that are in memory: these
        columns, and the values of earlier stages that are in none.
        """
        sources: Sources = {}
        earlier: list[Node] = []
        waiting = list(ends)
        seen: set[int] = set()
        while waiting:
            node = waiting.pop()
            if node.index in seen or not node.element:
                continue
            seen.add(node.index)
            written = self.readable.get(node.index)
            if node.op == "column":
                sources[node.index] = node.args[0]
            elif node.index in self.temporaries and node.stage < stage:
                sources[node.index] = self.temporaries[node.index]
            elif written is not None and written.stage < stage:
                sources[node.index] = written.column
            elif node.stage < stage and not into_earlier:
                earlier.append(node)
            else:
                waiting.extend(node.inputs)
        return sources, earlier


def _is_column(name: str, node: Node) -> bool:
    """Whether a node is what is in this column to begin with."""
    return bool(node.op == "column" and node.args[0] == name)
