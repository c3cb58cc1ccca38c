"""Write a pass as one readable C function over a table of pointers."""

import torch

from functional_sgd.fusion.arithmetic import LOGICAL, Node
from functional_sgd.fusion.backends.c.functions import FUNCTIONS, RANDOM_FUNCTIONS
from functional_sgd.fusion.kernel import Body, Dtypes, body_of, name_of
from functional_sgd.fusion.passes import Pass

_FUNCTION = """\

/* {title} */

/* The scalars of one step: hyper[0..{n_hypers}) -> s[0..{n_scalars}). */
static void prepare(const double *restrict hyper, double *restrict s) {{
{prepare}
}}

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
}}

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
    "maximum": "({0} > {1} || {0} != {0}) ? {0} : {1}",
    "minimum": "({0} < {1} || {0} != {0}) ? {0} : {1}",
    "sign": "({T})(({0} > 0) - ({0} < 0))",
    "rsqrt": "1 / sqrt{f}({0})",
    "sigmoid": "1 / (1 + exp{f}(-{0}))",
    "remainder": "remainder_{T}({0}, {1})",
    "abs": "fabs{f}({0})",
    "round": "rint{f}({0})",
    "isnan": "{0} != {0}",
    "isfinite": "fabs{f}({0}) <= {MAX}",
    "uniform": "({T})(threefry({0}, {1}, (uint64_t)(start + i), {draw}, 0) >> 8) * ({T})0x1p-24",
    "tail": "(({T})(threefry({0}, {1}, (uint64_t)(start + i), {draw}, 1) >> 1) + ({T})0.5)"
    " * ({T})0x1p-32",
    "short": "short_bits({0}, {1}, (uint64_t)(start + i), {draw})",
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
_FIRST = {"sum": "0", "max": "-INFINITY", "all": "1"}
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
    text = _FUNCTION.format(
        title=work.title,
        n_hypers=len(body.hypers),
        n_scalars=len(writer.crossing),
        stride=max(len(writer.crossing), 1),
        n_columns=len(body.reads) + len(body.writes),
        n_takes=n_takes,
        prepare="\n".join(writer.prepare()),
        scalars="\n".join(writer.scalars()),
        bind="\n".join(writer.bind()),
        begin_takes="\n".join(f"    double take_{k} = {_FIRST[combines[k]]};" for k in places),
        pragma=simd,
        body="\n".join(writer.elements()),
        end_takes="\n".join(f"    part[{k}] = take_{k};" for k in places),
        combine="" if not n_takes else _COMBINE.format(
            n_takes=n_takes,
            first=" ".join(f"totals[l * {n_takes} + {k}] = {_FIRST[combines[k]]};" for k in places),
            more=" ".join(_MORE[combines[k]].format(f"total[{k}]", f"part[{k}]") for k in places),
        ),
    )  # fmt: skip
    return FUNCTIONS + (RANDOM_FUNCTIONS if work.random else "") + text


class _Writer:
    """Writes the lines of a pass."""

    def __init__(self, work: Pass, body: Body, dtypes: Dtypes, precision: str) -> None:
        self.work, self.body, self.dtypes, self.precision = work, body, dtypes, precision
        wide = {a.index for n in body.elements if n.wide for a in n.inputs if not a.element}
        plain = {a.index for n in body.elements if not n.wide for a in n.inputs if not a.element}
        plain |= {node.index for node in body.writes.values()}
        # (scalar, whether elements need it in double precision)
        self.crossing = [
            (node, is_wide)
            for node in body.crossing
            for is_wide, used in ((False, plain), (True, wide))
            if node.index in used
        ]

    def prepare(self) -> list[str]:
        lines = []
        for node in self.body.scalars:
            note = f"  /* {node.args[0]} */" if node.op in ("scalar", "word") else ""
            value = self._expression(node, "double")
            lines.append(f"    const double {name_of(node)} = {value};{note}")
        for place, (node, _) in enumerate(self.crossing):
            lines.append(f"    s[{place}] = {name_of(node)};")
        return lines

    def scalars(self) -> list[str]:
        lines = []
        for place, (node, is_wide) in enumerate(self.crossing):
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
            lines.append(f"    {kind}{way}_{name} = ({kind})pointers[{place}] + start;")
        return lines

    def elements(self) -> list[str]:
        lines = []
        for node in self.body.elements:
            if node.index in self.work.sources:
                value = self._load(self.work.sources[node.index])
            else:
                value = self._expression(node, "double" if node.wide else self.precision)
            lines.append(f"        const {self._type(node)} {name_of(node)} = {value};")
        for (name, node), dtype in zip(self.body.writes.items(), self.dtypes.writes, strict=True):
            value = self._argument(node, self.precision, element=True)
            stored = f"to_bfloat16({value})" if dtype == torch.bfloat16 else value
            lines.append(f"        out_{name}[i] = {stored};")
        for place, take in enumerate(self.work.takes):
            value = self._argument(take.node, "double", element=True)
            combine = _MORE[take.reduction.combine].format(f"take_{place}", value)
            lines.append(f"        {combine}")
        return lines

    def _type(self, node: Node) -> str:
        if node.op in LOGICAL:
            return "int"
        if node.op in ("word", "short"):
            return "uint32_t"
        return "double" if node.wide else self.precision

    def _load(self, column: str) -> str:
        dtype = self.dtypes.reads[self.body.reads.index(column)]
        return f"from_bfloat16(in_{column}[i])" if dtype == torch.bfloat16 else f"in_{column}[i]"

    def _argument(self, node: Node, precision: str, element: bool, wide: bool = False) -> str:
        if node.op == "constant":
            return _constant(node.args[0], precision)
        return name_of(node, element, wide)

    def _expression(self, node: Node, precision: str) -> str:
        if node.op in ("scalar", "word"):
            return f"hyper[{self.body.hypers.index(node.args[0])}]"
        args = [self._argument(arg, precision, node.element, node.wide) for arg in node.inputs]
        if node.op in _OPERATORS:
            return f"{args[0]} {_OPERATORS[node.op]} {args[1]}"
        if node.op in _ROUNDING:
            dtype = self.dtypes.leaf if node.args[-1] is None else node.args[-1]
            return _ROUNDING[node.op].get(dtype, "{0}").format(*args)
        suffix = "f" if precision == "float" else ""
        if node.op in _TEMPLATES:
            return _TEMPLATES[node.op].format(
                *args, f=suffix, T=precision, MAX=_LIMIT[precision], draw=node.args[-1]
            )
        return f"{node.op}{suffix}({', '.join(args)})"


def _constant(value: float, precision: str) -> str:
    if value != value:
        return "NAN"
    if value in (float("inf"), float("-inf")):
        return "INFINITY" if value > 0 else "(-INFINITY)"
    return f"({precision}){value!r}"
