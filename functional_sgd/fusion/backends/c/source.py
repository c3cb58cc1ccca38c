"""Write a pass as one readable C function over a table of pointers."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch

from functional_sgd.blocks import LARGEST_CODE, OFFSET_BITS, SIGN
from functional_sgd.fusion.arithmetic import LOGICAL, Node
from functional_sgd.fusion.backends.c.frames import (
    CHUNK_BY_BLOCK,
    CHUNK_BY_ELEMENT,
    COMBINE,
    KERNEL,
)
from functional_sgd.fusion.backends.c.functions import BLOCK_FUNCTIONS, FUNCTIONS, RANDOM_FUNCTIONS
from functional_sgd.fusion.kernel import Body, Dtypes, body_of, name_of
from functional_sgd.fusion.passes import Pass
from functional_sgd.randomness import BLOCK
from functional_sgd.reduction import Combine

_STORED = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "uint16_t",
    torch.float16: "_Float16",
    torch.uint8: "uint8_t",
}

_OPERATORS = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "eq": "==", "ne": "!=", "lt": "<", "le": "<=",
    "gt": ">", "ge": ">=", "and": "&&", "or": "||",
}  # fmt: skip
_TEMPLATES = {
    "neg": "-{0}",
    "not": "!{0}",
    "wide": "(double){0}",
    "where": "{0} ? {1} : {2}",
    # Asked of the second (a bound, mostly) and without a branch: two clamps in a row in the form
    # a > b || a != a keep gcc 12 from vectorising the loop, which made AdaBound five times as slow.
    "maximum": "(({1} >= {0}) | ({1} != {1})) ? {1} : {0}",
    "minimum": "(({1} <= {0}) | ({1} != {1})) ? {1} : {0}",
    "sign": "({T})(({0} > 0) - ({0} < 0))",
    "rsqrt": "1 / sqrt{f}({0})",
    "sigmoid": "1 / (1 + exp{f}(-{0}))",
    "remainder": "remainder_{T}({0}, {1})",
    "abs": "fabs{f}({0})",
    # Ties go to even, as in torch; C's own round moves them away from 0.
    "round": "rint{f}({0})",
    "isnan": "{0} != {0}",
    "isfinite": "fabs{f}({0}) <= {MAX}",
    "block_scale": "scale_of(largest_{0})",
    "multiple": "{0} * {draw}u & 0xffffu",
    "uniform": "({T})(threefry({0}, {1}, (uint64_t)(start + i), {draw}, 0) >> 8) * ({T})0x1p-24",
    "tail": "(({T})(threefry({0}, {1}, (uint64_t)(start + i), {draw}, 1) >> 1) + ({T})0.5)"
    " * ({T})0x1p-32",
}
_ROUNDED = {
    torch.bfloat16: "from_bfloat16(to_bfloat16({0}))",
    torch.float16: "(_Float16)(float){0}",
}
_NEIGHBOUR = {
    torch.bfloat16: "neighbour_bfloat16({0}, {1})",
    torch.float16: "neighbour_float16({0}, {1})",
}
_ROUNDING = {"rounded": _ROUNDED, "neighbour": _NEIGHBOUR}
_OF_BLOCKS = {
    "encoded": "encoded({0}, {1}, {2}, {limits})",
    "decode": "decoded({0}, {1}, {limits})",
}
_FIRST = {"sum": "0", "max": "-INFINITY", "all": "1"}
# A maximum must hand NaN on: the second test takes it, and no number is greater than it.
_MORE = {
    "sum": "{0} += {1};",
    "max": "{0} = ({1} > {0} || {1} != {1}) ? {1} : {0};",
    "all": "{0} = {1} < {0} ? {1} : {0};",
}
_LIMIT = {"float": "3.4028234663852886e38f", "double": "1.7976931348623157e308"}


def c_source(work: Pass, dtypes: Dtypes) -> str:
    """The C text of a pass for columns of these dtypes."""
    body = body_of(work)
    writer = _Writer(work, body, dtypes)
    combines = [take.reduction.combine for take in work.takes]
    kernel = KERNEL.format(
        title=work.title,
        n_hypers=len(body.hypers),
        n_scalars=len(body.crossing),
        stride=max(len(body.crossing), 1),
        n_columns=len(body.reads) + len(body.writes),
        n_takes=len(combines),
        prepare="\n".join(writer.prepare()),
        chunk=_chunk(work, writer, combines),
        combine=_combination(combines),
    )
    text = FUNCTIONS
    if work.random:
        text += RANDOM_FUNCTIONS
    if work.of_blocks:
        text += BLOCK_FUNCTIONS
    return text + kernel


def _chunk(work: Pass, writer: "_Writer", combines: Sequence[Combine]) -> str:
    """The function that does a chunk of a leaf: element by element, or block by block."""
    begin = []
    for k, combine in enumerate(combines):
        begin.append(f"    double take_{k} = {_FIRST[combine]};")
    common = dict(
        scalars="\n".join(writer.scalars()),
        bind="\n".join(writer.bind()),
        begin_takes="\n".join(begin),
    )
    pragma = _pragma(combines)
    if not work.blocked:
        ends = [f"    part[{k}] = take_{k};" for k in range(len(combines))]
        body = "\n".join(writer.elements())
        return CHUNK_BY_ELEMENT.format(
            **common, pragma=pragma, body=body, end_takes="\n".join(ends)
        )
    first, ends = [], []
    for k, combine in enumerate(combines):
        first.append(f"part[{k}] = {_FIRST[combine]};")
        # Each block adds to what those before it have left in the chunk's part.
        ends.append(f"    {_MORE[combine].format(f'part[{k}]', f'take_{k}')}")
    return CHUNK_BY_BLOCK.format(
        **common,
        body="\n".join(writer.blocks(pragma)),
        end_takes="\n".join(ends),
        first=" ".join(first),
        block=BLOCK,
    )


def _pragma(combines: Sequence[Combine]) -> str:
    """The line before a loop over elements that lets it be vectorised, with what it reduces."""
    # A maximum must hand NaN on, which no `reduction` clause does; it goes without.
    if "max" in combines:
        return ""
    pragma = "    #pragma omp simd"
    for k, combine in enumerate(combines):
        operator = "+" if combine == "sum" else "min"
        pragma += f" reduction({operator}:take_{k})"
    return pragma


def _combination(combines: Sequence[Combine]) -> str:
    """The loops that make totals of the parts of all chunks."""
    if not combines:
        return ""
    first, more = [], []
    for k, combine in enumerate(combines):
        first.append(f"totals[l * {len(combines)} + {k}] = {_FIRST[combine]};")
        more.append(_MORE[combine].format(f"total[{k}]", f"part[{k}]"))
    return COMBINE.format(n_takes=len(combines), first=" ".join(first), more=" ".join(more))


class _Written(NamedTuple):
    """A column that a pass writes."""

    name: str
    node: Node
    dtype: torch.dtype


class _Phase(NamedTuple):
    """What one loop over a block does."""

    number: int
    elements: list[Node]  # loaded or computed in it
    written: list[_Written]
    takes: list[int]
    scales: list[Node]  # those of the block that are known after it


class _Writer:
    """Writes the lines of a pass."""

    def __init__(self, work: Pass, body: Body, dtypes: Dtypes) -> None:
        self.work, self.body, self.dtypes = work, body, dtypes
        self.precision = "float" if dtypes.working == torch.float32 else "double"
        self.written: list[_Written] = []
        for (name, node), dtype in zip(body.writes.items(), dtypes.writes, strict=True):
            self.written.append(_Written(name, node, dtype))

    def prepare(self) -> list[str]:
        lines = []
        for node in self.body.scalars:
            note = f"  /* {node.args[0]} */" if node.op in ("scalar", "word") else ""
            value = self._expression(node, "double")
            lines.append(f"    const double {name_of(node)} = {value};{note}")
        for place, (node, _) in enumerate(self.body.crossing):
            lines.append(f"    s[{place}] = {name_of(node)};")
        return lines

    def scalars(self) -> list[str]:
        lines = []
        for place, (node, is_wide) in enumerate(self.body.crossing):
            kind = "double" if is_wide else self._type(node)
            lines.append(f"    const {kind} {name_of(node, True, is_wide)} = ({kind})s[{place}];")
        return lines

    def bind(self) -> list[str]:
        """A pointer for each column, to where the chunk or block begins in it."""
        lines: list[str] = []
        for name, dtype in zip(self.body.reads, self.dtypes.reads, strict=True):
            lines.append(self._pointer(len(lines), f"const {_STORED[dtype]} *", "in", name))
        for name, _, dtype in self.written:
            lines.append(self._pointer(len(lines), f"{_STORED[dtype]} *", "out", name))
        return lines

    def _pointer(self, place: int, kind: str, way: str, name: str) -> str:
        start = f"start / {BLOCK}" if name in self.work.of_blocks else "start"
        return f"    {kind}{way}_{name} = ({kind})pointers[{place}] + {start};"

    def elements(self) -> list[str]:
        """All that is done with an element."""
        takes = range(len(self.work.takes))
        return [
            *map(self._element, self.body.elements),
            *map(self._store, self.written),
            *map(self._take, takes),
        ]

    def blocks(self, pragma: str) -> list[str]:
        """All that is done with a block: a loop for each phase, and what is between them."""
        lines = []
        kept = set()  # the elements, by their index, that wait in an array for a later loop
        for node in self.body.elements:
            if node.op == "short":
                words = ", ".join(name_of(word, True) for word in node.inputs)
                lines.append(f"    uint16_t {name_of(node)}_[{BLOCK}];")
                lines.append(f"    short_block({words}, start / {BLOCK}, {name_of(node)}_);")
            elif node.block and node.index in self.work.sources:
                scales = f"in_{self.work.sources[node.index]}"
                lines.append(f"    const float {name_of(node)} = {scales}[0];")
            elif not node.block and self._is_needed_later(node):
                kept.add(node.index)
                lines.append(f"    {self._type(node)} {name_of(node)}_[{BLOCK}];")
        for number in range(max(self.body.phases.values()) + 1):
            lines += self._loop(self._phase(number), kept, pragma)
        for name, node, _ in self.written:
            if node.block:
                lines.append(f"    out_{name}[0] = {name_of(node)};")
        return lines

    def _is_needed_later(self, node: Node) -> bool:
        """Whether an element is needed in a later loop than its own."""
        phases = self.body.phases
        for other in self.body.elements:
            # A scale is made of the largest of a block, which its loop has found.
            if other.index in self.work.sources or other.op == "block_scale":
                continue
            # Not `node in inputs`: comparing nodes with == makes another node.
            reads_it = any(one is node for one in other.inputs)
            if reads_it and phases[other.index] > phases[node.index]:
                return True
        return False

    def _phase(self, number: int) -> _Phase:
        """What the loop with this number does, the first being 0."""
        phases = self.body.phases
        phase = _Phase(number, [], [], [], [])
        for node in self.body.elements:
            if phases[node.index] == number and not node.block and node.op != "short":
                phase.elements.append(node)
            computed = node.op == "block_scale" and node.index not in self.work.sources
            if computed and phases[node.index] == number + 1:
                phase.scales.append(node)
        # What is made of numbers alone has no phase: it goes into the first loop.
        for column in self.written:
            if not column.node.block and phases.get(column.node.index, 0) == number:
                phase.written.append(column)
        for place, take in enumerate(self.work.takes):
            if phases.get(take.node.index, 0) == number:
                phase.takes.append(place)
        return phase

    def _loop(self, phase: _Phase, kept: Collection[int], pragma: str) -> list[str]:
        """One loop over a block, and what is known after it."""
        inner = []
        for node in self._needed(phase):
            made_before = node.index in kept and self.body.phases[node.index] < phase.number
            if made_before or node.op == "short":
                name = name_of(node)
                inner.append(f"        const {self._type(node)} {name} = {name}_[i];")
        inner += map(self._element, phase.elements)
        for node in phase.elements:
            if node.index in kept:
                inner.append(f"        {name_of(node)}_[i] = {name_of(node)};")
        inner += map(self._store, phase.written)
        inner += map(self._take, phase.takes)
        before, after = [], []
        for node in phase.scales:
            of = name_of(node.inputs[0])
            largest, value = f"largest_{of}", f"magnitude_of({of})"
            before.append(f"    uint32_t {largest} = 0;")
            # Compared as integers: without a sign, bits are ordered as their numbers are, and those
            # of infinity and NaN are the largest.
            inner.append(f"        {largest} = {value} > {largest} ? {value} : {largest};")
            after.append(f"    const float {name_of(node)} = {self._expression(node, 'float')};")
            if pragma:
                pragma += f" reduction(max:{largest})"
        if not inner:
            return []
        if pragma:
            before.append(pragma)
        return [*before, "    for (int64_t i = 0; i < count; ++i) {", *inner, "    }", *after]

    def _needed(self, phase: _Phase) -> list[Node]:
        """What the loop of a phase reads, in the order in which it was made."""
        needed = [column.node for column in phase.written]
        needed += [self.work.takes[place].node for place in phase.takes]
        needed += [node.inputs[0] for node in phase.scales]
        for node in phase.elements:
            if node.index not in self.work.sources:  # else it is loaded from memory
                needed += node.inputs
        by_index = {node.index: node for node in needed}
        return [by_index[index] for index in sorted(by_index)]

    def _element(self, node: Node) -> str:
        if node.index in self.work.sources:
            value = self._load(node)
        else:
            precision = "double" if node.wide else self.precision
            value = self._expression(node, precision)
        return f"        const {self._type(node)} {name_of(node)} = {value};"

    def _store(self, column: _Written) -> str:
        name, node, dtype = column
        value = self._argument(node, self.precision, element=True)
        if dtype == torch.bfloat16:
            # Already rounded to bfloat16: the lower half is zero and can be cut off.
            exact = node.op in _ROUNDING and (node.args[-1] or self.dtypes.leaf) == dtype
            function = "high_half" if exact else "to_bfloat16"
            value = f"{function}({value})"
        return f"        out_{name}[i] = {value};"

    def _take(self, place: int) -> str:
        take = self.work.takes[place]
        value = self._argument(take.node, "double", element=True)
        return f"        {_MORE[take.reduction.combine].format(f'take_{place}', value)}"

    def _type(self, node: Node) -> str:
        if node.op in LOGICAL:
            return "int"
        are_codes = node.index in self.work.sources and self._stored(node) == torch.uint8
        if are_codes or node.op in ("word", "short", "multiple", "encoded"):
            return "uint32_t"
        return "double" if node.wide else self.precision

    def _stored(self, node: Node) -> torch.dtype:
        """The dtype of the column in which a node is in memory."""
        return self.dtypes.reads[self.body.reads.index(self.work.sources[node.index])]

    def _load(self, node: Node) -> str:
        value = f"in_{self.work.sources[node.index]}[i]"
        if self._stored(node) == torch.bfloat16:
            return f"from_bfloat16({value})"
        return value

    def _argument(self, node: Node, precision: str, element: bool, wide: bool = False) -> str:
        if node.op == "constant":
            return _constant(node.args[0], precision)
        return name_of(node, element, wide)

    def _expression(self, node: Node, precision: str) -> str:
        if node.op in ("scalar", "word"):
            return f"hyper[{self.body.hypers.index(node.args[0])}]"
        args = [self._argument(arg, precision, node.element, node.wide) for arg in node.inputs]
        if node.op == "div" and all(arg.op in LOGICAL for arg in node.inputs):
            # Truth values are ints here, and C cuts the quotient of two ints.
            args[0] = f"({precision}){args[0]}"
        if node.op in _OPERATORS:
            return f"{args[0]} {_OPERATORS[node.op]} {args[1]}"
        if node.op in _ROUNDING:
            dtype = self.dtypes.leaf if node.args[-1] is None else node.args[-1]
            return _ROUNDING[node.op].get(dtype, "{0}").format(*args)
        if node.op in _OF_BLOCKS:
            limits = _limits(node.args[-1])
            return _OF_BLOCKS[node.op].format(*args, limits=limits)
        suffix = "f" if precision == "float" else ""
        if node.op in _TEMPLATES:
            return _TEMPLATES[node.op].format(
                *args, f=suffix, T=precision, MAX=_LIMIT[precision], draw=node.args[-1]
            )
        return f"{node.op}{suffix}({', '.join(args)})"


def _limits(signed: bool) -> str:
    """What is different about codes with a sign."""
    sign = SIGN if signed else 0
    return f"{OFFSET_BITS[signed]:#x}u, {LARGEST_CODE[signed]:#x}u, {sign:#x}u"


def _constant(value: float, precision: str) -> str:
    if value != value:
        return "NAN"
    if value in (float("inf"), float("-inf")):
        return "INFINITY" if value > 0 else "(-INFINITY)"
    # repr has all digits of the double, so the cast is the only rounding.
    return f"({precision}){value!r}"
