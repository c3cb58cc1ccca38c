"""Leaves that put off pointwise work: how a rule that sees whole leaves is split into reductions and arithmetic.

A rule like `clip_norm` reduces its leaves to a few numbers and then multiplies. Run on lazy leaves, the reductions
happen (with torch) and the multiplication does not: it becomes part of the next kernel, with the numbers as scalars.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from functional_sgd.execute.graph import FUNCTIONS, Node, NotPointwise


class Numbers:
    """The scalars that a rule has reduced one leaf to, in the order in which it used them."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.values: list[Tensor] = []

    def name(self, value: Tensor) -> str:
        """The name of a scalar: that of its place in the order."""
        for place, known in enumerate(self.values):
            if known is value:
                return f"{self.prefix}_{place}"
        self.values.append(value)
        return f"{self.prefix}_{len(self.values) - 1}"


class Lazy:
    """A tensor, and the symbol that stands for it; pointwise operations are written down, all others are done."""

    __slots__ = ("_make", "node", "numbers")

    def __init__(self, node: Node, make: Callable[[], Tensor], numbers: Numbers) -> None:
        self.node, self._make, self.numbers = node, make, numbers

    @property
    def tensor(self) -> Tensor:
        """The tensor itself."""
        return self._make()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(getattr(func, "__name__", str(func)), func, args, kwargs or {})

    def __bool__(self) -> bool:
        return bool(self.tensor)

    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        if name in FUNCTIONS:
            return lambda *args, **kwargs: _call(name, getattr(Tensor, name), (self, *args), kwargs)
        value = getattr(self.tensor, name)
        if not callable(value):
            return value
        return lambda *args, **kwargs: value(*map(_real, args), **{key: _real(arg) for key, arg in kwargs.items()})


def _call(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def really() -> Any:
        return func(*map(_real, args), **{key: _real(value) for key, value in kwargs.items()})

    lazy = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, Lazy)), None)
    if lazy is None or name not in FUNCTIONS:
        return really()
    try:
        symbols = [_symbol(arg, lazy) for arg in args]
        node = FUNCTIONS[name](lazy.node.graph, *symbols, **{key: _symbol(arg, lazy) for key, arg in kwargs.items()})
    except (NotPointwise, TypeError):
        return really()
    return Lazy(node, really, lazy.numbers)


def _symbol(value: Any, lazy: Lazy) -> Any:
    if isinstance(value, Lazy):
        if value.node.graph is not lazy.node.graph:
            raise NotPointwise("it mixes leaves")
        return value.node
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise NotPointwise("it mixes in a tensor")
        return lazy.node.graph.scalar(lazy.numbers.name(value))
    return value


def _real(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_real, value))
    return value.tensor if isinstance(value, Lazy) else value


def lazy_leaf(columns: Mapping[str, Tensor], symbols: Mapping[str, Node], prefix: str) -> dict[str, Lazy]:
    """One leaf's columns as lazy tensors that share their numbers."""
    numbers = Numbers(prefix)
    return {name: Lazy(symbols[name], lambda t=value: t, numbers) for name, value in columns.items()}  # type: ignore[misc]


def _operator(name: str) -> Callable[..., Any]:
    return lambda *args: _call(name, getattr(Tensor, name), args, {})


for _name in FUNCTIONS:
    if _name.startswith("__"):
        setattr(Lazy, _name, _operator(_name))
