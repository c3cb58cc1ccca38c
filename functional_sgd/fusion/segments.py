"""Cut a chain into segments: runs of elementwise rules that become one kernel, and single rules
that cannot.
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from functional_sgd.call import Plan
from functional_sgd.fusion.arithmetic import Graph, Node, NotPointwise
from functional_sgd.fusion.c_source import emit
from functional_sgd.fusion.check import check
from functional_sgd.fusion.device import DeviceLauncher, Hyper, kind_of
from functional_sgd.fusion.launch import Launcher
from functional_sgd.fusion.prelude import Prelude, prepare
from functional_sgd.fusion.source import Kernel, Parts, parts_of
from functional_sgd.fusion.triton_source import emit_triton
from functional_sgd.wiring import Call


@dataclass(frozen=True, eq=False)
class Segment:
    """Some calls of a chain, in a row. `keys` say where in the table of columns a name is found
    before they run.

    A key is the name itself, or name__shadow for a slot that a later rule has shadowed.
    """

    calls: tuple[Call, ...]
    keys: Mapping[str, str]
    graph: Graph | None = None  # None: run it with torch
    outputs: Mapping[str, Node] = field(default_factory=dict)  # key -> what the kernel writes there
    final: frozenset[str] = frozenset()  # the outputs that are results, not temporaries
    prelude: Prelude | None = None  # what its first rule reduces leaves to, before the kernel
    instead: tuple[
        "Segment", ...
    ] = ()  # the same without the prelude, for calls in which it does not work
    reason: str = ""  # why it is not a kernel
    launchers: dict[Any, Any] = field(default_factory=dict)  # compiled so far

    @property
    def title(self) -> str:
        """The names of the rules."""
        return ", ".join(repr(call.rule) for call in self.calls)

    def launcher(
        self,
        dtypes: Mapping[str, torch.dtype],
        results: Mapping[str, torch.dtype],
        working: torch.dtype,
    ) -> Launcher:
        """The compiled kernel for columns of these dtypes. Raises NoCompiler if it cannot be
        compiled.
        """
        key = (*dtypes.items(), None, *results.items())
        if key not in self.launchers:
            self.launchers[key] = Launcher(self.kernel(dtypes, results, working))
        launcher: Launcher = self.launchers[key]
        return launcher

    def on_device(
        self,
        device: torch.device,
        hypers: Sequence[Hyper],
        dtypes: Mapping[str, torch.dtype],
        results: Mapping[str, torch.dtype],
        working: torch.dtype,
    ) -> DeviceLauncher:
        """The same for a GPU, and hypers of the kinds of these. Raises NoTriton if it cannot be
        compiled.
        """
        kinds = tuple(map(kind_of, hypers))
        key = (device, kinds, *dtypes.items(), None, *results.items())
        if key not in self.launchers:
            named = dict(zip(self.hypers, kinds, strict=True))
            kernel = self.device_kernel(
                dtypes, results, working, [name for name, kind in named.items() if kind]
            )
            self.launchers[key] = DeviceLauncher(kernel, named, device)
        launcher: DeviceLauncher = self.launchers[key]
        return launcher

    @functools.cached_property
    def hypers(self) -> tuple[str, ...]:
        """The scalars that the kernel is called with."""
        return self._parts.hypers

    @functools.cached_property
    def norms(self) -> dict[str, str]:
        """Those of them that are norms of a leaf in some column."""
        known = {} if self.graph is None else self.graph.norms
        return {name: known[name] for name in self.hypers if name in known}

    @functools.cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns that the kernel reads."""
        return self._parts.inputs

    @functools.cached_property
    def _parts(self) -> Parts:
        assert self.graph is not None
        return parts_of(self.graph, self.outputs)

    def kernel(
        self,
        dtypes: Mapping[str, torch.dtype],
        results: Mapping[str, torch.dtype],
        working: torch.dtype,
    ) -> Kernel:
        """The C function for columns of these dtypes."""
        assert self.graph is not None
        return emit(self.graph, self.outputs, dtypes, results, working, self.title)

    def device_kernel(
        self,
        dtypes: Mapping[str, torch.dtype],
        results: Mapping[str, torch.dtype],
        working: torch.dtype,
        tensors: Collection[str],
    ) -> Kernel:
        """The Triton function; `tensors` are the hypers that come as pointers."""
        assert self.graph is not None
        return emit_triton(self.graph, self.outputs, dtypes, results, working, self.title, tensors)


