"""Write a pass as one readable C function over a table of pointers."""

from collections.abc import Mapping

import torch

from functional_sgd.blocks import LARGEST_CODE, OFFSET_BITS, SIGN
from functional_sgd.fusion.arithmetic import LOGICAL, Node
from functional_sgd.fusion.backends.c.functions import BLOCK_FUNCTIONS, FUNCTIONS, RANDOM_FUNCTIONS
from functional_sgd.fusion.kernel import Body, Dtypes, body_of, name_of
from functional_sgd.fusion.passes import Pass
from functional_sgd.randomness import BLOCK

_CHUNK = """\
/* Elements [start, start + count) of one leaf; `part` is what they add to each reduction. */
static void chunk(char *const *pointers, int64_t start, int64_t count, const double *restrict s,
                  double *restrict part) {{
{scalars}
{bind}
{begin_takes}
{pragma}
    for (int64_t i = 0; i < count; ++i) {{
{body}
    }}
{end_takes}
}}"""

# Whole blocks pass a constant count to an inlined `block`, so that the compiler knows the length
# of its loops.
_IN_BLOCKS = """\
/* A block: elements [start, start + count) of one leaf, at most {block}. What all have in common is
   known after a loop over them; what later loops need of earlier ones is kept meanwhile. */
static inline __attribute__((always_inline)) void block(
    char *const *pointers, int64_t start, const int64_t count, const double *restrict s,
    double *restrict part) {{
{scalars}
{bind}
{begin_takes}
{body}
{end_takes}
}}

/* Elements [start, start + count) of one leaf; `part` is what they add to each reduction. */
static void chunk(char *const *pointers, int64_t start, int64_t count, const double *restrict s,
                  double *restrict part) {{
    {first}
    int64_t done = 0;
    for (; done + {block} <= count; done += {block})
        block(pointers, start + done, {block}, s, part);
    if (done < count) block(pointers, start + done, count - done, s, part);
}}"""

_FUNCTION = """\

/* {title} */

/* The scalars of one step: hyper[0..{n_hypers}) -> s[0..{n_scalars}). */
static void prepare(const double *restrict hyper, double *restrict s) {{
{prepare}
}}

{chunk}

/* All leaves, in chunks: chunk c is part of leaf[c], whose scalars come from row[leaf[c]] of the
   hypers. Column k of leaf l is at pointers[l + k * n_leaves]. Each chunk has a place of its own
   for its part of the reductions, so that the order of additions does not depend on threads. */
void run(int64_t n_leaves, char *const *pointers, int64_t n_rows, const double *hypers,
         const int32_t *row, int64_t n_chunks, const int32_t *leaf, const int64_t *start,
         const int64_t *count, double *scratch, double *parts, double *totals, int threads) {{
    for (int64_t r = 0; r < n_rows; ++r)
        prepare(hypers + r * {n_hypers}, scratch + r * {stride});
    int64_t grain = n_chunks / (8 * threads) + 1;
    #pragma omp parallel for schedule(dynamic, grain) num_threads(threads) \\
        if (n_chunks > 1 && threads > 1)
    for (int64_t c = 0; c < n_chunks; ++c) {{
        int64_t l = leaf[c];
        char *here[{n_columns} + 1];
        for (int k = 0; k < {n_columns}; ++k) here[k] = pointers[l + k * n_leaves];
        chunk(here, start[c], count[c], scratch + row[l] * {stride}, parts + c * {n_takes});
    }}
{combine}
}}
"""

