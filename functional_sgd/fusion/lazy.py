"""Leaves that put off pointwise work: how a rule that sees whole leaves is split into reductions
and arithmetic.

A rule like `clip_norm` reduces its leaves to a few numbers and then multiplies. Run on lazy leaves,
the reductions happen (with torch) and the multiplication does not: it becomes part of the next
kernel, with the numbers as scalars.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from functional_sgd.fusion.arithmetic import FUNCTIONS, NORMS, Node, NotPointwise


class Numbers:
    """The scalars that a rule has reduced leaves to, in the order in which it used them.

    `known` are the nodes of what has been done with them, since a rule does the same with every
    leaf.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.values: list[Tensor] = []
        self.known: dict[tuple[str, int, int], Node] = {}

    def name(self, value: Tensor) -> str:
        """The name of a scalar: that of its place in the order."""
        for place, known in enumerate(self.values):
            if known is value:
                return f"{self.prefix}_{place}"
        self.values.append(value)
        return f"{self.prefix}_{len(self.values) - 1}"


class Lazy:
    """A tensor, and the symbol that stands for it; pointwise operations are written down, all
    others are done.

    Its norm may be known to somebody who computes those of all leaves at once.
    """

    __slots__ = ("_make", "node", "norm_of_all", "numbers", "place")

    def __init__(
        self,
        node: Node,
        make: Callable[[], Tensor],
        numbers: Numbers,
        norm_of_all: Callable[[], Sequence[Tensor]] | None = None,
        place: int = 0,
    ) -> None:
        self.node, self._make, self.numbers = node, make, numbers
        self.norm_of_all, self.place = norm_of_all, place

    @property
    def tensor(self) -> Tensor:
        """The tensor itself."""
        return self._make()

    @property
    def device(self) -> torch.device:
        """Where the leaf is."""
        return self._make().device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which rules see the leaf."""
        return self._make().dtype

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
        return lambda *args, **kwargs: value(
            *map(_real, args), **{key: _real(arg) for key, arg in kwargs.items()}
        )


def _call(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    first: Any = args[0] if args else None
    if not kwargs and type(first) is Lazy:
        if name in NORMS and len(args) == 1 and first.norm_of_all is not None:
            return first.norm_of_all()[first.place]
        if len(args) == 2 and type(args[1]) is Tensor:
            known = first.numbers.known.get((name, first.node.index, id(args[1])))
            if known is not None:
                return Lazy(known, lambda: func(first.tensor, args[1]), first.numbers)

    def really() -> Any:
        return func(*map(_real, args), **{key: _real(value) for key, value in kwargs.items()})

    lazy: Any = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, Lazy)), None)
    if lazy is None or name not in FUNCTIONS:
        return really()
    try:
        symbols = [_symbol(arg, lazy) for arg in args]
        node = FUNCTIONS[name](
            lazy.node.graph, *symbols, **{key: _symbol(arg, lazy) for key, arg in kwargs.items()}
        )
    except (NotPointwise, TypeError):
        return really()
    if not kwargs and lazy is first and len(args) == 2 and type(args[1]) is Tensor:
        lazy.numbers.known[name, lazy.node.index, id(args[1])] = (
            node  # the tensor is among the numbers, so it lives on
        )
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


def lazy_leaves(
    leaves: Sequence[Mapping[str, Tensor]],
    symbols: Mapping[str, Node],
    prefix: str,
    together: bool,
    norms: Callable[[str], Sequence[Tensor]] | None,
) -> list[dict[str, Lazy]]:
    """The columns of each leaf as lazy tensors. All leaves share their numbers, if they are
    `together`; else those of one leaf do. `norms` knows the norms of all leaves in a column.
    """
    shared = Numbers(prefix) if together else None
    of_all = {name: None if norms is None else partial(norms, name) for name in symbols}
    lazy = []
    for place, leaf in enumerate(leaves):
        numbers = shared or Numbers(prefix)
        lazy.append(
            {
                name: Lazy(symbols[name], partial(_itself, value), numbers, of_all[name], place)
                for name, value in leaf.items()
            }
        )
    return lazy


def _itself(value: Tensor) -> Tensor:
    return value


def _operator(name: str) -> Callable[..., Any]:
    return lambda *args: _call(name, getattr(Tensor, name), args, {})


for _name in FUNCTIONS:
    if _name.startswith("__"):
        setattr(Lazy, _name, _operator(_name))
