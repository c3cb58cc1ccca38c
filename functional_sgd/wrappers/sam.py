"""Sharpness-aware minimization: step along the gradient at the worst point nearby."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from functional_sgd.chaining import Optimizer
from functional_sgd.rules.clipping import global_norm
from functional_sgd.state import State
from functional_sgd.tree import Tree, unflatten
from functional_sgd.wrappers.wrapper import Wrapper, take_grads, wide


@dataclass(frozen=True, repr=False)
class Sam(Wrapper):
    """An optimizer for gradients that are taken at `perturb(params, grads)`; `sam` makes one."""

    rho: float = 0.05

    name: ClassVar[str] = "sam"
    own_hypers: ClassVar[tuple[str, ...]] = ("rho",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rho < 0:
            raise ValueError(f"sam: rho must be at least 0, got {self.rho!r}. 0.05 is usual.")

    def init(self, params: Tree) -> State:
        """A fresh state of the optimizer inside."""
        return self.opt.init(params)

    def perturb(self, params: Tree, grads: Tree, hyper: Mapping[str, Any] | None = None) -> Tree:
        """Where the loss is highest at distance rho, to first order: params + rho * grads / norm of
        all grads.

        Leaves without a gradient stay as they are.
        """
        own, _, _ = self.take_own(hyper, {})
        leaves, given, spec = take_grads(self.name, params, grads)
        there = [wide(grad) for grad in given if grad is not None]
        if not there:
            return params
        scale = own["rho"] / (global_norm(there) + 1e-12)
        moved = [
            leaf
            if grad is None
            else (wide(leaf) + scale.to(leaf.device, wide(grad).dtype) * wide(grad)).to(leaf.dtype)
            for leaf, grad in zip(leaves, given, strict=True)
        ]
        return unflatten(spec, moved)

    def __call__(
        self,
        params: Tree,
        grads: Tree,
        state: State,
        hyper: Mapping[str, Any] | None = None,
        **extras: Any,
    ) -> tuple[Tree, State]:
        """One step from params along gradients that were taken at the perturbed params: (new
        params, new state).
        """
        _, others, extras = self.take_own(hyper, extras)
        return self.opt(params, grads, state, others, **extras)


def sam(opt: Optimizer, rho: float = 0.05) -> Sam:
    """The optimizer, with a method that says where to take the gradient: `perturb(params, grads)`.

    perturb(params, grads) = params + rho * grads / (norm of all grads + 1e-12)

    An optimizer sees gradients, not the loss, so the second gradient is the caller's to take. The
    step itself is that of `opt`, from the params as they were. With rho = 0 it is the optimizer.
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
