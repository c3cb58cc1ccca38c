"""Reductions: numbers made of columns, declared as the default of a rule's keyword."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from functional_sgd.collectives import IDENTITY
from functional_sgd.pairs import as_real
from functional_sgd.precision import widest
from functional_sgd.sharded import Shards, any_distributed, full, local, settled
from functional_sgd.tracing import followed

Over: TypeAlias = Literal["leaf", "tree"]
"""Whether each leaf has a number of its own, or all leaves with a gradient have one together."""

Combine: TypeAlias = Literal["sum", "max", "all"]
Finish: TypeAlias = Literal["none", "root", "mean"]


@dataclass(frozen=True)
class Reduction:
    """A number made of columns: an expression for each element, combined over a leaf or the tree.

    Made by `norm`, `total`, `mean`, `largest` and `all_finite`; used as the default of a keyword
    of a rule. Executors compute it before the rule runs: kernels in the pass over memory that has
    the columns at hand, sharded trees with one collective. Sums are accumulated in float64.

    >>> norm("grad", over="tree").columns, total(lambda grad, param: grad * param).columns
    (('grad',), ('grad', 'param'))
    """

    expression: Callable[..., Tensor]  # of the columns, by position; elementwise
    columns: tuple[str, ...]  # the rule's names for them
    combine: Combine
    finish: Finish
    over: Over

    def __post_init__(self) -> None:
        if self.over not in get_args(Over):
            raise ValueError(f"reduction: over must be 'leaf' or 'tree', got {self.over!r}.")

    def of_leaf(self, columns: Mapping[str, Tensor]) -> Tensor:
        """The part of one leaf: a 0-d float64 tensor, not finished yet."""
        # A float32 sum of ten million squares is off by 4e-4; in float64 the order does not matter.
        value = self.expression(*(_wide(columns[name]) for name in self.columns))
        # Twice: the expression may have made float32 again, of a constant or a comparison.
        value = _wide(value)
        if value.numel() == 0:
            return full(self.of_nothing(value))
        return full(self.whole(value))

    def of_nothing(self, like: Tensor) -> Tensor:
        """The part of a leaf without elements."""
        return like.new_full((), IDENTITY[self.combine])

    def together(self, parts: Sequence[Tensor]) -> Tensor:
        """The parts of several leaves as one, where the first of them is."""
        return self.whole(torch.stack([part.to(parts[0].device) for part in parts]))

    def whole(self, parts: Tensor) -> Tensor:
        """A vector of parts as one."""
        if self.combine == "sum":
            return parts.sum()
        return parts.amax() if self.combine == "max" else parts.amin()

    def finished(self, total: Tensor, count: int) -> Tensor:
        """The number itself, of a total over `count` elements."""
        if self.finish == "root":
            return root(total)
        # So the mean of a leaf without elements is 0, not NaN.
        return total / max(count, 1) if self.finish == "mean" else total

    def of(self, columns: Mapping[str, Tensor]) -> Tensor:
        """The number of one leaf on its own: what a rule gets when it is called as a function."""
        return self.finished(self.of_leaf(columns), columns[self.columns[0]].numel())


# These return a Reduction, but say Any: as defaults they stand where a tensor will be.


def norm(column: str, over: Over = "leaf") -> Any:
    """The Euclidean length of a column, of each leaf or (over="tree") of all leaves as one vector.

    Its derivative at length 0 is 0. Float64, whatever the dtype of the column.

    >>> norm("grad").of({"grad": torch.tensor([3.0, 4.0])})
    tensor(5., dtype=torch.float64)
    """
    return Reduction(_square, (column,), "sum", "root", over)


def total(expression: Callable[..., Tensor], over: Over = "leaf") -> Any:
    """The sum of an elementwise expression, whose parameters are columns of the rule.

    >>> dot = total(lambda grad, param: grad * param)
    >>> dot.of({"grad": torch.tensor([1.0, 2.0]), "param": torch.tensor([3.0, 4.0])})
    tensor(11., dtype=torch.float64)
    """
    return Reduction(expression, _parameters("total", expression), "sum", "none", over)


def mean(expression: Callable[..., Tensor], over: Over = "leaf") -> Any:
    """The mean of an elementwise expression, whose parameters are columns of the rule.

    >>> mean(lambda grad: grad.abs()).of({"grad": torch.tensor([1.0, -3.0])})
    tensor(2., dtype=torch.float64)
    """
    return Reduction(expression, _parameters("mean", expression), "sum", "mean", over)


def largest(expression: Callable[..., Tensor], over: Over = "leaf") -> Any:
    """The maximum of an elementwise expression, whose parameters are columns of the rule.

    >>> largest(lambda grad: grad.abs()).of({"grad": torch.tensor([1.0, -3.0])})
    tensor(3., dtype=torch.float64)
    """
    return Reduction(expression, _parameters("largest", expression), "max", "none", over)


def all_finite(column: str, over: Over = "tree") -> Any:
    """1 if no element of the column is NaN or infinite, else 0.

    >>> all_finite("grad").of({"grad": torch.tensor([1.0, float("nan")])})
    tensor(0., dtype=torch.float64)
    """
    return Reduction(_is_finite, (column,), "all", "none", over)


def global_norm(leaves: Sequence[Tensor]) -> Tensor:
    """The length of all leaves taken as one vector: 0-d, float64; its derivative at 0 is 0.

    >>> global_norm([torch.tensor([3.0]), torch.tensor([4.0])])
    tensor(5., dtype=torch.float64)
    """
    whole: Reduction = norm("leaf", over="tree")
    # On local pieces one collective serves all leaves; of_leaf would take one for each DTensor.
    shards = None
    if any_distributed(leaves) and not followed(leaves):
        leaves = list(map(settled, leaves))
        shards = Shards(leaves, {})
        leaves = list(map(local, leaves))
    real = list(map(as_real, leaves))
    parts = torch.stack([whole.of_leaf({"leaf": leaf}).to(real[0].device) for leaf in real])
    if shards is not None:
        shards.combine([parts[:, None]], [range(len(real))], ["sum"])
    return whole.finished(whole.whole(parts), 0)


def root(x: Tensor) -> Tensor:
    """sqrt(x) for x >= 0, with derivative 0 (not infinity) at 0: so zeros can be differentiated.

    >>> root(torch.tensor([0.0, 4.0]))
    tensor([0., 2.])
    """
    # Two `where`: the derivative of sqrt at 0 is infinite, and 0 * inf is NaN, chosen or not.
    zero = x == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())


def _wide(column: Tensor) -> Tensor:
    return column.to(widest(column.device))


# Functions with names, not lambdas: chains with these reductions can be pickled.
def _square(column: Tensor) -> Tensor:
    return column * column


def _is_finite(column: Tensor) -> Tensor:
    return torch.isfinite(column)


def _parameters(who: str, expression: Callable[..., Tensor]) -> tuple[str, ...]:
    if not callable(expression):
        raise TypeError(
            f"{who}: expected a function of columns, such as lambda grad: grad.abs(), "
            f"got {expression!r}."
        )
    names = tuple(inspect.signature(expression).parameters)
    if not names:
        raise TypeError(f"{who}: the expression must read at least one column, such as grad.")
    return names
