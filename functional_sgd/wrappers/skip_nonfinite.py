"""Skip a step whose gradient is not finite."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from functional_sgd.optimizer import Optimizer, check_names
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
    no_calls,
    take_grads,
)


@dataclass(frozen=True, repr=False)
class SkipNonfinite(Wrapper):
    """An optimizer that leaves out steps with NaN or infinity; `skip_nonfinite` makes one."""

    name: ClassVar[str] = "skip_nonfinite"
    needs_old: ClassVar[bool] = True

    def init(self, params: Tree) -> State:
        """A fresh state: nothing has been skipped."""
        inner = self.opt.init(params)
        return {CALLS: no_calls(params), "skipped": no_calls(params), INNER: inner}

    def __call__(
        self,
        params: Tree,
        grads: Tree,
        state: State,
        hyper: Mapping[str, Any] | None = None,
        **extras: Any,
    ) -> tuple[Tree, State]:
        """One step, or none: (params, new state)."""
        check_state(self.name, state, (CALLS, "skipped", INNER))
        hyper = check_names(self.name, hyper, extras, self.names)
        _, given, spec = take_grads(self.name, params, grads)
        finite = finite_everywhere(given, like=state["skipped"])
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
            CALLS: state[CALLS] + 1,
            "skipped": state["skipped"] + (~finite).to(torch.int64),
            INNER: choose(finite, inner, state[INNER]),
        }


def skip_nonfinite(opt: Optimizer) -> SkipNonfinite:
    """The optimizer, leaving everything as it is when a gradient has a NaN or an infinity.

    In such a call params and the state inside keep their bits, and `state["skipped"]` counts one
    more; `state["calls"]` counts all calls. Nothing branches on numbers: it compiles, and in an
    ensemble under vmap each member skips for itself. Raises ValueError if `opt` overwrites its
    arguments.

    >>> import torch
    >>> from functional_sgd import sgd
    >>> opt, params = skip_nonfinite(sgd(lr=1.0)), torch.tensor([5.0])
    >>> params, state = opt(params, torch.tensor([float("nan")]), opt.init(params))
    >>> params, state
    (tensor([5.]), {'calls': tensor(1), 'skipped': tensor(1), 'inner': {'step': tensor([0])}})
    """
    return SkipNonfinite(opt)


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
