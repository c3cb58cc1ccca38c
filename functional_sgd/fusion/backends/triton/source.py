"""Write a pass as one readable Triton kernel over a table of pointers."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch

from functional_sgd.blocks import LARGEST_CODE, OFFSET, OFFSET_BITS
from functional_sgd.fusion.arithmetic import LOGICAL, Node
from functional_sgd.fusion.backends.triton.functions import (
    BLOCK_FUNCTIONS,
    RANDOM_FUNCTIONS,
    ROUNDING_FUNCTIONS,
)
from functional_sgd.fusion.kernel import Body, Dtypes, body_of, name_of
from functional_sgd.fusion.passes import Pass
from functional_sgd.randomness import BLOCK

_HEADER = """\
import triton
import triton.language as tl
from triton.language.extra import libdevice

# {title}
"""

# Triton uses 16-byte loads only where it can prove that addresses and the end of the mask are
# multiples of 16. Hence the second version of `elements`, with `count // 16 * 16` for `count`.
# Numbers of fused_rules are not specialised, since other values would compile it again.
_FUNCTIONS = """

@triton.jit
def elements({parameters}, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    # The first `count` elements from these addresses on, one address for each column.
{bind}
    if ALIGNED:  # loads and stores of 16 bytes
{align}
{begin_takes}
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < count
{body}
{end_takes}


@triton.jit(do_not_specialize=[{whole}], do_not_specialize_on_alignment=[{tensors}])
def fused_rules(
    pointers, chunks, parts, n_leaves: tl.int64, {hypers}BLOCK: tl.constexpr
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
        {assign}elements(count // 16 * 16, {arguments}, True, BLOCK)
    else:
        {assign}elements(count, {arguments}, False, BLOCK)
{store_takes}
"""

COMBINE = """\
import triton
import triton.language as tl


@triton.jit
def combine(parts, ends, totals, take, n_takes, KIND: tl.constexpr, BLOCK: tl.constexpr):
    # The parts of one leaf's chunks, from ends[leaf - 1] to ends[leaf], in their order.
    leaf = tl.program_id(0)
    begin = tl.load(ends + leaf)
    end = tl.load(ends + leaf + 1)
    if KIND == "sum":
        nothing = 0.0
    elif KIND == "max":
        nothing = float("-inf")
    else:
        nothing = 1.0
    total = tl.full((BLOCK,), nothing, tl.float64)
    for first in range(begin, end, BLOCK):
        c = first + tl.arange(0, BLOCK)
        part = tl.load(parts + c * n_takes + take, mask=c < end, other=nothing)
        if KIND == "sum":
            total = total + part
        elif KIND == "max":
            total = tl.where((part > total) | (part != part), part, total)
        else:
            total = tl.where(part < total, part, total)
    if KIND == "sum":
        whole = tl.sum(total)
    elif KIND == "max":
        whole = tl.max(tl.where(total != total, float("inf"), total))
        whole = tl.where(tl.sum((total != total).to(tl.int32)) > 0, float("nan"), whole)
    else:
        whole = tl.min(total)
    tl.store(totals + leaf * n_takes + take, whole)
"""
"""The second kernel of a pass that takes reductions: a sum in an order that is always the same."""

_STORED = {
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
    torch.uint8: "tl.uint8",
}

_OPERATORS = {
    "add": "+", "sub": "-", "mul": "*", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">",
    "ge": ">=",
}  # fmt: skip
_LOGICAL_TEMPLATES = {"and": "{0} & {1}", "or": "{0} | {1}", "not": "{0} == 0"}
_TEMPLATES = {
    "neg": "-{0}",
    "wide": "{0}.to(tl.float64)",
    "abs": "tl.abs({0})",
    "maximum": "tl.where(({0} > {1}) | ({0} != {0}), {0}, {1})",
    "minimum": "tl.where(({0} < {1}) | ({0} != {0}), {0}, {1})",
    "sign": "({0} > 0).to({T}) - ({0} < 0).to({T})",
    "floor": "tl.floor({0})",
    "ceil": "tl.ceil({0})",
    "round": "libdevice.rint({0})",
    "isnan": "{0} != {0}",
    "isfinite": 'tl.abs({0}) < float("inf")',
    "uniform": "(threefry({0}, {1}, begin + i, {draw})[0] >> 8).to({T}) * {eps24}",
    "tail": "((threefry({0}, {1}, begin + i, {draw})[1] >> 1).to({T}) + {half}) * {eps32}",
    "short": "short_bits({0}, {1}, begin + i)",
    "multiple": "(({0}.to(tl.uint32) * {draw}) & 0xFFFF).to(tl.int32)",
    "block_scale": "block_scale({0}.to(tl.float32), inside, BLOCK)",
}
_ROUNDING = ("rounded", "neighbour")
_NARROW = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
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
_NOTHING = {"sum": "0.0", "max": 'float("-inf")', "all": "1.0"}
_MORE = {
    "sum": "{0} + {1}",
    "max": "tl.where(({1} > {0}) | ({1} != {1}), {1}, {0})",
    "all": "tl.where({1} < {0}, {1}, {0})",
}
_WHOLE = {"sum": "tl.sum({0})", "max": "largest({0})", "all": "tl.min({0})"}


def triton_source(work: Pass, dtypes: Dtypes, tensors: Collection[str]) -> str:
    """The Triton text of a pass for columns of these dtypes.

    Of the hypers, `tensors` are pointers to one value, or to one for each leaf (and say which); the
    others are numbers.
    """
    body = body_of(work)
    writer = _Writer(work, body, dtypes, tensors)
    combines = [take.reduction.combine for take in work.takes]
    takes, begin, ends, stores = [], [], [], []
    for k, combine in enumerate(combines):
        takes.append(f"take_{k}")
        begin.append(f"    take_{k} = tl.full((BLOCK,), {_NOTHING[combine]}, tl.float64)")
        ends.append(_WHOLE[combine].format(f"take_{k}"))
        place = f"parts + tl.program_id(0) * {len(combines)} + {k}"
        stores.append(f"    tl.store({place}, take_{k})")
    returned, assigned = "", ""
    if takes:
        returned = f"    return {', '.join(ends)}"
        assigned = f"{', '.join(takes)} = "
    hypers, pointers, whole = [], [], ['"n_leaves"']
    for name in body.hypers:
        if name in tensors:
            hypers.append(f"hyper_{name}, by_leaf_{name}: tl.int64, ")
            pointers.append(f'"hyper_{name}"')
            whole.append(f'"by_leaf_{name}"')
        else:
            hypers.append(f"hyper_{name}: tl.float64, ")
    places = [column.place for column in writer.columns]
    kernel = _FUNCTIONS.format(
        parameters=", ".join(["count", "begin", *places, *writer.crossing]),
        bind="\n".join(writer.bind()),
        align="\n".join(writer.align()),
        begin_takes="\n".join(begin),
        body="\n".join(writer.elements()),
        end_takes=returned,
        whole=", ".join(whole),
        tensors=", ".join(pointers),
        hypers="".join(hypers),
        scalars="\n".join(writer.scalars()),
        here="\n".join(writer.here()),
        all_here=" | ".join(places),
        assign=assigned,
        arguments=", ".join(["start", *places, *writer.crossing]),
        store_takes="\n".join(stores),
    )
    text = _HEADER.format(title=work.title)
    if work.random:
        text += RANDOM_FUNCTIONS
    if any(node.op in _ROUNDING for node in work.nodes):
        text += ROUNDING_FUNCTIONS
    if work.of_blocks:
        text += BLOCK_FUNCTIONS
    if "max" in combines:
        text += _LARGEST
    return text + kernel


# tl.max ignores NaN, unlike torch.
_LARGEST = """

@triton.jit
def largest(values):
    # The maximum, which is NaN if one of them is.
    found = tl.max(tl.where(values != values, float("inf"), values))
    return tl.where(tl.sum((values != values).to(tl.int32)) > 0, float("nan"), found)
"""


class _Column(NamedTuple):
    """A column that a pass reads or writes, where it does."""

    name: str  # in_grad, out_param
    dtype: torch.dtype
    place: str  # the variable that says where a chunk begins in it
    of_blocks: bool  # whether it has one number for each block


class _Writer:
    """Writes the lines of a pass."""

    def __init__(self, work: Pass, body: Body, dtypes: Dtypes, tensors: Collection[str]) -> None:
        self.work, self.body, self.dtypes, self.tensors = work, body, dtypes, tensors
        self.precision = _STORED[dtypes.working]
        self.columns: list[_Column] = []
        for name, dtype in zip(body.reads, dtypes.reads, strict=True):
            self._add_column("in", name, dtype)
        for name, dtype in zip(body.writes, dtypes.writes, strict=True):
            self._add_column("out", name, dtype)
        self.crossing = [name_of(node, True, is_wide) for node, is_wide in body.crossing]

    def _add_column(self, way: str, name: str, dtype: torch.dtype) -> None:
        place = f"here_{len(self.columns)}"
        self.columns.append(_Column(f"{way}_{name}", dtype, place, name in self.work.of_blocks))

    def bind(self) -> list[str]:
        """A pointer for each column."""
        lines = []
        for name, dtype, place, _ in self.columns:
            lines.append(f"    {name} = {place}.to(tl.pointer_type({_STORED[dtype]}))")
        return lines

    def align(self) -> list[str]:
        """What the compiler may take for granted of these pointers."""
        widest = max((column.dtype.itemsize for column in self.columns), default=4)
        lines = []
        for name, dtype, _, _ in self.columns:
            multiple = 16 // widest * dtype.itemsize
            lines.append(f"        {name} = tl.multiple_of({name}, {multiple})")
        return lines

    def here(self) -> list[str]:
        """Where a chunk begins in each column."""
        lines = []
        for k, (_, dtype, place, of_blocks) in enumerate(self.columns):
            begin = f"start // {BLOCK}" if of_blocks else "start"
            column = f"tl.load(pointers + {k} * n_leaves + leaf)"
            lines.append(f"    {place} = {column} + {begin} * {dtype.itemsize}")
        return lines

    def scalars(self) -> list[str]:
        lines = []
        for node in self.body.scalars:
            value = self._value(node, "tl.float64")
            lines.append(f"    {name_of(node)} = {value}")
        for node, is_wide in self.body.crossing:
            kind = "tl.float64" if is_wide else self.precision
            if node.op == "word":
                kind = "tl.uint32"
            cast = "" if node.op in LOGICAL else f".to({kind})"
            lines.append(f"    {name_of(node, True, is_wide)} = {name_of(node)}{cast}")
        return lines

    def elements(self) -> list[str]:
        lines = []
        for node in self.body.elements:
            if node.index in self.work.sources:
                column = self.work.sources[node.index]
                where = f"i // {BLOCK}" if node.block else "i"
                value = f"tl.load(in_{column} + {where}, mask=inside).to({self.precision})"
                if node.op in LOGICAL:
                    value = f"{value} != 0"
            else:
                precision = "tl.float64" if node.wide else self.precision
                value = self._value(node, precision)
            lines.append(f"        {name_of(node)} = {value}")
        for (name, node), dtype in zip(self.body.writes.items(), self.dtypes.writes, strict=True):
            value = self._argument(node, True, self.precision)
            stored = f"{value}.to({_STORED[dtype]})"
            where, mask = "i", "inside"
            if node.block:  # by the first element of each
                where, mask = f"i // {BLOCK}", f"inside & (i % {BLOCK} == 0)"
            lines.append(f"        tl.store(out_{name} + {where}, {stored}, mask={mask})")
        for place, take in enumerate(self.work.takes):
            combine = take.reduction.combine
            value = f"{self._argument(take.node, True, 'tl.float64', wide=True)}.to(tl.float64)"
            lines.append(f"        part_{place} = tl.where(inside, {value}, {_NOTHING[combine]})")
            more = _MORE[combine].format(f"take_{place}", f"part_{place}")
            lines.append(f"        take_{place} = {more}")
        return lines

    def _value(self, node: Node, precision: str) -> str:
        """What a node is, as an expression."""
        if node.op in ("scalar", "word"):
            name = node.args[0]
            if name in self.tensors:
                return f"tl.load(hyper_{name} + leaf * by_leaf_{name}).to(tl.float64)"
            return f"tl.full((), hyper_{name}, tl.float64)"
        wide = node.wide
        if node.op == "where":
            condition, yes, no = node.args
            chosen = [self._argument(arg, node.element, precision, wide) for arg in (yes, no)]
            truth = self._truth(condition, node.element, precision, wide)
            return f"tl.where({truth}, {', '.join(chosen)})"
        if node.op in _LOGICAL_TEMPLATES:
            truths = [self._truth(arg, node.element, precision, wide) for arg in node.args]
            return _LOGICAL_TEMPLATES[node.op].format(*truths)
        args = [self._argument(arg, node.element, precision, wide) for arg in node.inputs]
        if node.op in _OPERATORS:
            return f"{args[0]} {_OPERATORS[node.op]} {args[1]}"
        if node.op == "remainder":
            return _remainder(*args)
        if node.op in _ROUNDING:
            return self._rounded(node, args, precision)
        if node.op == "encoded":
            return _of_block(node, args, ("tl.float32", "tl.float32", "tl.int32"))
        if node.op == "decode":
            return f"{_of_block(node, args, ('tl.float32', 'tl.float32'))}.to({precision})"
        template = _PRECISE[precision].get(node.op) or _TEMPLATES.get(node.op)
        if template is None:
            return f"libdevice.{node.op}({', '.join(args)})"
        return template.format(
            *args,
            T=precision,
            draw=node.args[-1],
            eps24=_constant(2.0**-24, precision),
            eps32=_constant(2.0**-32, precision),
            half=_constant(0.5, precision),
        )

    def _rounded(self, node: Node, args: Sequence[str], precision: str) -> str:
        """The nearest number of a dtype, or one of two neighbours."""
        dtype = self.dtypes.leaf if node.args[-1] is None else node.args[-1]
        if dtype not in _NARROW:
            return args[0]
        given = ", ".join([f"{args[0]}.to(tl.float32)", *args[1:]])
        return f"{node.op}_{_NARROW[dtype]}({given}).to({precision})"

    def _argument(self, node: Node, element: bool, precision: str, wide: bool = False) -> str:
        """An argument as a number."""
        if node.op == "constant":
            return _constant(node.args[0], precision)
        name = name_of(node, element, wide)
        return f"{name}.to({precision})" if node.op in LOGICAL else name

    def _truth(self, node: Node, element: bool, precision: str, wide: bool = False) -> str:
        """An argument as true or false; NaN is true."""
        if node.op in LOGICAL:
            # As an argument of a function, the interpreter has made a number of it.
            crossed = element and not node.element
            name = name_of(node, element, wide)
            return f"({name} != 0)" if crossed else name
        return f"({self._argument(node, element, precision, wide)} != 0)"


def _of_block(node: Node, args: Sequence[str], kinds: Sequence[str]) -> str:
    """A call of a function on codes, with its arguments in these dtypes."""
    signed = node.args[-1]
    given = [f"{arg}.to({kind})" for arg, kind in zip(args, kinds, strict=True)]
    limits = f"{OFFSET_BITS[signed]}, {OFFSET[signed]}, {LARGEST_CODE[signed]}, {signed}"
    return f"{node.op}({', '.join(given)}, {limits})"


def _remainder(left: str, right: str) -> str:
    """fmod, moved to the sign of the divisor."""
    rest = f"libdevice.fmod({left}, {right})"
    return f"tl.where(({rest} != 0) & (({rest} < 0) != ({right} < 0)), {rest} + {right}, {rest})"


def _constant(value: float, precision: str) -> str:
    with np.errstate(over="ignore", under="ignore"):
        rounded = float(np.float32(value)) if precision == "tl.float32" else value
    text = repr(rounded) if np.isfinite(rounded) else f'float("{rounded}")'
    # A bare literal is float32 to Triton, unless an operand beside it says otherwise.
    return f"tl.full((), {text}, {precision})"
