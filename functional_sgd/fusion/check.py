"""Check a traced rule against the rule itself, on a few numbers: symbols must not lead it where
tensors do not.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from functional_sgd.fusion.arithmetic import Graph, Node, NotPointwise
from functional_sgd.rule import COUNTER
from functional_sgd.wiring import Call

_NAMES = {"and": "logical_and", "or": "logical_or", "not": "logical_not"}


def check(call: Call) -> None:
    """Raise NotPointwise if a rule, run on symbols, is not the arithmetic that it is on tensors."""
    graph = Graph(reducing=call.rule.scope == "leafwise")
    written = graph.run(call, {outer: graph.column(outer) for _, outer in call.reads})
    columns = {
        outer: torch.linspace(-1.3, 1.7, 7, dtype=torch.float64, device="cpu")
        .roll(place)
        .mul(1 + place)
        for place, outer in enumerate(sorted({outer for _, outer in call.reads}))
    }
    scalars = {outer: _trial_value(call, inner, outer) for inner, outer in call.scalars}
    norms = {
        name: torch.linalg.vector_norm(columns[column]) for name, column in graph.norms.items()
    }
    values = evaluate(graph.needed(written.values()), columns, {**scalars, **norms})
    with torch.no_grad():
        results = call.run({name: column.clone() for name, column in columns.items()}, scalars)
    for name, result in results.items():
        wanted, found = result.double(), values[written[name].index].double()
        if not torch.allclose(
            found.broadcast_to(wanted.shape), wanted, rtol=1e-9, atol=1e-12, equal_nan=True
        ):
            raise NotPointwise(
                "on symbols it does something else than on tensors (does it look at types?)"
            )


def evaluate(
    nodes: Iterable[Node], columns: Mapping[str, Tensor], scalars: Mapping[str, Any]
) -> dict[int, Tensor]:
    """The values of nodes, by their index, computed with torch."""
    values: dict[int, Tensor] = {}
    for node in nodes:
        if node.op == "column":
            values[node.index] = columns[node.args[0]]
        elif node.op in ("scalar", "constant"):
            value = scalars[node.args[0]] if node.op == "scalar" else node.args[0]
            known = isinstance(value, Tensor)
            values[node.index] = (
                value.double() if known else torch.tensor(value, dtype=torch.float64, device="cpu")
            )
        else:
            values[node.index] = operator_of(node)(*(values[arg.index] for arg in node.args))
    return values


def operator_of(node: Node) -> Callable[..., Tensor]:
    """The torch function of an operation."""
    if node.op == "where":
        return lambda condition, yes, no: torch.where(condition != 0, yes, no)
    function: Callable[..., Tensor] = getattr(torch, _NAMES.get(node.op, node.op))
    return function


def _trial_value(call: Call, inner: str, outer: str) -> Any:
    if outer == COUNTER:
        return torch.tensor(3.0, dtype=torch.float64, device="cpu")
    default = call.rule.scalars[inner]
    return default if isinstance(default, (int, float)) else 0.3
