"""Skip a step whose gradient is not finite, or too long."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from functional_sgd.hyper import Hyper, Scalar
from functional_sgd.optimizer import Optimizer
from functional_sgd.ranges import Range
from functional_sgd.reduction import global_norm
from functional_sgd.sharded import Shards, any_distributed, full, local
from functional_sgd.state import State, check_state
from functional_sgd.tracing import known, recorded
from functional_sgd.tree import Tree, unflatten
from functional_sgd.wiring import CALLS
from functional_sgd.wrappers.wrapper import (
    INNER,
    Wrapper,
    choose,
    choose_leaf,
    dense,
    no_calls,
    take_grads,
)

IN_A_ROW = "in_a_row"
"""The entry of a state that counts the bad gradients since the last good one."""


@dataclass(frozen=True, repr=False)
class Skip(Wrapper):
    """An optimizer that leaves out steps along bad gradients; a subclass says which are good."""

    limit: int | None = None

    needs_old: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is not None and self.limit < 0:
            raise ValueError(f"{self.name}: limit must be at least 0, got {self.limit}.")

    def good(self, grads: list[Tensor | None], own: Mapping[str, Scalar], like: Tensor) -> Tensor:
        """Whether the step is to be taken: a 0-d bool, where `like` is."""
        raise NotImplementedError

    def init(self, params: Tree) -> State:
        """A fresh state: nothing has been skipped."""
        row = {} if self.limit is None else {IN_A_ROW: no_calls(params)}
        inner = self.opt.init(params)
        return {CALLS: no_calls(params), "skipped": no_calls(params), **row, INNER: inner}

    def __call__(
        self,
        params: Tree,
        grads: Tree,
        state: State,
        hyper: Mapping[str, Hyper] | None = None,
        **extras: Any,
    ) -> tuple[Tree, State]:
        """One step, or none: (params, new state)."""
        counts = ("skipped",) if self.limit is None else ("skipped", IN_A_ROW)
        check_state(self.name, state, (CALLS, *counts, INNER))
        own, others, extras = self.take_own(hyper, extras)
        slopes = take_grads(self.name, params, grads)
        given, spec = slopes.grads, slopes.spec
        taken = self.good(slopes.dense().grads, own, state["skipped"])
        row = {}
        if self.limit is not None:
            row[IN_A_ROW] = torch.where(taken, 0, state[IN_A_ROW] + 1)
            taken = taken | (row[IN_A_ROW] > self.limit)
        # The step is taken along zeros when it is skipped, so that derivatives through it are
        # finite as well.
        safe = given
        if not known(taken, lambda: given):
            safe = []
            for grad in given:
                if grad is None:
                    safe.append(None)
                else:
                    safe.append(_grad_or_zeros(taken, grad))
        moved, inner = self.opt(params, unflatten(spec, safe), state[INNER], others, **extras)
        return choose(taken, moved, params), {
            CALLS: state[CALLS] + 1,
            "skipped": state["skipped"] + (~taken).to(torch.int64),
            **row,
            INNER: choose(taken, inner, state[INNER]),
        }

    def __repr__(self) -> str:
        parts = [repr(self.opt)]
        parts += [f"{name}={getattr(self, name)!r}" for name in self.own_hypers]
        if self.limit is not None:
            parts.append(f"limit={self.limit}")
        return f"{self.name}({', '.join(parts)})"


@dataclass(frozen=True, repr=False)
class SkipNonfinite(Skip):
    """An optimizer that leaves out steps with NaN or infinity; `skip_nonfinite` makes one."""

    name: ClassVar[str] = "skip_nonfinite"

    def good(self, grads: list[Tensor | None], own: Mapping[str, Scalar], like: Tensor) -> Tensor:
        """Whether every gradient is finite."""
        return finite_everywhere(grads, like)


@dataclass(frozen=True, repr=False)
class SkipLarge(Skip):
    """An optimizer that leaves out steps along long gradients; `skip_large` makes one."""

    max_norm: float = 1.0

    name: ClassVar[str] = "skip_large"
    own_hypers: ClassVar[Mapping[str, Range]] = {"max_norm": Range(0, open_low=True)}

    def good(self, grads: list[Tensor | None], own: Mapping[str, Scalar], like: Tensor) -> Tensor:
        """Whether the gradients, taken as one vector, are shorter than max_norm."""
        present = [grad for grad in grads if grad is not None]
        if not present:
            return torch.ones_like(like, dtype=torch.bool)
        # NaN is not shorter than anything.
        return (global_norm(present) < own["max_norm"]).to(like.device)


def _grad_or_zeros(taken: Tensor, grad: Tensor) -> Tensor:
    """The gradient if the step is taken, else zeros."""
    if grad.layout is torch.sparse_coo:  # which names rows, that `lazy_rows` asks for
        whole = grad.coalesce()
        values = _grad_or_zeros(taken, whole.values())
        # Invariants are those of the gradient, and a check of them would wait for the device.
        return torch.sparse_coo_tensor(
            whole.indices(), values, grad.shape, is_coalesced=True, check_invariants=False
        )
    grad = dense(grad)
    return choose_leaf(taken, grad, torch.zeros_like(grad))


def skip_nonfinite(opt: Optimizer, limit: int | None = None) -> SkipNonfinite:
    """The optimizer, leaving everything as it is when a gradient has a NaN or an infinity.

    In such a call params and the state inside keep their bits, and `state["skipped"]` counts one
    more; `state["calls"]` counts all calls. Nothing branches on numbers: it compiles, and in an
    ensemble under vmap each member skips for itself.

    With a `limit` it gives up after so many bad gradients in a row (`state["in_a_row"]`) and takes
    every further step, NaN or not, until a gradient is finite again: so that a run that is lost is
    seen to be. Raises ValueError for a limit below 0, or if `opt` overwrites its arguments.
    Source: optax.apply_if_finite, whose max_consecutive_errors is limit.

    >>> import torch
    >>> from functional_sgd import sgd
    >>> opt, params = skip_nonfinite(sgd(lr=1.0)), torch.tensor([5.0])
    >>> params, state = opt(params, torch.tensor([float("nan")]), opt.init(params))
    >>> params, state
    (tensor([5.]), {'calls': tensor(1), 'skipped': tensor(1), 'inner': {'step': tensor([0])}})
    """
    return SkipNonfinite(opt, limit)


def skip_large(opt: Optimizer, max_norm: float = 1.0, limit: int | None = None) -> SkipLarge:
    """The optimizer, leaving everything as it is when the gradient is not shorter than max_norm.

    The length is that of all leaves together; NaN counts as too long. What is counted, and what
    `limit` does, is as in `skip_nonfinite`. `max_norm` > 0 is a hyper. Where every gradient is to
    count, but none too much, `clip_norm` shortens it instead.

    Raises ValueError as skip_nonfinite does, and for a max_norm that is not above 0.
    Source: optax.skip_large_updates, whose max_squared_norm is max_norm**2.

    >>> import torch
    >>> from functional_sgd import sgd
    >>> opt, params = skip_large(sgd(lr=1.0), max_norm=2.0), torch.tensor([5.0])
    >>> params, state = opt(params, torch.tensor([3.0]), opt.init(params))
    >>> params, state = opt(params, torch.tensor([1.0]), state)
    >>> params, state["skipped"]
    (tensor([4.]), tensor(1))
    """
    return SkipLarge(opt, limit, max_norm)


def finite_everywhere(leaves: list[Tensor | None], like: Tensor) -> Tensor:
    """Whether every element of every leaf is finite: a 0-d bool, where `like` is."""
    given = [leaf for leaf in leaves if leaf is not None]
    if not given:
        return torch.ones_like(like, dtype=torch.bool)
    if not any_distributed(given) or recorded():
        each = [full(torch.isfinite(leaf).all()).to(like.device) for leaf in given]
        return torch.stack(each).all()
    # A step is skipped by all processes or by none.
    flags = torch.stack([torch.isfinite(local(leaf)).all().to(like.device) for leaf in given])
    table = flags.to(torch.float64)[:, None]
    Shards(given, {}).combine([table], [range(len(given))], ["all"])
    return table.all()