def cut(plan: Plan) -> tuple[Segment, ...]:
    """The segments of a chain. Rules that reduce whole leaves are preludes of kernels where they
    can be.
    """
    segments: list[Segment] = []
    keys = {name: name for name in ("param", "grad", *plan.slots)}
    start = 0
    while start < len(plan.calls):
        segment, after = _next_segment(plan, start, keys, lazily=True)
        if segment.prelude is not None:
            alone, between = _next_segment(plan, start, keys, lazily=False)
            rest = plan.calls[start + 1 : start + len(segment.calls)]
            instead = (
                (alone, _next_segment(plan, start + 1, between, lazily=False)[0])
                if rest
                else (alone,)
            )
            segment = replace(segment, instead=instead)
        segments.append(segment)
        keys, start = after, start + len(segment.calls)
    return tuple(segments)


def _next_segment(
    plan: Plan, start: int, keys: Mapping[str, str], lazily: bool
) -> tuple[Segment, dict[str, str]]:
    """The segment that begins at this call, and where names are found after it."""
    graph = Graph()
    columns, kept = _Columns(graph, keys), dict[str, Node]()
    prelude, position, reason = None, start, ""
    if lazily and plan.calls[start].rule.scope != "elementwise":
        graph, columns, prelude, reason = _reduction(plan, plan.calls[start], keys)
        position += not reason
    while not reason and position < len(plan.calls):
        reason = _trace(graph, columns, kept, plan.calls[position])
        position += not reason
    if position > start:
        return _kernel_segment(
            plan, plan.calls[start:position], position, graph, columns, kept, keys, prelude
        )
    call = plan.calls[start]
    after = {**keys, **{name: key_of(plan, call, name) for _, name in call.writes}}
    return Segment((call,), dict(keys), reason=f"{call.rule!r}: {reason}"), after


def key_of(plan: Plan, call: Call, name: str) -> str:
    """Where a call's result is put."""
    return name if name in call.rule.slots or name not in plan.slots else f"{name}__shadow"


def _reduction(
    plan: Plan, call: Call, keys: Mapping[str, str]
) -> tuple[Graph, "_Columns", Prelude | None, str]:
    """Begin a kernel with a rule that reduces whole leaves: to norms, or to what it is said to by
    its prelude.
    """
    graph = Graph(reducing=True)
    columns = _Columns(graph, keys)
    if (
        call.rule.scope == "leafwise"
        and not call.rule.initializers
        and not _trace(graph, columns, {}, call)
    ):
        graph.reducing = False
        return graph, columns, None, ""
    for together in (True, False) if call.treewise else (False,):
        graph = Graph()
        columns = _Columns(graph, keys)
        prelude = prepare(plan, call, graph, columns, together)
        if prelude:
            return graph, columns, prelude, ""
    return graph, columns, None, f"it is {call.rule.scope}"


class _Columns(dict[str, Node]):
    """The symbols at hand, by name; those from before the segment are made on demand."""

    def __init__(self, graph: Graph, keys: Mapping[str, str]) -> None:
        super().__init__()
        self.graph, self.keys_before = graph, keys

    def __missing__(self, name: str) -> Node:
        self[name] = self.graph.column(self.keys_before[name])
        return self[name]


def _trace(graph: Graph, columns: _Columns, kept: dict[str, Node], call: Call) -> str:
    """Run one rule on symbols; the reason if it cannot be done."""
    if call.rule.scope != "elementwise" and not graph.reducing:
        return f"it is {call.rule.scope}"
    try:
        check(call)
        written = graph.run(call, columns)
    except NotPointwise as problem:
        return str(problem)
    columns.update(written)
    kept.update({name: written[name] for name in call.rule.slots if name in written})
    return ""


def _kernel_segment(
    plan: Plan,
    calls: Sequence[Call],
    position: int,
    graph: Graph,
    columns: _Columns,
    kept: Mapping[str, Node],
    keys: Mapping[str, str],
    prelude: Prelude | None,
) -> tuple[Segment, dict[str, str]]:
    """The segment, with only those outputs that somebody needs; and where names are found after it."""
    later = plan.calls[position:]
    needed = {outer for call in later for _, outer in call.reads}
    written = {outer for call in calls for _, outer in call.writes}
    outputs: dict[str, Node] = dict(kept)
    after = dict(keys)
    for name in sorted(written):
        after[name] = name
        if (name in kept and columns[name] is not kept[name]) or (
            name in plan.slots and name not in kept
        ):
            after[name] = f"{name}__shadow"
        if name == "param" or name in needed:
            outputs[after[name]] = columns[name]
    last_param = not any(outer == "param" for call in later for _, outer in call.writes)
    final = frozenset(
        name for name in outputs if name in plan.slots or (name == "param" and last_param)
    )
    return Segment(tuple(calls), dict(keys), graph, outputs, final, prelude), after
