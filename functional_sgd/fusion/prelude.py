"""A leafwise or treewise rule as the prelude of a kernel: what it reduces leaves to, and what it
does with that.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from functional_sgd.call import Plan
from functional_sgd.fusion.arithmetic import Graph, Node
from functional_sgd.fusion.check import evaluate
from functional_sgd.fusion.lazy import Lazy, lazy_leaves
from functional_sgd.rule import COUNTER, REQUIRED
from functional_sgd.tree import Tree
from functional_sgd.wiring import Call


@dataclass(frozen=True)
class Prelude:
    """A rule whose results are pointwise in its leaves, given a few numbers that it makes of them."""

    call: Call
    trace: tuple[
        str, ...
    ]  # the arithmetic, in words: a run that does something else cannot be used
    together: bool  # whether the numbers are those of all leaves

    def numbers(
        self,
        columns: Sequence[Mapping[str, Tensor]],
        keys: Mapping[str, str],
        scalars: Sequence[Mapping[str, Any]],
        tree_of: Callable[[list[Any]], Tree],
        leaves_of: Callable[[Tree], list[Any]],
        norms: Callable[[str], Sequence[Tensor]],
    ) -> dict[str, list[Tensor]] | None:
        """The numbers of every leaf, by name; None if the rule did not do what it did when it was
        traced.

        `norms` gives those of all leaves of a column.
        """
        graph = Graph()
        symbols = {outer: graph.column(keys[outer]) for _, outer in self.call.reads}
        found = _run(self.call, symbols, columns, scalars, tree_of, leaves_of, self.together, norms)
        if found is None or _words(graph, found[0]) != self.trace:
            return None
        every = found[1]
        return {
            f"{self.call.rule.name}_{place}": [own[place] for own in every]
            for place in range(len(every[0]))
        }


def prepare(
    plan: Plan, call: Call, graph: Graph, columns: dict[str, Node], together: bool
) -> Prelude | None:
    """The prelude that this rule can be, tried on two small leaves; its results are then among the
    columns.

    It is `together` if the rule reduces all leaves to the same numbers.
    """
    if call.rule.initializers or graph.nodes:
        return None
    symbols = {outer: columns[outer] for _, outer in call.reads}
    leaves = [{outer: torch.full((2, 2), size) for outer in symbols} for size in (1.0, 2.0)]
    defaults = {name: 0.5 if value is REQUIRED else value for name, value in plan.defaults.items()}
    defaults[COUNTER] = torch.ones((), dtype=torch.float64)
    try:
        found = _run(call, symbols, leaves, [defaults, defaults], list, list, together)
    except Exception:  # whatever it does that lazy leaves cannot do: torch will run it
        found = None
    if found is None or not _agrees(call, graph, found, leaves, symbols, defaults):
        return None
    columns.update(found[0])
    return Prelude(call, _words(graph, found[0]), together)


def _agrees(
    call: Call,
    graph: Graph,
    found: tuple[dict[str, Node], list[list[Tensor]]],
    leaves: Sequence[Mapping[str, Tensor]],
    symbols: Mapping[str, Node],
    scalars: Mapping[str, Any],
) -> bool:
    """Whether the arithmetic, with the numbers, gives what the rule gives on tensors."""
    wanted = _results(call, leaves, [scalars] * len(leaves), list, list)
    for place, (leaf, numbers) in enumerate(zip(leaves, found[1], strict=True)):
        columns = {symbols[outer].args[0]: value.double() for outer, value in leaf.items()}
        named = {f"{call.rule.name}_{k}": float(number) for k, number in enumerate(numbers)}
        values = evaluate(graph.needed(found[0].values()), columns, named)
        for outer, node in found[0].items():
            if not torch.allclose(
                values[node.index].float(), wanted[outer][place].float(), rtol=1e-4
            ):
                return False
    return True


def _run(
    call: Call,
    symbols: Mapping[str, Node],
    columns: Sequence[Mapping[str, Tensor]],
    scalars: Sequence[Mapping[str, Any]],
    tree_of: Callable[[list[Any]], Tree],
    leaves_of: Callable[[Tree], list[Any]],
    together: bool,
    norms: Callable[[str], Sequence[Tensor]] | None = None,
) -> tuple[dict[str, Node], list[list[Tensor]]] | None:
    """Run the rule on lazy leaves: what it writes as nodes, the same for all leaves, and the
    numbers of each leaf.
    """
    lazy = lazy_leaves(columns, symbols, call.rule.name, together, norms)
    nodes = {}
    for outer, values in _results(call, lazy, scalars, tree_of, leaves_of).items():
        if not all(isinstance(value, Lazy) and value.node is values[0].node for value in values):
            return None
        nodes[outer] = values[0].node
    return nodes, [next(iter(leaf.values())).numbers.values for leaf in lazy]


def _results(
    call: Call,
    leaves: Sequence[Mapping[str, Any]],
    scalars: Sequence[Mapping[str, Any]],
    tree_of: Callable[[list[Any]], Tree],
    leaves_of: Callable[[Tree], list[Any]],
) -> dict[str, list[Any]]:
    """What the rule writes, leaf by leaf, on leaves of whatever kind."""
    if call.treewise:
        trees = {name: tree_of([leaf[name] for leaf in leaves]) for _, name in call.reads}
        return {name: leaves_of(tree) for name, tree in call.run(trees, scalars[0]).items()}
    each = [call.run(leaf, own) for leaf, own in zip(leaves, scalars, strict=True)]
    return {name: [one[name] for one in each] for _, name in call.writes}


def _words(graph: Graph, results: Mapping[str, Node]) -> tuple[str, ...]:
    return (
        *map(repr, graph.nodes),
        *(f"{name} = %{node.index}" for name, node in sorted(results.items())),
    )
