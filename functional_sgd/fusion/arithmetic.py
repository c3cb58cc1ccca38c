"""Rules as arithmetic: a rule that is run on symbols leaves a graph of pointwise operations.

A symbol is an `element` (one number of a leaf) or a `scalar` (a hyper, the step, or anything made
of them). Scalars are double precision and computed once a step; elements are computed in the
precision of the leaf.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from functional_sgd.wiring import Call, Reduced

LOGICAL = frozenset({"eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "isnan", "isfinite"})
"""Operations whose results are true or false."""


class NotPointwise(Exception):
    """A rule does something that is not pointwise arithmetic; the message says what."""


class Node:
    """One value in a graph: an operation and its arguments. Made by a Graph.

    `stage` says when it can be had: kernels run in stages, and the number that a reduction makes of
    columns in one of them is there in the next. A `block` is an element that is the same for all of
    a block.
    """

    __slots__ = ("args", "block", "element", "graph", "index", "op", "stage", "wide")

    def __init__(
        self, graph: "Graph", op: str, args: tuple[Any, ...], element: bool, index: int, stage: int
    ) -> None:
        self.graph, self.op, self.args, self.element = graph, op, args, element
        self.index, self.stage = index, stage
        self.block = op == "block_scale"
        # Reductions are computed in double precision, whatever the precision of the leaf.
        self.wide: bool = element and (op == "wide" or any(a.wide for a in self.inputs))

    @property
    def inputs(self) -> list["Node"]:
        """The nodes among its arguments."""
        return [arg for arg in self.args if isinstance(arg, Node)]

    def __repr__(self) -> str:
        return f"{self.op}({', '.join(map(_shown, self.args))})"

    # What rules do with tensors: operators, torch functions, methods.

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: Collection[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> "Node":
        name = getattr(func, "__name__", str(func))
        return _apply(name, args, kwargs or {})

    def __getattr__(self, name: str) -> Callable[..., "Node"]:
        if name.startswith("__") or name not in FUNCTIONS:
            # Not an AttributeError: hasattr would hide it, and the rule take another branch.
            raise NotPointwise(f"it uses .{name}, which is not a pointwise operation")
        return lambda *args, **kwargs: _apply(name, (self, *args), kwargs)

    def __bool__(self) -> bool:
        raise NotPointwise("it branches on a value (if, and, or, max(), min()); use torch.where")

    def __float__(self) -> float:
        raise NotPointwise("it turns a value into a Python number")

    # As a key it would be found by identity, as text it is no number: never what a rule looks for.

    def __hash__(self) -> int:
        raise NotPointwise("it looks a value up (as the key of a dict, in a set); use torch.where")

    def __format__(self, spec: str = "") -> str:
        raise NotPointwise("it makes a text of a value")

    __str__ = __format__


class Graph:
    """A growing list of nodes, each made once."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._known: dict[tuple[object, ...], Node] = {}

    def node(
        self, op: str, *args: object, element: bool | None = None, stage: int | None = None
    ) -> Node:
        """The node with this operation and these arguments (nodes or constants)."""
        inputs = [arg for arg in args if isinstance(arg, Node)]
        if element is None:
            element = any(arg.element for arg in inputs)
        if stage is None:
            stage = max((arg.stage for arg in inputs), default=0)
        key = (op, element, *map(_identity, args))
        if key not in self._known:
            self._known[key] = Node(self, op, args, element, len(self.nodes), stage)
            self.nodes.append(self._known[key])
        return self._known[key]

    def column(self, name: str, stage: int = 0, block: bool = False) -> Node:
        """What a leaf has in a column, which is in memory when this stage begins; one number for
        each block, perhaps.
        """
        node = self.node("column", name, element=True, stage=stage)
        node.block = block
        return node

    def scalar(self, name: str, stage: int = 0) -> Node:
        """A hyper, the step, or any other number that a kernel is called with."""
        return self.node("scalar", name, element=False, stage=stage)

    def word(self, name: str) -> Node:
        """A word of a random key: a whole number below 2**32."""
        return self.node("word", name, element=False)

    def value(self, constant: object) -> Node:
        """A constant."""
        if isinstance(constant, Node):
            return constant
        if isinstance(constant, (bool, int, float)):
            return self.node("constant", float(constant), element=False)
        if isinstance(constant, Tensor) and constant.requires_grad:
            raise NotPointwise(
                "it mixes in a tensor that is tracked, and a kernel has no derivative"
            )
        if isinstance(constant, Tensor) and constant.device.type == "cpu" and constant.dim() == 0:
            return self.node("constant", float(constant), element=False)
        raise NotPointwise(f"it mixes in a {type(constant).__name__} that is not a number")

    def run(
        self, call: Call, columns: Mapping[str, Node], scalars: Mapping[str, object]
    ) -> dict[str, Node]:
        """Run a rule on symbols: name -> node for what it writes.

        Raises NotPointwise if that cannot be done.
        """
        try:
            result = call.run(columns, scalars)
        except NotPointwise:
            raise
        except Exception as error:
            raise NotPointwise(f"{type(error).__name__}: {error}") from error
        return {name: self.value(value) for name, value in result.items()}

    def reduced(self, reduced: Reduced, columns: Mapping[str, Node]) -> Node:
        """The expression of a reduction. Raises NotPointwise if it cannot be run on symbols."""
        named = dict(reduced.columns)
        wide = [self.node("wide", columns[named[name]]) for name in reduced.reduction.columns]
        try:
            node = self.value(reduced.reduction.expression(*wide))
        except NotPointwise:
            raise
        except Exception as error:
            raise NotPointwise(f"{type(error).__name__}: {error}") from error
        if not node.element:
            raise NotPointwise(f"{reduced.parameter!r} is made of numbers, not of columns")
        return node

    def needed(self, outputs: Iterable[Node], known: Collection[int] = ()) -> list[Node]:
        """The nodes that these are made of, in an order in which they can be computed.

        What `known` nodes are made of is not looked for.
        """
        marked: set[int] = set()
        waiting = list(outputs)
        while waiting:
            node = waiting.pop()
            if node.index not in marked:
                marked.add(node.index)
                if node.index not in known:
                    waiting.extend(node.inputs)
        # Nodes are created after their inputs, so creation order is an order of computation.
        return [node for node in self.nodes if node.index in marked]


