"""Skip a step whose gradient is not finite."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from functional_sgd.chaining import Optimizer
from functional_sgd.rule import COUNTER
from functional_sgd.state import State, check_state
from functional_sgd.tracing import known
from functional_sgd.tree import Tree, unflatten
from functional_sgd.wrappers.wrapper import (
    INNER,
    Wrapper,
    as_hyper,
    choose,
    choose_leaf,
    counter_like,
    take_grads,
)


@dataclass(frozen=True, repr=False)
class SkipNonfinite(Wrapper):
    """An optimizer that does not act on gradients with NaN or infinity; `skip_nonfinite` makes one."""

    name: ClassVar[str] = "skip_nonfinite"
    needs_old: ClassVar[bool] = True

    def init(self, params: Tree) -> State:
        """A fresh state: nothing has been skipped."""
        inner = self.opt.init(params)
        return {COUNTER: counter_like(inner), "skipped": counter_like(inner), INNER: inner}

    def __call__(
        self,
        params: Tree,
        grads: Tree,
        state: State,
        hyper: Mapping[str, Any] | None = None,
        **extras: Any,
    ) -> tuple[Tree, State]:
        """One step, or none: (params, new state)."""
        check_state(self.name, state, ("skipped", INNER))
        hyper = as_hyper(self.name, hyper, extras, self.names)
        _, given, spec = take_grads(self.name, params, grads)
        finite = all_finite(given, like=state["skipped"])
        # The step is taken along zeros when it is skipped, so that derivatives through it are
        # finite as well.
        safe = given
        if not known(finite, lambda: given):
            safe = [
                None if grad is None else choose_leaf(finite, grad, torch.zeros_like(grad))
                for grad in given
            ]
        moved, inner = self.opt(params, unflatten(spec, safe), state[INNER], hyper, **extras)
        return choose(finite, moved, params), {
            COUNTER: state[COUNTER] + 1,
            "skipped": state["skipped"] + (~finite).to(torch.int64),
            INNER: choose(finite, inner, state[INNER]),
        }


def skip_nonfinite(opt: Optimizer) -> SkipNonfinite:
    """The optimizer, leaving everything as it is when any element of the gradient is NaN or
    infinite.

    In such a call params and the state inside keep their bits, and `state["skipped"]` counts one
    more; `state["step"]` counts all calls. Nothing branches on numbers: it compiles, and in an
    ensemble under vmap each member skips for itself. Raises ValueError if `opt` overwrites its
    arguments.

    >>> import torch
    >>> from functional_sgd import sgd
    >>> opt, params = skip_nonfinite(sgd(lr=1.0)), torch.tensor([5.0])
    >>> params, state = opt(params, torch.tensor([float("nan")]), opt.init(params))
    >>> params, state
    (tensor([5.]), {'step': tensor(1), 'skipped': tensor(1), 'inner': {'step': tensor(0)}})
    """
    return SkipNonfinite(opt)


def all_finite(leaves: list[Tensor | None], like: Tensor) -> Tensor:
    """Whether every element of every leaf is finite: a 0-d bool, where `like` is."""
    each = [torch.isfinite(leaf).all().to(like.device) for leaf in leaves if leaf is not None]
    return torch.stack(each).all() if each else torch.ones_like(like, dtype=torch.bool)
