"""The backend that needs no compiler: torch's foreach operators, one operation after the other."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from functional_sgd.fusion.arithmetic import Node
from functional_sgd.fusion.backends.backend import Backend, Runner, Totals
from functional_sgd.fusion.check import evaluate, operator_of
from functional_sgd.fusion.column import Column
from functional_sgd.fusion.group import Group
from functional_sgd.fusion.kernel import Dtypes
from functional_sgd.fusion.passes import Pass
from functional_sgd.fusion.scalars import Scalars, Value
from functional_sgd.randomness import bits_of, short_of
from functional_sgd.reduction import Reduction

Values: TypeAlias = float | Tensor | list[Tensor] | list[float | Tensor]
"""What a node is: a number for all leaves, or a list with a number or a tensor for each of them."""

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


class ForeachBackend(Backend):
    """Any device, several times slower than a kernel."""

    name = "foreach"

    def treats(self, device: torch.device) -> bool:
        """Every device."""
        return True

    def compile(self, work: Pass, dtypes: Dtypes, scalars: Scalars, group: Group) -> Runner:
        """Nothing is compiled."""
        return _Interpreter(work, dtypes)


class _Interpreter:
    """Runs the nodes of a pass in order."""

    def __init__(self, work: Pass, dtypes: Dtypes) -> None:
        self.work, self.dtypes = work, dtypes

    def __call__(
        self, group: Group, reads: Sequence[Column], writes: Sequence[Column], scalars: Scalars
    ) -> Totals | None:
        work, working = self.work, self.dtypes.working
        columns = dict(zip(work.reads, reads, strict=True))
        found = {name: scalars.find(name, group) for name in work.scalars}
        values = self._numbers(group, found)
        elements: dict[int, list[Tensor]] = {}  # those values that are a tensor for each leaf
        for node in work.nodes:
            if not node.element:
                continue
            if node.index in work.sources:
                tensors = columns[work.sources[node.index]].tensors
                made = [tensor.to(working) for tensor in tensors]
            elif node.op in ("uniform", "tail", "short"):
                # Not from `values`: words must stay integers, and `evaluate` returns floats.
                words = [found[word.args[0]].value for word in node.inputs]
                made = _drawn(node, words, reads[0].tensors, working)
            elif node.op == "wide":
                made = [one.double() for one in elements[node.args[0].index]]
            else:
                inputs = [values[arg.index] for arg in node.inputs]
                made = _apply(node, inputs, len(group.indices), self.dtypes)
                if node.op == "decode":
                    # `operator_of` decodes to float64, because `check` compares in it.
                    made = [value.to(working) for value in made]
            values[node.index] = elements[node.index] = made
        for node in work.outputs.values():
            if node.index in work.sources:  # a column that another write may be about to replace
                copies = [tensor.clone() for tensor in elements[node.index]]
                values[node.index] = elements[node.index] = copies
        # Before the writes, which may go to a column that a reduction is made of.
        totals = [self._take(take.reduction, elements[take.node.index]) for take in work.takes]
        for column, node in zip(writes, work.outputs.values(), strict=True):
            for place, tensor in enumerate(column.tensors):
                tensor.copy_(_at(values[node.index], place))
        return torch.stack(totals, dim=1) if totals else None

    def _take(self, reduction: Reduction, values: list[Tensor]) -> Tensor:
        parts = []
        for value in values:
            wide = value.double()
            # torch refuses the maximum and minimum of no elements.
            if wide.numel() == 0:
                parts.append(reduction.of_nothing(wide))
            else:
                parts.append(reduction.whole(wide))
        return torch.stack(parts)

    def _numbers(self, group: Group, found: Mapping[str, Value]) -> dict[int, Values]:
        """Every number that elements are made of, but for words: one, or one for each leaf."""
        nodes = [node for node in self.work.nodes if not node.element and node.op != "word"]
        # Where no number differs by leaf, one evaluation serves all of them.
        differ = any(one.each for one in found.values())
        count = len(group.indices) if differ else 1
        rows = []
        for place in range(count):
            of_leaf = {name: _given(one, place) for name, one in found.items()}
            rows.append(evaluate(nodes, {}, of_leaf))
        values: dict[int, Values] = {}
        for node in nodes:
            each = [_number(row[node.index]) for row in rows]
            if count > 1:
                values[node.index] = each
            elif isinstance(each[0], Tensor):
                values[node.index] = each * len(group.indices)
            else:
                values[node.index] = each[0]
        return values


def _given(one: Value, place: int) -> Any:
    """What a leaf is given as a scalar."""
    return one.value[place] if one.each else one.value


def _drawn(
    node: Node, words: Sequence[Tensor], like: Sequence[Tensor], working: torch.dtype
) -> list[Tensor]:
    drawn = []
    for place, tensor in enumerate(like):
        own = (words[0][place], words[1][place])
        if node.op == "short":
            drawn.append(short_of(own, tensor))
            continue
        uniform, tail = bits_of(own, torch.empty_like(tensor, dtype=working), node.args[-1])
        if node.op == "uniform":
            drawn.append(uniform)
        else:
            drawn.append(tail)
    return drawn


def _apply(node: Node, args: Sequence[Values], count: int, dtypes: Dtypes) -> list[Tensor]:
    """One operation on all leaves: a foreach operator if there is one, else leaf by leaf."""
    first = _whole(args[0]) if args else None
    if first is not None:
        if node.op in _ALONE:
            return list(getattr(torch, f"_foreach_{node.op}")(first))
        if node.op in _BOTH and not any(value.dtype == torch.bool for value in first):
            return list(getattr(torch, f"_foreach_{node.op}")(first, args[1]))
    function = operator_of(node, dtypes.leaf)
    # A double number would make a leaf without axes double as well.
    precision = torch.float64 if node.wide else dtypes.working
    elements = [arg.element for arg in node.inputs]
    results = []
    for place in range(count):
        own = []
        for values, element in zip(args, elements, strict=True):
            value = _at(values, place)
            if not element:
                value = value.to(precision)
            own.append(value)
        results.append(function(*own))
    return results


def _whole(values: Values) -> list[Tensor] | None:
    """The values, if they are tensors with axes, which foreach operators treat as elements."""
    if not isinstance(values, list) or not isinstance(values[0], Tensor) or values[0].dim() == 0:
        return None
    return cast(list[Tensor], values)


def _number(value: Tensor) -> float | Tensor:
    """A number, if that needs no waiting."""
    return float(value) if value.device.type == "cpu" else value


def _at(values: Values, place: int) -> Tensor:
    """The value of one leaf, as a tensor."""
    value = values[place] if isinstance(values, list) else values
    if isinstance(value, Tensor):
        return value
    # On the CPU whatever the default device is: CPU scalars combine with any tensor.
    return torch.tensor(value, dtype=torch.float64, device="cpu")
