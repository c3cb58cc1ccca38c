"""The backend that needs no compiler: torch's foreach operators, one operation after the other."""

from collections.abc import Sequence
from typing import Any

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
        values: dict[int, Any] = self._scalars(group, scalars)
        for node in work.nodes:
            if not node.element:
                continue
            if node.index in work.sources:
                tensors = columns[work.sources[node.index]].tensors
                values[node.index] = [tensor.to(working) for tensor in tensors]
            elif node.op in ("uniform", "tail", "short"):
                words = [values[word.index] for word in node.inputs]
                values[node.index] = _drawn(node, words, reads[0].tensors, working)
            elif node.op == "wide":
                values[node.index] = [one.double() for one in values[node.args[0].index]]
            else:
                inputs = [values[arg.index] for arg in node.inputs]
                # `operator_of` decodes to float64, because `check` compares in it.
                made = _apply(node, inputs, len(group.indices), self.dtypes)
                values[node.index] = [v.to(working) for v in made] if node.op == "decode" else made
        for node in work.outputs.values():
            if node.index in work.sources:  # a column that another write may be about to replace
                values[node.index] = [tensor.clone() for tensor in values[node.index]]
        for column, node in zip(writes, work.outputs.values(), strict=True):
            for place, tensor in enumerate(column.tensors):
                value = values[node.index]
                tensor.copy_(_tensor(value[place] if isinstance(value, list) else value))
        if not work.takes:
            return None
        totals = [self._take(take.reduction, values[take.node.index]) for take in work.takes]
        return torch.stack(totals, dim=1)

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

    def _scalars(self, group: Group, scalars: Scalars) -> dict[int, Any]:
        """Every number that elements are made of: one, or a list with one for each leaf."""
        nodes = [node for node in self.work.nodes if not node.element]
        found = {name: scalars.find(name, group) for name in self.work.scalars}
        words = {n.index: n for n in nodes if n.op == "word"}
        plain = [node for node in nodes if node.index not in words]
        count = len(group.indices) if any(one.each for one in found.values()) else 1
        rows = [
            evaluate(plain, {}, {name: _of_leaf(one, k) for name, one in found.items()})
            for k in range(count)
        ]
        values: dict[int, Any] = {}
        for node in plain:
            each = [_number(row[node.index]) for row in rows]
            values[node.index] = each if count > 1 or isinstance(each[0], Tensor) else each[0]
            if count == 1 and isinstance(each[0], Tensor):
                values[node.index] = each * len(group.indices)
        # Words must stay integers; `evaluate` returns floats.
        for index, node in words.items():
            values[index] = found[node.args[0]].value
        return values


def _of_leaf(one: Value, place: int) -> Any:
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
        drawn.append(uniform if node.op == "uniform" else tail)
    return drawn


def _apply(node: Node, args: list[Any], count: int, dtypes: Dtypes) -> list[Tensor]:
    """One operation on all leaves: a foreach operator if there is one, else leaf by leaf."""
    whole = bool(args) and isinstance(args[0], list) and isinstance(args[0][0], Tensor)
    whole = whole and args[0][0].dim() > 0
    if whole and node.op in _ALONE:
        return list(getattr(torch, f"_foreach_{node.op}")(args[0]))
    if whole and node.op in _BOTH and not any(value.dtype == torch.bool for value in args[0]):
        return list(getattr(torch, f"_foreach_{node.op}")(args[0], args[1]))
    function = operator_of(node, dtypes.leaf)
    # A double number would make a leaf without axes double as well.
    precision = torch.float64 if node.wide else dtypes.working
    elements = [arg.element for arg in node.inputs]
    results = []
    for place in range(count):
        own = [_tensor(arg[place] if isinstance(arg, list) else arg) for arg in args]
        own = [
            one if element else one.to(precision)
            for one, element in zip(own, elements, strict=True)
        ]
        results.append(function(*own))
    return results


def _number(value: Tensor) -> float | Tensor:
    """A number, if that needs no waiting."""
    return float(value) if value.device.type == "cpu" else value


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    # On the CPU whatever the default device is: CPU scalars combine with any tensor.
    return torch.tensor(value, dtype=torch.float64, device="cpu")
