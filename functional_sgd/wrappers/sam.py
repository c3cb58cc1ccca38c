"""Sharpness-aware minimization: step along the gradient at the worst point nearby."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from functional_sgd.hyper import Hyper
from functional_sgd.optimizer import Optimizer
from functional_sgd.ranges import Range
from functional_sgd.reduction import global_norm
from functional_sgd.state import State
from functional_sgd.tree import Tree, unflatten
from functional_sgd.wrappers.wrapper import Wrapper, take_grads, wide


@dataclass(frozen=True, repr=False)
class Sam(Wrapper):
    """An optimizer for gradients that are taken at `perturb(params, grads)`; `sam` makes one.

    Its state is that of the optimizer inside.
    """

    rho: float = 0.05

    name: ClassVar[str] = "sam"
    own_hypers: ClassVar[Mapping[str, Range]] = {"rho": Range(0)}

    def init(self, params: Tree) -> State:
        """A fresh state of the optimizer inside."""
        return self.opt.init(params)

    def extend(self, state: State, before: Tree, params: Tree) -> State:
        """The state for more params."""
        return self.opt.extend(state, before, params)

    @property
    def perturbs(self) -> bool:
        """The gradient is to be taken at `perturb(params, grads)`."""
        return True

    def perturb(
        self,
        params: Tree,
        grads: Tree,
        state: State | None = None,
        hyper: Mapping[str, Hyper] | None = None,
    ) -> Tree:
        """Where the loss is highest at distance rho, to first order.

        params + rho * grads / (norm of all grads + 1e-12)

        Leaves without a gradient stay as they are. The state is not read.
        """
        own, _, _ = self.take_own(hyper, {})
        leaves, given, spec = take_grads(self.name, params, grads).dense()
        there = [grad for grad in given if grad is not None]
        if not there:
            return params
        scale = own["rho"] / (global_norm(there) + 1e-12)
        moved = []
        for leaf, grad in zip(leaves, given, strict=True):
            if grad is None:
                moved.append(leaf)
            else:
                slope = wide(grad)
                # A length is real, also for a complex leaf.
                size = scale.to(leaf.device, slope.real.dtype)
                moved.append((wide(leaf) + size * slope).to(leaf.dtype))
        return unflatten(spec, moved)

    def evaluated(self, params: Tree, state: State) -> Tree:
        """What the optimizer inside wants to be evaluated."""
        return self.opt.evaluated(params, state)

    def __call__(
        self,
        params: Tree,
        grads: Tree,
        state: State,
        hyper: Mapping[str, Hyper] | None = None,
        **extras: Any,
    ) -> tuple[Tree, State]:
        """One step from params along gradients taken at the perturbed params: (params, state)."""
        _, others, extras = self.take_own(hyper, extras)
        return self.opt(params, grads, state, others, **extras)


def sam(opt: Optimizer, rho: float = 0.05) -> Sam:
    """The optimizer, with a method that says where to take the gradient: `perturb(params, grads)`.

    perturb(params, grads) = params + rho * grads / (norm of all grads + 1e-12)

    An optimizer sees gradients, not the loss, so the second gradient is the caller's to take: `fit`
    and `compile_step` do, `to_torch` wants a closure. The step itself is that of `opt`, from the
    params as they were. With rho = 0 it is the optimizer.
    Raises ValueError if rho < 0. Source: Foret et al. 2021.

    >>> import torch
    >>> from functional_sgd import sgd, value_and_grad
    >>> compute = value_and_grad(lambda params: (params**4).sum() / 4)
    >>> opt, params = sam(sgd(lr=0.5), rho=1.0), torch.tensor([1.0])
    >>> state = opt.init(params)
    >>> loss, grads = compute(params)  # 1 at 1
    >>> _, grads = compute(opt.perturb(params, grads))  # 8 at 2
    >>> params, state = opt(params, grads, state)
    >>> params
    tensor([-3.])
    """
    return Sam(opt, rho)
