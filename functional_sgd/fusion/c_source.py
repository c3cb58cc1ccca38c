"""Write a graph of pointwise arithmetic as one readable C function over a table of pointers."""

from collections.abc import Mapping, Sequence

import torch

from functional_sgd.fusion.arithmetic import LOGICAL, Graph, Node
from functional_sgd.fusion.source import Kernel, name_of, parts_of

CONVERSIONS = """\
#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float from_bfloat16(uint16_t x) {
    uint32_t u = (uint32_t)x << 16; float f; memcpy(&f, &u, 4);
    return f;
}
static inline uint16_t to_bfloat16(float f) {
    uint32_t u; memcpy(&u, &f, 4);
    uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return f != f ? 0x7fc0 : (uint16_t)rounded;
}
"""

_HEADER = """\
{conversions}static inline double remainder_double(double a, double b) {{
    double r = fmod(a, b);
    return (r != 0 && (r < 0) != (b < 0)) ? r + b : r;
}}
static inline float remainder_float(float a, float b) {{
    float r = fmodf(a, b);
    return (r != 0 && (r < 0) != (b < 0)) ? r + b : r;
}}

/* {title} */
"""

_FUNCTION = """\
/* The scalars of one step: hyper[0..{n_hypers}) -> s[0..{n_scalars}). */
static void prepare(const double *restrict hyper, double *restrict s) {{
{prepare}
}}

/* Elements [start, start + count) of one leaf. */
static void chunk(char *const *pointers, int64_t start, int64_t count, const double *restrict s) {{
{scalars}
{bind}
    #pragma omp simd
    for (int64_t i = 0; i < count; ++i) {{
{body}
    }}
}}

/* All leaves, in chunks: chunk c is part of leaf[c], whose scalars come from row[leaf[c]] of the hypers.
   Column k of leaf l is at pointers[l + k * n_leaves]. */
void run(int64_t n_leaves, char *const *pointers, int64_t n_rows, const double *hypers, const int32_t *row,
         int64_t n_chunks, const int32_t *leaf, const int64_t *start, const int64_t *count, double *scratch,
         int threads) {{
    for (int64_t r = 0; r < n_rows; ++r) prepare(hypers + r * {n_hypers}, scratch + r * {stride});
    int64_t grain = n_chunks / (8 * threads) + 1;
    #pragma omp parallel for schedule(dynamic, grain) num_threads(threads) if (n_chunks > 1 && threads > 1)
    for (int64_t c = 0; c < n_chunks; ++c) {{
        int64_t l = leaf[c];
        char *here[{n_columns}];
        for (int k = 0; k < {n_columns}; ++k) here[k] = pointers[l + k * n_leaves];
        chunk(here, start[c], count[c], scratch + row[l] * {stride});
    }}
}}
"""

_STORED = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "uint16_t",
    torch.float16: "_Float16",
}

_OPERATORS = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "div": "/",
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
}
_OPERATORS |= {"gt": ">", "ge": ">=", "and": "&&", "or": "||"}
_TEMPLATES = {
    "neg": "-{0}",
    "not": "!{0}",
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
}


def emit(
    graph: Graph,
    outputs: Mapping[str, Node],
    dtypes: Mapping[str, torch.dtype],
    results: Mapping[str, torch.dtype],
    working: torch.dtype,
    title: str,
) -> Kernel:
    """The kernel that computes these columns.

    `dtypes` are those of the columns read, `results` those of the columns written, `working` that
    of the arithmetic.
    """
    parts = parts_of(graph, outputs)
    inputs, hypers, crossing = parts.inputs, parts.hypers, parts.crossing
    names = [*(f"in_{name}" for name in inputs), *(f"out_{name}" for name in outputs)]
    kept = [*(dtypes[name] for name in inputs), *(results[name] for name in outputs)]
    precision = "float" if working == torch.float32 else "double"

    bind = [
        f"    {'const ' if k < len(inputs) else ''}{_STORED[dtype]} *{name} = "
        f"({'const ' if k < len(inputs) else ''}{_STORED[dtype]} *)pointers[{k}] + start;"
        for k, (name, dtype) in enumerate(zip(names, kept, strict=True))
    ]
    prepare = [
        f"    const double {name_of(node)} = {_expression(node, hypers, 'double')};{_comment(node)}"
        for node in parts.scalars
    ]
    prepare += [f"    s[{k}] = {name_of(node)};" for k, node in enumerate(crossing)]
    scalars = [
        f"    const {_type(node, precision)} {name_of(node, element=True)} = s[{k}];"
        for k, node in enumerate(crossing)
    ]
    body = [
        f"        const {_type(node, precision)} {name_of(node)} = {_load(node, dtypes)};"
        if node.op == "column"
        else f"        const {_type(node, precision)} {name_of(node)} = {_expression(node, hypers, precision)};"
        for node in parts.elements
    ]
    body += [
        f"        out_{name}[i] = {_store(node, results[name])};" for name, node in outputs.items()
    ]
    text = _HEADER.format(conversions=CONVERSIONS, title=title) + _FUNCTION.format(
        n_hypers=len(hypers), n_scalars=len(crossing), stride=max(len(crossing), 1), n_columns=len(names),
        prepare="\n".join(prepare), scalars="\n".join(scalars), bind="\n".join(bind), body="\n".join(body),
    )  # fmt: skip
    return Kernel(text, inputs, tuple(outputs), hypers, len(crossing))


def _type(node: Node, precision: str) -> str:
    return "int" if node.op in LOGICAL else precision


def _reference(node: Node, element: bool, precision: str) -> str:
    """An argument as it is written."""
    return _constant(node.args[0], precision) if node.op == "constant" else name_of(node, element)


def _constant(value: float, precision: str) -> str:
    if value != value or value in (float("inf"), float("-inf")):
        return "NAN" if value != value else ("INFINITY" if value > 0 else "(-INFINITY)")
    return f"({precision}){value!r}"


def _expression(node: Node, hypers: Sequence[str], precision: str) -> str:
    if node.op == "scalar":
        return f"hyper[{hypers.index(node.args[0])}]"
    args = [_reference(arg, node.element, precision) for arg in node.args]
    if node.op in _OPERATORS:
        return f"{args[0]} {_OPERATORS[node.op]} {args[1]}"
    suffix = "f" if precision == "float" else ""
    limit = "3.4028234663852886e38f" if precision == "float" else "1.7976931348623157e308"
    if node.op in _TEMPLATES:
        return _TEMPLATES[node.op].format(*args, f=suffix, T=precision, MAX=limit)
    return f"{node.op}{suffix}({', '.join(args)})"


def _comment(node: Node) -> str:
    return f"  /* {node.args[0]} */" if node.op == "scalar" else ""


def _load(node: Node, dtypes: Mapping[str, torch.dtype]) -> str:
    return loaded(f"in_{node.args[0]}", "i", dtypes[node.args[0]])


def loaded(array: str, index: str, dtype: torch.dtype) -> str:
    """An element of an array of stored numbers, as a number that C can calculate with."""
    element = f"{array}[{index}]"
    return f"from_bfloat16({element})" if dtype == torch.bfloat16 else element


def stored_type(dtype: torch.dtype) -> str:
    """The C type of an element in memory."""
    return _STORED[dtype]


def _store(node: Node, dtype: torch.dtype) -> str:
    value = _reference(node, True, "double")
    return f"to_bfloat16({value})" if dtype == torch.bfloat16 else value
