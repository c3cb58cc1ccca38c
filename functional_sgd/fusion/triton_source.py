"""Write a graph of pointwise arithmetic as one readable Triton kernel over a table of pointers."""

from collections.abc import Collection, Mapping

import numpy as np
import torch

from functional_sgd.fusion.arithmetic import LOGICAL, Graph, Node
from functional_sgd.fusion.source import Kernel, name_of, parts_of

_HEADER = """\
import triton
import triton.language as tl
from triton.language.extra import libdevice

# {title}
"""

_FUNCTIONS = """

@triton.jit
def elements({parameters}, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    # The first `count` elements from these addresses on, one address for each column.
{bind}
    if ALIGNED:  # loads and stores of 16 bytes
{align}
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < count
{body}


@triton.jit(do_not_specialize=[{whole}], do_not_specialize_on_alignment=[{tensors}])
def fused_rules(
    pointers, chunks, n_leaves: tl.int64, {hypers}BLOCK: tl.constexpr
):
    # Each program treats one chunk: `count` elements of a leaf, from `start` on.
    # Column k of leaf l is at pointers[l + k * n_leaves].
    chunk = chunks + tl.program_id(0)
    leaf = tl.load(chunk)
    start = tl.load(chunk + tl.num_programs(0))
    count = tl.load(chunk + 2 * tl.num_programs(0)).to(tl.int32)
    # The scalars of one step.
{scalars}
    # Where this chunk begins in each column.
{here}
    aligned = ({all_here}) % 16 == 0
    if aligned & (count % 16 == 0):
        elements(count // 16 * 16, {arguments}, True, BLOCK)
    else:
        elements(count, {arguments}, False, BLOCK)
"""

_STORED = {
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
}

_OPERATORS = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
}
_LOGICAL_TEMPLATES = {"and": "{0} & {1}", "or": "{0} | {1}", "not": "{0} == 0"}
_TEMPLATES = {
    "neg": "-{0}",
    "abs": "tl.abs({0})",
    "maximum": "tl.where(({0} > {1}) | ({0} != {0}), {0}, {1})",
    "minimum": "tl.where(({0} < {1}) | ({0} != {0}), {0}, {1})",
    "sign": "({0} > 0).to({T}) - ({0} < 0).to({T})",
    "floor": "tl.floor({0})",
    "ceil": "tl.ceil({0})",
    "round": "libdevice.rint({0})",
    "isnan": "{0} != {0}",
    "isfinite": 'tl.abs({0}) < float("inf")',
}
_PRECISE = {  # what Triton approximates in single precision unless it is told not to
    "tl.float32": {
        "div": "tl.div_rn({0}, {1})",
        "sqrt": "tl.sqrt_rn({0})",
        "rsqrt": "tl.div_rn(1.0, tl.sqrt_rn({0}))",
        "sigmoid": "tl.div_rn(1.0, 1 + libdevice.exp(-{0}))",
    },
    "tl.float64": {
        "div": "{0} / {1}",
        "sqrt": "tl.sqrt({0})",
        "rsqrt": "1 / tl.sqrt({0})",
        "sigmoid": "1 / (1 + libdevice.exp(-{0}))",
    },
}


