"""How a chain runs: passes over memory, and the rules between them that torch must run.

`planning` makes these records, once for each chain; `run` goes through them at every step.

    clip_norm, adamw:   pass 0 reads grad, takes its norm;   pass 1 is clip_norm and adamw
    lamb:               pass 0 is adam, writes its averages, and takes the norms of param and update
                        pass 1 scales the update and moves the params
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from functional_sgd.fusion.arithmetic import Graph, Node
from functional_sgd.reduction import Reduction
from functional_sgd.wiring import Call


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
        found: dict[str, None] = {}  # a set that keeps its order
        for node in self.nodes:
            if node.index in self.sources:
                found[self.sources[node.index]] = None
        return tuple(found)

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
        found = {name for name, node in self.outputs.items() if node.block}
        for node in self.nodes:
            if node.block and node.index in self.sources:
                found.add(self.sources[node.index])
        return frozenset(found)

    @functools.cached_property
    def ordered(self) -> bool:
        """Whether elements must be in their logical order in memory."""
        return self.random or self.blocked

    @property
    def title(self) -> str:
        """What it does, in words."""
        takes = [f"takes {take.name}" for take in self.takes]
        return ", ".join((*self.rules, *takes))


@dataclass(frozen=True)
class TorchRule:
    """A rule that torch runs between two passes."""

    time: int  # after all passes before this stage
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
    numbers: Mapping[str, Node]  # numbers of the tree that change -> what they become

    def needed_after(self, step: Step, column: str) -> bool:
        """Whether a column is among the results, or read by a later step."""
        if column in self.results.values():
            return True
        place = next(n for n, one in enumerate(self.steps) if one is step)
        for later in self.steps[place + 1 :]:
            read = later.reads if isinstance(later, Pass) else later.inputs.values()
            if column in read:
                return True
        return False