_COMBINE = """\
    for (int64_t l = 0; l < n_leaves; ++l) {{ {first} }}
    for (int64_t c = 0; c < n_chunks; ++c) {{
        double *total = totals + leaf[c] * {n_takes}, *part = parts + c * {n_takes};
        {more}
    }}"""

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
    precision = "float" if dtypes.working == torch.float32 else "double"
    writer = _Writer(work, body, dtypes, precision)
    combines = [take.reduction.combine for take in work.takes]
    sums = [f"take_{k}" for k, combine in enumerate(combines) if combine != "max"]
    # A maximum must hand NaN on, which no `reduction` clause does; it goes without.
    simd = "    #pragma omp simd" if "max" not in combines else ""
    if simd and sums:
        kinds = zip(sums, combines, strict=True)
        simd += "".join(f" reduction({'+' if c == 'sum' else 'min'}:{name})" for name, c in kinds)
    n_takes = len(combines)
    places = range(n_takes)
    begin = "\n".join(f"    double take_{k} = {_FIRST[combines[k]]};" for k in places)
    common = dict(
        scalars="\n".join(writer.scalars()), bind="\n".join(writer.bind()), begin_takes=begin
    )
    if work.blocked:
        ends = [_MORE[c].format(f"part[{k}]", f"take_{k}") for k, c in enumerate(combines)]
        chunk = _IN_BLOCKS.format(
            **common,
            body="\n".join(writer.blocks(simd)),
            end_takes="\n".join(f"    {line}" for line in ends),
            first=" ".join(f"part[{k}] = {_FIRST[combines[k]]};" for k in places),
            block=BLOCK,
        )
    else:
        chunk = _CHUNK.format(
            **common,
            pragma=simd,
            body="\n".join(writer.elements()),
            end_takes="\n".join(f"    part[{k}] = take_{k};" for k in places),
        )
    text = _FUNCTION.format(
        title=work.title,
        n_hypers=len(body.hypers),
        n_scalars=len(body.crossing),
        stride=max(len(body.crossing), 1),
        n_columns=len(body.reads) + len(body.writes),
        n_takes=n_takes,
        prepare="\n".join(writer.prepare()),
        chunk=chunk,
        combine="" if not n_takes else _COMBINE.format(
            n_takes=n_takes,
            first=" ".join(f"totals[l * {n_takes} + {k}] = {_FIRST[combines[k]]};" for k in places),
            more=" ".join(_MORE[combines[k]].format(f"total[{k}]", f"part[{k}]") for k in places),
        ),
    )  # fmt: skip
    helpers = RANDOM_FUNCTIONS if work.random else ""
    helpers += BLOCK_FUNCTIONS if work.of_blocks else ""
    return FUNCTIONS + helpers + text


