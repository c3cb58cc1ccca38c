"""Run a kernel's arithmetic with torch's foreach operators: what is left where there is no
compiler.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from functional_sgd.fusion.arithmetic import Graph, Node
from functional_sgd.fusion.check import evaluate, operator_of

Values = list[Tensor]
"""One tensor for each leaf."""

_BOTH = ("add", "sub", "mul", "div", "maximum", "minimum", "pow")
_ALONE = (
    "neg",
    "abs",
    "sqrt",
    "rsqrt",
    "exp",
    "expm1",
    "log",
    "tanh",
    "sigmoid",
    "sign",
    "floor",
    "ceil",
    "round",
)


def run_foreach(
    graph: Graph,
    outputs: Mapping[str, Node],
    columns: Mapping[str, Values],
    rows: Mapping[str, Sequence[float | Tensor]],
) -> dict[str, Values]:
    """The outputs of a segment; `rows` has, for each scalar, one value for all leaves, or one for
    each.

    Values are numbers, or 0-d tensors where the leaves are, which stay there.
    """
    nodes = graph.needed(outputs.values())
    count = len(next(iter(columns.values())))
    scalars = [
        evaluate(
            [node for node in nodes if not node.element],
            {},
            {name: row[k % len(row)] for name, row in rows.items()},
        )
        for k in range(max((len(row) for row in rows.values()), default=1))
    ]
    values: dict[int, Any] = {}
    for node in nodes:
        if not node.element:
            each = [_number(own[node.index]) for own in scalars]
            alike = len(each) == 1
            values[node.index] = (
                each * count
                if alike and isinstance(each[0], Tensor)
                else each[0]
                if alike
                else each
            )
        elif node.op == "column":
            values[node.index] = columns[node.args[0]]
        else:
            values[node.index] = _apply(
                node, [values[arg.index] for arg in node.args if isinstance(arg, Node)], count
            )
    like = next(iter(columns.values()))
    return {key: _leaves(values[node.index], like) for key, node in outputs.items()}


def _apply(node: Node, args: list[Any], count: int) -> Values:
    """One operation on all leaves: a foreach operator if there is one for these arguments, else
    leaf by leaf.
    """
    whole = bool(args) and isinstance(args[0], list) and isinstance(args[0][0], Tensor)
    if whole and node.op in _ALONE:
        return list(getattr(torch, f"_foreach_{node.op}")(args[0]))
    if whole and node.op in _BOTH and not any(value.dtype == torch.bool for value in args[0]):
        return list(getattr(torch, f"_foreach_{node.op}")(args[0], args[1]))
    if node.op == "constant":
        return [torch.tensor(node.args[0])] * count
    function = operator_of(node)
    return [
        function(*(_tensor(arg[k] if isinstance(arg, list) else arg) for arg in args))
        for k in range(count)
    ]


def _number(value: Tensor) -> float | Tensor:
    """A number, if that needs no waiting."""
    return float(value) if value.device.type == "cpu" else value


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def _leaves(value: Any, like: Values) -> Values:
    every = value if isinstance(value, list) else [value] * len(like)
    return [
        _tensor(own).to(leaf.device, leaf.dtype).expand(leaf.shape)
        for own, leaf in zip(every, like, strict=True)
    ]
