"""Check a traced rule against the rule itself, on a few numbers.

A rule that looks at types or shapes may do something else on symbols than on tensors.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from functional_sgd.blocks import block_scale, decode, encoded
from functional_sgd.fusion.arithmetic import Graph, Node, NotPointwise
from functional_sgd.fusion.symbol_key import SymbolKey
from functional_sgd.randomness import TrialKey, multiple
from functional_sgd.ranges import Range
from functional_sgd.rounding import neighbour, rounded
from functional_sgd.signature import DTYPE, REQUIRED, STEP
from functional_sgd.wiring import Call

_NAMES = {"and": "logical_and", "or": "logical_or", "not": "logical_not"}

_DRAWS = {"uniform": 0.75, "tail": 0.25, "short": 0x4000, "multiple": 0x4000}
"""What a TrialKey draws."""

_ROUNDING = {"rounded": rounded, "neighbour": neighbour}

_OF_BLOCKS = {"encoded": encoded, "decode": decode}

# A narrow dtype: rounding to any other changes nothing, and would test nothing.
_TRIED = torch.bfloat16
"""In what a leaf is kept, where rules are checked."""


def check(call: Call, numbers: Container[str] = ()) -> None:
    """Raise NotPointwise if a rule, run on symbols, is not the arithmetic that it is on tensors.

    What it reads of the `numbers` of the tree are tensors always; hypers may be more.
    """
    graph = Graph()
    columns = _trial_columns(call)
    symbols: dict[str, object] = {}
    values: dict[str, object] = {}
    for inner, name in call.scalars:
        symbols[name] = graph.scalar(name)
        values[name] = _trial_value(call, inner)
    for place, reduced in enumerate(call.reductions):
        symbols[reduced.name] = graph.scalar(reduced.name)
        values[reduced.name] = torch.tensor(0.7 + place, dtype=torch.float64, device="cpu")
    if call.rule.signature.random:
        # A TrialKey draws constants, so one word can stand for all.
        word = graph.word("0")
        symbols[call.key] = SymbolKey((word, word), (word, word), call.position)
        values[call.key] = TrialKey()
    symbols[DTYPE], values[DTYPE] = None, _TRIED
    of_blocks = call.rule.blocks.values()
    nodes = {name: graph.column(name, block=name in of_blocks) for name in columns}
    written = graph.run(call, nodes, symbols)
    needed = graph.needed(written.values())

    def differs(own: Mapping[str, object]) -> bool:
        found = evaluate(needed, columns, own)
        with torch.no_grad():
            copies = {name: column.clone() for name, column in columns.items()}
            results = call.run(copies, own)
        return any(_differ(found[written[name].index], result) for name, result in results.items())

    if differs(values):
        raise NotPointwise(
            "on symbols it does something else than on tensors (does it look at types, or make a "
            "tensor of Python numbers alone, which has the default dtype?)"
        )
    for others in _other_kinds(call, numbers):
        try:
            found = differs({**values, **others})
        except Exception:  # whatever a rule raises for a number of this kind
            continue  # without a result there is nothing to compare
        if found:
            names = ", ".join(map(repr, others))
            raise NotPointwise(f"it looks at the type of {names}: int, float or 0-d tensor")


def _differ(got: Tensor, result: object) -> bool:
    """Whether what symbols have become is not the result of a rule."""
    if isinstance(result, Tensor):
        wanted = result
    else:
        wanted = torch.tensor(result, dtype=torch.float64, device="cpu")
    if wanted.is_complex():  # a root of a Python number, of which that of a tensor is NaN
        return False
    got = got.double().broadcast_to(wanted.shape)
    # Not bit for bit: the graph spells out lerp and addcdiv, which may round differently.
    return not torch.allclose(got, wanted.double(), rtol=1e-9, atol=1e-12, equal_nan=True)


def _other_kinds(call: Call, of_tree: Container[str]) -> Iterator[dict[str, object]]:
    """Hypers as all that an executor may hand to a rule, to be tried in the place of others."""
    numbers: dict[str, float] = {}
    for inner, name in call.scalars:
        default = call.rule.scalars.get(inner)
        is_number = isinstance(default, (int, float)) and not isinstance(default, bool)
        is_hyper = inner != STEP and name not in of_tree
        if is_hyper and (is_number or default is REQUIRED):
            numbers[name] = float(_trial_value(call, inner))
            # Each alone: what is whole may be an odd value, and odd ones together hide more.
            whole = _whole(numbers[name], call.rule.signature.ranges.get(inner))
            if whole is not None:
                yield {name: whole}
    if numbers:
        yield dict(numbers)
        tensors: dict[str, object] = {}
        for name, number in numbers.items():
            tensors[name] = torch.tensor(number, dtype=torch.float64, device="cpu")
        yield tensors


def _whole(number: float, allowed: Range | None) -> int | None:
    """A whole number that a hyper may be, if possible its own."""
    if number.is_integer():
        return int(number)
    return next((one for one in (2, 1, 0) if allowed is None or one in allowed), None)


def evaluate(
    nodes: Iterable[Node],
    columns: Mapping[str, Tensor],
    scalars: Mapping[str, object],
    known: Mapping[int, Tensor] | None = None,
) -> dict[int, Tensor]:
    """The values of nodes, by their index, computed with torch. `known` values, such as those of
    nodes that a pass reads from memory, are taken as they are.
    """
    values: dict[int, Tensor] = dict(known or {})
    for node in nodes:
        if node.index in values:
            continue
        if node.op == "column":
            values[node.index] = columns[node.args[0]]
        elif node.op in ("scalar", "constant"):
            value = scalars[node.args[0]] if node.op == "scalar" else node.args[0]
            if isinstance(value, Tensor):
                values[node.index] = value.double()
            else:
                values[node.index] = torch.tensor(value, dtype=torch.float64, device="cpu")
        elif node.op == "wide":
            values[node.index] = values[node.args[0].index].double()
        elif node.op in _DRAWS:
            kind = torch.int32 if node.op in ("short", "multiple") else torch.float64
            values[node.index] = torch.tensor(_DRAWS[node.op], dtype=kind, device="cpu")
        elif node.op != "word":
            inputs = [values[arg.index] for arg in node.inputs]
            values[node.index] = operator_of(node)(*inputs)
    return values


def operator_of(node: Node, leaf: torch.dtype = _TRIED) -> Callable[..., Tensor]:
    """The torch function of an operation, for leaves that are kept in this dtype."""
    if node.op in _ROUNDING:
        dtype = leaf if node.args[-1] is None else node.args[-1]
        return lambda *args: _ROUNDING[node.op](*args, dtype)
    if node.op == "block_scale":
        return block_scale
    if node.op == "multiple":
        return lambda short: multiple(short, node.args[-1])
    if node.op in _OF_BLOCKS:
        function_of, signed = _OF_BLOCKS[node.op], node.args[-1]
        wide = torch.float64 if node.op == "decode" else torch.uint8
        return lambda *args: function_of(*args, signed).to(wide)
    if node.op == "where":
        return lambda condition, yes, no: torch.where(condition != 0, yes, no)
    function: Callable[..., Tensor] = getattr(torch, _NAMES.get(node.op, node.op))
    return function


def _trial_columns(call: Call) -> dict[str, Tensor]:
    """The columns that a rule is tried on."""
    # Both signs, no zero among them, no two alike: a rule that mixes up columns is found out.
    values = torch.linspace(-1.3, 1.7, 7, dtype=torch.float64, device="cpu")
    names = sorted({outer for _, outer in call.reads})
    columns = {name: values.roll(place) * (1 + place) for place, name in enumerate(names)}
    for codes, scales in call.rule.blocks.items():
        columns[codes] = torch.arange(7, dtype=torch.uint8, device="cpu") * 20
        columns[scales] = torch.full((1,), 0.5, device="cpu")
    return columns


def _trial_value(call: Call, inner: str) -> float | Tensor:
    default = call.rule.scalars.get(inner)
    if isinstance(default, (int, float)):
        return default
    value = 3.0 if inner == "step" else 0.3
    return torch.tensor(value, dtype=torch.float64, device="cpu")