class _Writer:
    """Writes the lines of a pass."""

    def __init__(self, work: Pass, body: Body, dtypes: Dtypes, precision: str) -> None:
        self.work, self.body, self.dtypes, self.precision = work, body, dtypes, precision

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
        lines = []
        read = zip(self.body.reads, self.dtypes.reads, strict=True)
        written = zip(self.body.writes, self.dtypes.writes, strict=True)
        columns = [("const ", "in", *one) for one in read] + [("", "out", *one) for one in written]
        for place, (const, way, name, dtype) in enumerate(columns):
            kind = f"{const}{_STORED[dtype]} *"
            start = f"start / {BLOCK}" if name in self.work.of_blocks else "start"
            lines.append(f"    {kind}{way}_{name} = ({kind})pointers[{place}] + {start};")
        return lines

    def elements(self) -> list[str]:
        """All that is done with an element."""
        lines = [self._element(node) for node in self.body.elements]
        written = zip(self.body.writes.items(), self.dtypes.writes, strict=True)
        lines += [self._store(name, node, dtype) for (name, node), dtype in written]
        return lines + [self._take(place) for place in range(len(self.work.takes))]

    def blocks(self, pragma: str) -> list[str]:
        """All that is done with a block: a loop for each phase, and what is between them."""
        phases, elements = self.body.phases, self.body.elements
        lines, last = [], max(phases.values())
        waiting = {}  # what is kept for loops after that in which it is made
        for node in elements:
            if node.op == "short":
                words = ", ".join(name_of(word, True) for word in node.inputs)
                lines.append(f"    uint16_t {name_of(node)}_[{BLOCK}];")
                lines.append(f"    short_block({words}, start / {BLOCK}, {name_of(node)}_);")
            elif node.block and node.index in self.work.sources:
                scales = f"in_{self.work.sources[node.index]}"
                lines.append(f"    const float {name_of(node)} = {scales}[0];")
            elif not node.block and any(
                phases[n.index] > phases[node.index] for n in self._users(node)
            ):
                waiting[node.index] = node
                lines.append(f"    {self._type(node)} {name_of(node)}_[{BLOCK}];")
        for phase in range(last + 1):
            lines += self._loop(phase, waiting, pragma)
        written = [(name, node) for name, node in self.body.writes.items() if node.block]
        return lines + [f"    out_{name}[0] = {name_of(node)};" for name, node in written]

    def _loop(self, phase: int, waiting: Mapping[int, Node], pragma: str) -> list[str]:
        """One loop over a block, and what is known after it."""
        phases, elements = self.body.phases, self.body.elements
        own = [n for n in elements if phases[n.index] == phase and not n.block and n.op != "short"]
        scales = [n for n in elements if n.op == "block_scale" and phases[n.index] == phase + 1]
        scales = [node for node in scales if node.index not in self.work.sources]
        written = [
            (name, node, dtype)
            for (name, node), dtype in zip(
                self.body.writes.items(), self.dtypes.writes, strict=True
            )
            if not node.block and phases.get(node.index, 0) == phase
        ]
        takes = [k for k, t in enumerate(self.work.takes) if phases.get(t.node.index, 0) == phase]
        needed = {a.index: a for n in own if n.index not in self.work.sources for a in n.inputs}
        needed |= {node.index: node for _, node, _ in written}
        needed |= {self.work.takes[k].node.index: self.work.takes[k].node for k in takes}
        needed |= {node.inputs[0].index: node.inputs[0] for node in scales}
        before = [
            node
            for index, node in sorted(needed.items())
            if (index in waiting and phases[index] < phase) or node.op == "short"
        ]
        inner = [
            f"        const {self._type(node)} {name_of(node)} = {name_of(node)}_[i];"
            for node in before
        ]
        inner += [self._element(node) for node in own]
        inner += [f"        {name_of(n)}_[i] = {name_of(n)};" for n in own if n.index in waiting]
        inner += [self._store(*one) for one in written]
        inner += [self._take(k) for k in takes]
        # Compared as integers: without a sign, bits are ordered as their numbers are, and those of
        # infinity and NaN are the largest.
        for node in scales:
            value = f"magnitude_of({name_of(node.inputs[0])})"
            name = f"largest_{name_of(node.inputs[0])}"
            inner.append(f"        {name} = {value} > {name} ? {value} : {name};")
        lines = [f"    uint32_t largest_{name_of(node.inputs[0])} = 0;" for node in scales]
        if inner:
            largest = "".join(f" reduction(max:largest_{name_of(n.inputs[0])})" for n in scales)
            pragmas = [pragma + largest] if pragma else []
            lines += [*pragmas, "    for (int64_t i = 0; i < count; ++i) {", *inner, "    }"]
        lines += [f"    const float {name_of(n)} = {self._expression(n, 'float')};" for n in scales]
        return lines

    def _users(self, node: Node) -> list[Node]:
        """The elements that are made of one."""
        others = (n for n in self.body.elements if n.index not in self.work.sources)
        return [
            other
            for other in others
            if any(a is node for a in other.inputs) and other.op != "block_scale"
        ]

    def _element(self, node: Node) -> str:
        if node.index in self.work.sources:
            value = self._load(node)
        else:
            value = self._expression(node, "double" if node.wide else self.precision)
        return f"        const {self._type(node)} {name_of(node)} = {value};"

    def _store(self, name: str, node: Node, dtype: torch.dtype) -> str:
        value = self._argument(node, self.precision, element=True)
        if dtype == torch.bfloat16:
            # Already rounded to bfloat16: the lower half is zero and can be cut off.
            exact = node.op in _ROUNDING and (node.args[-1] or self.dtypes.leaf) == dtype
            value = f"{'high_half' if exact else 'to_bfloat16'}({value})"
        return f"        out_{name}[i] = {value};"

    def _take(self, place: int) -> str:
        take = self.work.takes[place]
        value = self._argument(take.node, "double", element=True)
        return f"        {_MORE[take.reduction.combine].format(f'take_{place}', value)}"

    def _type(self, node: Node) -> str:
        if node.op in LOGICAL:
            return "int"
        codes = node.index in self.work.sources and self._stored(node) == torch.uint8
        if node.op in ("word", "short", "multiple", "encoded") or codes:
            return "uint32_t"
        return "double" if node.wide else self.precision

    def _stored(self, node: Node) -> torch.dtype:
        """The dtype of the column in which a node is in memory."""
        return self.dtypes.reads[self.body.reads.index(self.work.sources[node.index])]

    def _load(self, node: Node) -> str:
        value = f"in_{self.work.sources[node.index]}[i]"
        return f"from_bfloat16({value})" if self._stored(node) == torch.bfloat16 else value

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