def _shown(arg: object) -> str:
    """An argument of a node, for people."""
    return f"%{arg.index}" if isinstance(arg, Node) else repr(arg)


def _identity(arg: object) -> tuple[object, object]:
    """What tells an argument of a node from others."""
    if isinstance(arg, Node):
        return "%", arg.index
    # By type and repr, since 1, 1.0 and True are equal as keys, and 0.0 and -0.0 too.
    return type(arg), repr(arg)


def _apply(name: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Node:
    if name not in FUNCTIONS:
        raise NotPointwise(f"it calls {name}, which is not a pointwise operation")
    graph = next(arg.graph for arg in (*args, *kwargs.values()) if isinstance(arg, Node))
    try:
        return FUNCTIONS[name](graph, *args, **kwargs)
    except TypeError as error:
        raise NotPointwise(f"it calls {name} in a way that cannot be fused ({error})") from error


def _plain(op: str, arity: int) -> Callable[..., Node]:
    """A function whose arguments are values, and nothing else."""

    def build(graph: Graph, *args: object) -> Node:
        if len(args) != arity:
            raise NotPointwise(f"it calls {op} with {len(args)} arguments")
        return graph.node(op, *map(graph.value, args))

    return build


def _swapped(op: str) -> Callable[..., Node]:
    return lambda graph, right, left: graph.node(op, graph.value(left), graph.value(right))


def _is_logical(value: object) -> bool:
    return isinstance(value, bool) or (isinstance(value, Node) and value.op in LOGICAL)


def _logical(graph: Graph, op: str, *args: object) -> Node:
    """An operation on truth values, of which some may be Python's."""
    truths = []
    for value in [graph.value(arg) for arg in args]:
        if value.op in LOGICAL:
            truths.append(value)
        else:
            # A constant is a number: backends tell truth values by their operation.
            truths.append(graph.node("ne", value, graph.value(0.0)))
    return graph.node(op, *truths)


def _of_logical(logical: str, op: str) -> Callable[..., Node]:
    """An operation that has another meaning for two truth values, of which it makes a third: torch
    adds them with `or`, and multiplies them with `and`.
    """

    def build(graph: Graph, left: object, right: object) -> Node:
        if _is_logical(left) and _is_logical(right):
            return _logical(graph, logical, left, right)
        return graph.node(op, graph.value(left), graph.value(right))

    return build


_sum = _of_logical("or", "add")
_mul = _of_logical("and", "mul")
_largest = _of_logical("or", "maximum")
_smallest = _of_logical("and", "minimum")


def _add(graph: Graph, left: object, right: object, *, alpha: object = 1) -> Node:
    return _sum(graph, left, _times(graph, right, alpha))


def _sub(graph: Graph, left: object, right: object, *, alpha: object = 1) -> Node:
    return graph.node("sub", graph.value(left), graph.value(_times(graph, right, alpha)))


def _times(graph: Graph, value: object, factor: object) -> object:
    # A factor of 1 must leave a boolean what it is, or `_add` would add numbers.
    if not isinstance(factor, Node) and factor == 1:
        return value
    return _mul(graph, value, factor)


def _div(graph: Graph, left: object, right: object) -> Node:
    return graph.node("div", graph.value(left), graph.value(right))


def _pow(graph: Graph, base: object, exponent: object) -> Node:
    base, exponent = graph.value(base), graph.value(exponent)
    # As torch does, bit for bit; C's pow has other signs at -0.0 and -inf.
    power = exponent.args[0] if exponent.op == "constant" else None
    if power == 2.0:
        return graph.node("mul", base, base)
    if power == 0.5:
        return graph.node("sqrt", base)
    if power == -0.5:
        return graph.node("rsqrt", base)
    return graph.node("pow", base, exponent)


def _square(graph: Graph, value: object) -> Node:
    if _is_logical(value):
        return _where(graph, value, 1.0, 0.0)  # to torch, the square of one is a number
    return _mul(graph, value, value)


def _clamp(graph: Graph, value: object, min: object = None, max: object = None) -> Node:
    clamped = graph.value(value)
    if min is not None:
        clamped = graph.node("maximum", clamped, graph.value(min))
    # The upper bound is applied last: in torch it wins where the bounds cross.
    if max is not None:
        clamped = graph.node("minimum", clamped, graph.value(max))
    return clamped


def _where(graph: Graph, condition: object, yes: object, no: object) -> Node:
    if _is_logical(yes) and _is_logical(no):
        chosen = _logical(graph, "and", condition, yes)
        other = _logical(graph, "and", _logical(graph, "not", condition), no)
        return _logical(graph, "or", chosen, other)
    return graph.node("where", graph.value(condition), graph.value(yes), graph.value(no))


def _lerp(graph: Graph, start: object, end: object, weight: object) -> Node:
    difference = _sub(graph, end, start)
    near = _add(graph, start, _mul(graph, weight, difference))
    # The formula of torch.lerp: it ends exactly at `end` for weight 1, which the near one does not.
    far = _sub(graph, end, _mul(graph, difference, _sub(graph, 1.0, weight)))
    nearer = graph.node("lt", graph.node("abs", graph.value(weight)), graph.value(0.5))
    return _where(graph, nearer, near, far)


def _addcmul(graph: Graph, start: object, left: object, right: object, value: object) -> Node:
    return _add(graph, start, _mul(graph, _times(graph, left, value), right))


def _addcdiv(graph: Graph, start: object, left: object, right: object, value: object) -> Node:
    return _add(graph, start, _div(graph, _times(graph, left, value), right))


def _itself(graph: Graph, value: object) -> Node:
    return graph.value(value)


def _with_kind(op: str) -> Callable[..., Node]:
    """An operation whose last argument says how: a dtype to round to (None stands for that of the
    leaf), or whether there is a sign.
    """
    return lambda graph, *args: graph.node(op, *map(graph.value, args[:-1]), args[-1])


def _full(constant: float) -> Callable[..., Node]:
    return lambda graph, like: graph.node("constant", constant, element=False)


_UNARY = (
    "neg abs sqrt rsqrt exp expm1 log log1p log2 sin cos tanh sigmoid sign floor ceil trunc round "
    "isnan isfinite"
)
_BINARY = "eq ne lt le gt ge remainder fmod copysign atan2"

FUNCTIONS: dict[str, Callable[..., Node]] = {
    **{name: _plain(name, 1) for name in _UNARY.split()},
    **{name: _plain(name, 2) for name in _BINARY.split()},
    **{f"__{name}__": _plain(name, 2) for name in ["eq", "ne", "lt", "le", "gt", "ge"]},
    **dict.fromkeys(("add", "__add__", "__radd__"), _add),
    **dict.fromkeys(("sub", "subtract", "__sub__"), _sub),
    **dict.fromkeys(("mul", "multiply", "__mul__", "__rmul__"), _mul),
    **dict.fromkeys(("div", "divide", "true_divide", "__truediv__"), _div),
    **dict.fromkeys(("pow", "__pow__"), _pow),
    **{name: _plain("and", 2) for name in ("logical_and", "bitwise_and", "__and__", "__rand__")},
    **{name: _plain("or", 2) for name in ("logical_or", "bitwise_or", "__or__", "__ror__")},
    **{name: _plain("not", 1) for name in ("logical_not", "bitwise_not", "__invert__")},
    **dict.fromkeys(("clone", "detach", "contiguous", "positive", "__pos__"), _itself),
    **dict.fromkeys(("rsub", "__rsub__"), _swapped("sub")),
    "__rtruediv__": _swapped("div"),
    "__rpow__": _swapped("pow"),
    "__mod__": _plain("remainder", 2),
    "__rmod__": _swapped("remainder"),
    **dict.fromkeys(("negative", "__neg__"), _plain("neg", 1)),
    **dict.fromkeys(("absolute", "__abs__"), _plain("abs", 1)),
    **dict.fromkeys(("max", "maximum"), _largest),
    **dict.fromkeys(("min", "minimum"), _smallest),
    "square": _square,
    "reciprocal": lambda graph, value: _div(graph, 1.0, value),
    "relu": lambda graph, value: _clamp(graph, value, min=0.0),
    **dict.fromkeys(("clamp", "clip"), _clamp),
    "clamp_min": lambda graph, value, min: _clamp(graph, value, min=min),
    "clamp_max": lambda graph, value, max: _clamp(graph, value, max=max),
    "where": _where,
    "lerp": _lerp,
    "addcmul": lambda graph, start, left, right, value=1: _addcmul(
        graph, start, left, right, value
    ),
    "addcdiv": lambda graph, start, left, right, value=1: _addcdiv(
        graph, start, left, right, value
    ),
    "block_scale": _plain("block_scale", 1),
    **{name: _with_kind(name) for name in ("rounded", "neighbour", "encoded", "decode")},
    "zeros_like": _full(0.0),
    "ones_like": _full(1.0),
    "full_like": lambda graph, like, fill_value: graph.value(fill_value),
}


def _operator(name: str) -> Callable[..., Node]:
    return lambda *args: _apply(name, args, {})


# Python looks operators up on the class and does not ask __getattr__.
for _name in FUNCTIONS:
    if _name.startswith("__"):
        setattr(Node, _name, _operator(_name))