def emit_triton(
    graph: Graph,
    outputs: Mapping[str, Node],
    dtypes: Mapping[str, torch.dtype],
    results: Mapping[str, torch.dtype],
    working: torch.dtype,
    title: str,
    tensors: Collection[str],
) -> Kernel:
    """The kernel that computes these columns, and runs on a GPU.

    `dtypes` are those of the columns read, `results` those of the columns written, `working` that
    of the arithmetic. Of the hypers, `tensors` are pointers to one value, or to one for each leaf
    (and say which); the others are numbers.
    """
    parts = parts_of(graph, outputs)
    names = [*(f"in_{name}" for name in parts.inputs), *(f"out_{name}" for name in outputs)]
    kept = [*(dtypes[name] for name in parts.inputs), *(results[name] for name in outputs)]
    widest = max((dtype.itemsize for dtype in kept), default=4)
    crossing = [name_of(node, element=True) for node in parts.crossing]
    here = [f"here_{k}" for k in range(len(names))]
    pointers = [name for name in parts.hypers if name in tensors]
    precision = _STORED[working]

    bind = [
        f"    {name} = {place}.to(tl.pointer_type({_STORED[dtype]}))"
        for name, place, dtype in zip(names, here, kept, strict=True)
    ]
    align = [
        f"        {name} = tl.multiple_of({name}, {16 // widest * dtype.itemsize})"
        for name, dtype in zip(names, kept, strict=True)
    ]
    body = [f"        {name_of(node)} = {_value(node, precision, ())}" for node in parts.elements]
    body += [
        f"        tl.store(out_{name} + i, {_argument(node, True, precision)}.to({stored}), "
        f"mask=inside)"
        for name, node, stored in (
            (name, node, _STORED[results[name]]) for name, node in outputs.items()
        )
    ]
    scalars = [
        f"    {name_of(node)} = {_value(node, 'tl.float64', tensors)}" for node in parts.scalars
    ]
    scalars += [
        f"    {name} = {name_of(node)}{'' if node.op in LOGICAL else f'.to({precision})'}"
        for name, node in zip(crossing, parts.crossing, strict=True)
    ]
    places = [
        f"    {place} = tl.load(pointers + {k} * n_leaves + leaf) + start * {dtype.itemsize}"
        for k, (place, dtype) in enumerate(zip(here, kept, strict=True))
    ]
    hypers = [
        f"hyper_{name}, by_leaf_{name}: tl.int64, "
        if name in tensors
        else f"hyper_{name}: tl.float64, "
        for name in parts.hypers
    ]
    text = _HEADER.format(title=title) + _FUNCTIONS.format(
        parameters=", ".join(["count", *here, *crossing]), bind="\n".join(bind), align="\n".join(align),
        body="\n".join(body), whole=", ".join(['"n_leaves"', *(f'"by_leaf_{name}"' for name in pointers)]),
        tensors=", ".join(f'"hyper_{name}"' for name in pointers), hypers="".join(hypers),
        scalars="\n".join(scalars), here="\n".join(places), all_here=" | ".join(here),
        arguments=", ".join([*here, *crossing]),
    )  # fmt: skip
    return Kernel(text, parts.inputs, tuple(outputs), parts.hypers, len(crossing))


def _value(node: Node, precision: str, tensors: Collection[str]) -> str:
    """What a node is, as an expression."""
    if node.op == "column":
        return f"tl.load(in_{node.args[0]} + i, mask=inside).to({precision})"
    if node.op == "scalar":
        name = node.args[0]
        loaded = f"tl.load(hyper_{name} + leaf * by_leaf_{name}).to(tl.float64)"
        return loaded if name in tensors else f"tl.full((), hyper_{name}, tl.float64)"
    if node.op == "where":
        condition, yes, no = node.args
        chosen = [_argument(arg, node.element, precision) for arg in (yes, no)]
        return f"tl.where({_truth(condition, node.element, precision)}, {', '.join(chosen)})"
    if node.op in _LOGICAL_TEMPLATES:
        return _LOGICAL_TEMPLATES[node.op].format(
            *(_truth(arg, node.element, precision) for arg in node.args)
        )
    args = [_argument(arg, node.element, precision) for arg in node.args]
    if node.op in _OPERATORS:
        return f"{args[0]} {_OPERATORS[node.op]} {args[1]}"
    if node.op == "remainder":
        return _remainder(*args)
    template = _PRECISE[precision].get(node.op) or _TEMPLATES.get(node.op)
    return (
        template.format(*args, T=precision)
        if template
        else f"libdevice.{node.op}({', '.join(args)})"
    )


def _remainder(left: str, right: str) -> str:
    """fmod, moved to the sign of the divisor."""
    rest = f"libdevice.fmod({left}, {right})"
    return f"tl.where(({rest} != 0) & (({rest} < 0) != ({right} < 0)), {rest} + {right}, {rest})"


def _argument(node: Node, element: bool, precision: str) -> str:
    """An argument as a number."""
    if node.op == "constant":
        return _constant(node.args[0], precision)
    name = name_of(node, element)
    return f"{name}.to({precision})" if node.op in LOGICAL else name


def _truth(node: Node, element: bool, precision: str) -> str:
    """An argument as true or false; NaN is true."""
    if node.op in LOGICAL:
        return name_of(node, element)
    return f"({_argument(node, element, precision)} != 0)"


def _constant(value: float, precision: str) -> str:
    with np.errstate(over="ignore", under="ignore"):
        rounded = float(np.float32(value)) if precision == "tl.float32" else value
    plain = np.isfinite(rounded)
    return (
        f"tl.full((), {rounded!r}, {precision})"
        if plain
        else f'tl.full((), float("{rounded}"), {precision})'
    )
