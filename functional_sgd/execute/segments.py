"""Cut a chain into segments: runs of elementwise rules that become one kernel, and single rules that cannot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from functional_sgd.execute.c_source import Kernel, emit
from functional_sgd.execute.graph import Graph, Node, NotPointwise
from functional_sgd.execute.launch import Launcher
from functional_sgd.step import Plan
from functional_sgd.wiring import Call


@dataclass(frozen=True, eq=False)
class Segment:
    """Some calls of a chain, in a row. `keys` say where in the table of columns a name is found before they run.

    A key is the name itself, or name__shadow for a slot that a later rule has shadowed.
    """

    calls: tuple[Call, ...]
    keys: Mapping[str, str]
    graph: Graph | None = None  # None: run it with torch
    outputs: Mapping[str, Node] = field(default_factory=dict)  # key -> what the kernel writes there
    final: frozenset[str] = frozenset()  # the outputs that are results, not temporaries
    reason: str = ""  # why it is not a kernel
    launchers: dict[Any, Launcher] = field(default_factory=dict)  # compiled so far

    @property
    def title(self) -> str:
        """The names of the rules."""
        return ", ".join(repr(call.rule) for call in self.calls)

    def launcher(
        self, dtypes: Mapping[str, torch.dtype], results: Mapping[str, torch.dtype], working: torch.dtype
    ) -> Launcher:
        """The compiled kernel for columns of these dtypes. Raises NoCompiler if it cannot be compiled."""
        key = (*dtypes.items(), None, *results.items())
        if key not in self.launchers:
            self.launchers[key] = Launcher(self.kernel(dtypes, results, working))
        return self.launchers[key]

    def kernel(
        self, dtypes: Mapping[str, torch.dtype], results: Mapping[str, torch.dtype], working: torch.dtype
    ) -> Kernel:
        """The C function for columns of these dtypes."""
        assert self.graph is not None
        return emit(self.graph, self.outputs, dtypes, results, working, self.title)


def cut(plan: Plan) -> tuple[Segment, ...]:
    """The segments of a chain."""
    segments: list[Segment] = []
    keys = {name: name for name in ("param", "grad", *plan.slots)}
    position = 0
    while position < len(plan.calls):
        graph, columns, kept, reason = Graph(), _Columns(keys), dict[str, Node](), ""
        start = position
        while position < len(plan.calls):
            call = plan.calls[position]
            reason = _trace(graph, columns, kept, call)
            if reason:
                break
            position += 1
        if position > start:
            calls = plan.calls[start:position]
            segment, keys = _kernel_segment(plan, calls, position, graph, columns, kept, keys)
            segments.append(segment)
        if reason:
            call = plan.calls[position]
            segments.append(Segment((call,), dict(keys), reason=f"{call.rule!r}: {reason}"))
            keys = {**keys, **{outer: key_of(plan, call, inner, outer) for inner, outer in call.writes}}
            position += 1
    return tuple(segments)


def key_of(plan: Plan, call: Call, inner: str, outer: str) -> str:
    """Where a call's result is put."""
    return outer if inner in call.rule.initializers or outer not in plan.slots else f"{outer}__shadow"


class _Columns(dict[str, Node]):
    """The symbols at hand, by name; those from before the segment are made on demand."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        super().__init__()
        self.keys_before = keys
        self.graph: Graph | None = None

    def __missing__(self, name: str) -> Node:
        assert self.graph is not None
        self[name] = self.graph.column(self.keys_before[name])
        return self[name]


def _trace(graph: Graph, columns: _Columns, kept: dict[str, Node], call: Call) -> str:
    """Run one rule on symbols; the reason if it cannot be done."""
    if call.rule.scope != "elementwise":
        return f"it is {call.rule.scope}"
    columns.graph = graph
    try:
        written = graph.run(call, columns)
    except NotPointwise as problem:
        return str(problem)
    columns.update(written)
    kept.update({outer: written[outer] for inner, outer in call.writes if inner in call.rule.initializers})
    return ""


def _kernel_segment(
    plan: Plan,
    calls: Sequence[Call],
    position: int,
    graph: Graph,
    columns: _Columns,
    kept: Mapping[str, Node],
    keys: Mapping[str, str],
) -> tuple[Segment, dict[str, str]]:
    """The segment, with only those outputs that somebody needs; and where names are found after it."""
    later = plan.calls[position:]
    needed = {outer for call in later for _, outer in call.reads}
    written = {outer for call in calls for _, outer in call.writes}
    outputs: dict[str, Node] = dict(kept)
    after = dict(keys)
    for name in sorted(written):
        after[name] = name
        if (name in kept and columns[name] is not kept[name]) or (name in plan.slots and name not in kept):
            after[name] = f"{name}__shadow"
        if name == "param" or name in needed:
            outputs[after[name]] = columns[name]
    last_param = not any(outer == "param" for call in later for _, outer in call.writes)
    final = frozenset(name for name in outputs if name in plan.slots or (name == "param" and last_param))
    return Segment(tuple(calls), dict(keys), graph, outputs, final), after
