"""The items of a log as columns: run by run, what is kept as an array becomes one tensor."""

from array import array
from collections.abc import Callable
from typing import Any, TypeAlias

import optree
import torch
from torch import Tensor

from functional_sgd.tree import Tree
from loop.columns import Items, Numbers, Repeated, Run, Scalars, Trees

Node: TypeAlias = Any

_NUMBERS = {"d": torch.float64, "q": torch.int64}


def run_node(
    run: Run,
    where: str,
    start: int,
    tensors: dict[str, Tensor],
    node: Callable[[object, str], Node],
) -> Node:
    """A run that begins at item `start` of the log at `where`; `node` encodes what is no array."""
    span = f"{where}[{start}:{start + len(run)}]"
    if isinstance(run, Scalars):
        tensors[span] = run.values
        return {"scalars": span}
    if isinstance(run, Numbers):
        return {"numbers": _column(run, span, tensors)}
    if isinstance(run, Repeated):
        # A byte for each, since the length of a run is that of a tensor: see run_of.
        tensors[f"{span}.which"] = torch.zeros(run.count, dtype=torch.uint8)
        return {"repeated": [[node(run.value, span)], f"{span}.which"]}
    if isinstance(run, Trees):
        places = optree.tree_unflatten(run.structure, range(len(run.columns)))
        names = []
        for at, column in enumerate(run.columns):
            names.append(_column(column, f"{span}.{at}", tensors))
        return {"trees": [node(places, span), names]}
    return {"items": [node(item, f"{where}[{at}]") for at, item in enumerate(run, start)]}


def run_of(node: Node, take: Callable[[str], Tensor], value: Callable[[Node], Tree]) -> Run:
    """The run that a node stands for; `take` gives a tensor by its name, once.

    Its length is that of a tensor or of a list: no text makes more of it than there is. Raises
    ValueError for what makes no sense.
    """
    ((tag, body),) = node.items()
    if tag == "items":
        return Items(tuple(value(body)))
    if tag == "scalars":
        return Scalars(_flat(body, take))
    if tag == "numbers":
        return _numbers(body, take)
    if tag == "repeated":
        return _repeated(tuple(value(body[0])), _flat(body[1], take).byte())
    if tag == "trees":
        return _trees(value(body[0]), [_numbers(name, take) for name in body[1]])
    raise ValueError(f"a log has no {tag}.")


def _column(run: Run, name: str, tensors: dict[str, Tensor]) -> str:
    assert isinstance(run, Numbers)
    tensors[name] = torch.frombuffer(run.values[:], dtype=_NUMBERS[run.values.typecode])
    return name


def _flat(name: str, take: Callable[[str], Tensor]) -> Tensor:
    """A tensor whose length is bounded by what is in the file."""
    found = take(name)
    if found.dim() != 1:
        raise ValueError(f"{name} has {found.dim()} dimensions, expected 1.")
    return found


def _numbers(name: str, take: Callable[[str], Tensor]) -> Numbers:
    column = _flat(name, take)
    for code, dtype in _NUMBERS.items():
        if column.dtype == dtype:
            return Numbers(array(code, column.contiguous().numpy().tobytes()))
    raise ValueError(f"{name} is {column.dtype}, expected one of {[*_NUMBERS.values()]}.")


def _repeated(choices: tuple[object, ...], which: Tensor) -> Repeated:
    most = int(which.max()) if len(which) else 0
    if len(choices) != 1 or most:
        raise ValueError(f"a log says {most} where there are {len(choices)} values.")
    return Repeated(choices[0], len(which))


def _trees(template: Tree, columns: list[Numbers]) -> Trees:
    places, structure = optree.tree_flatten(template)
    if places != [*range(len(columns))] or len({len(column) for column in columns}) != 1:
        raise ValueError("the columns of a log of trees do not fit together.")
    return Trees(structure, tuple(columns))
