"""Accumulate: gather gradients over several calls, and step along their mean."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from functional_sgd.chaining import Optimizer
from functional_sgd.rule import COUNTER
from functional_sgd.state import State, check_state
from functional_sgd.tracing import known
from functional_sgd.tree import Tree, flatten, flatten_like, unflatten
from functional_sgd.wrappers.wrapper import (
    INNER,
    Wrapper,
    choose,
    choose_leaf,
    counter_like,
    take_grads,
    wide,
)


@dataclass(frozen=True, repr=False)
class Accumulate(Wrapper):
    """An optimizer that acts on every k-th call; `accumulate` makes one."""

    every: int = 1

    name: ClassVar[str] = "accumulate"
    own_hypers: ClassVar[tuple[str, ...]] = ("every",)
    needs_old: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise ValueError(
                f"accumulate: every must be at least 1, got {self.every!r}. Use 1 to act on every "
                f"call."
            )

    def init(self, params: Tree) -> State:
        """A fresh state: nothing is gathered, and the optimizer inside has not acted."""
        inner = self.opt.init(params)
        leaves, spec = flatten(params)
        sums = unflatten(spec, [torch.zeros_like(wide(leaf)) for leaf in leaves])
        return {
            COUNTER: counter_like(inner),
            "gathered": counter_like(inner),
            "grad_sum": sums,
            INNER: inner,
        }

    def __call__(
        self,
        params: Tree,
        grads: Tree,
        state: State,
        hyper: Mapping[str, Any] | None = None,
        **extras: Any,
    ) -> tuple[Tree, State]:
        """One call: (params, new state), with new params if it is the k-th."""
        check_state(self.name, state, ("gathered", "grad_sum", INNER))
        own, others, extras = self.take_own(hyper, extras)
        leaves, given, spec = take_grads(self.name, params, grads)
        old = flatten_like(spec, state["grad_sum"], params, self.name, "state['grad_sum']")
        sums = [
            before if grad is None else before + grad.to(before.dtype)
            for before, grad in zip(old, given, strict=True)
        ]
        gathered = state["gathered"] + 1
        act = gathered >= own["every"]
        if (
            known(act, lambda: (*leaves, *given, *flatten(others)[0])) is False
        ):  # the optimizer need not be asked
            return unflatten(spec, leaves), {
                COUNTER: state[COUNTER] + 1,
                "gathered": gathered,
                "grad_sum": unflatten(spec, sums),
                INNER: choose(act, state[INNER], state[INNER]),
            }
        means = [
            None if grad is None else total / gathered
            for total, grad in zip(sums, given, strict=True)
        ]
        moved, inner = self.opt(params, unflatten(spec, means), state[INNER], others, **extras)
        kept = [
            total if grad is None else choose_leaf(act, torch.zeros_like(total), total)
            for total, grad in zip(sums, given, strict=True)
        ]
        return choose(act, moved, params), {
            COUNTER: state[COUNTER] + 1,
            "gathered": torch.where(act, 0, gathered),
            "grad_sum": unflatten(spec, kept),
            INNER: choose(act, inner, state[INNER]),
        }


def accumulate(opt: Optimizer, every: int) -> Accumulate:
    """The optimizer, acting on every `every`-th call, along the mean of the gradients since it last
    acted.

    mean = (g_1 + g_2 + ... + g_every) / every, summed in that order (in float32 for half-precision
    parameters)

    On the other calls params come back with the same bits and the state inside stays. A larger
    batch in pieces of equal size: for losses that are means, `every` pieces give what one step on
    all of it gives. `every` is a hyper, so it can be changed at a call or scheduled. Nothing
    branches on numbers, so it compiles and can be mapped over; the step inside is computed on every
    call. A leaf whose gradient is None in the call that acts is left alone, and what it has
    gathered waits for the next one.

    Raises ValueError if every < 1, or if `opt` overwrites its arguments.

    >>> import torch
    >>> from functional_sgd import sgd
    >>> opt, params = accumulate(sgd(lr=1.0), every=2), torch.tensor([5.0])
    >>> params, state = opt(params, torch.tensor([1.0]), opt.init(params))
    >>> params, state = opt(params, torch.tensor([3.0]), state)
    >>> params, state["step"], state["inner"]["step"]
    (tensor([3.]), tensor(2), tensor(1))
    """
    return Accumulate(opt, every)
