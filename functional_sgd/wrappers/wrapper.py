"""What the wrappers have in common: an optimizer inside, hypers of their own, and tree helpers."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from functional_sgd.call import check_like
from functional_sgd.hyper import Hyper, Scalar, scalar
from functional_sgd.optimizer import Optimizer, check_names, check_optimizer
from functional_sgd.pairs import as_real
from functional_sgd.ranges import Range, check_number
from functional_sgd.sharded import any_distributed, check_placed, placed
from functional_sgd.state import State, extended, new_calls, working_dtype
from functional_sgd.tracing import known
from functional_sgd.tree import Spec, Tree, flatten, flatten_like, keys_of, paths, unflatten

INNER = "inner"
"""The entry of a wrapper's state that is the state of its optimizer."""


class Given(NamedTuple):
    """What a wrapper is called with, apart from the trees."""

    own: dict[str, Scalar]  # the values of its own hypers
    hyper: dict[str, Any]  # the hypers of the optimizer inside
    extras: dict[str, Any]  # what else that one reads


class Slopes(NamedTuple):
    """Params and gradients, leaf by leaf."""

    leaves: list[Tensor]
    grads: list[Tensor | None]
    spec: Spec  # to rebuild a tree of either

    def dense(self) -> "Slopes":
        """The same for those who look at gradients, which may be sparse (of an embedding, say)."""
        grads: list[Tensor | None] = []
        for grad in self.grads:
            if grad is not None:
                grad = dense(grad)
            grads.append(grad)
        return self._replace(grads=grads)


@dataclass(frozen=True)
class Wrapper(Optimizer):
    """An optimizer around another one. Its state is {"calls": how many, ..., "inner": the other's}.

    A subclass defines `init` and `__call__`. Its fields are `opt` and numbers; those named in
    `own_hypers` are hypers, with the fields as their defaults and the values as their ranges.
    """

    opt: Optimizer

    name: ClassVar[str] = "wrapper"
    own_hypers: ClassVar[Mapping[str, Range]] = {}
    # Whether it reads params and state again after the inner step, which may have overwritten them.
    needs_old: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_optimizer(self.name, self.opt)
        if self.needs_old and self.opt.donates:
            raise ValueError(
                f"{self.name}: needs params and state as they were, but {self.opt!r} overwrites "
                f"them. Fuse it without donate."
            )
        for name, allowed in self.own_hypers.items():
            if name in self.opt.names:
                raise ValueError(
                    f"{self.name}: has a hyper {name!r}, and so has {self.opt!r}. One must go."
                )
            check_number(self.name, name, getattr(self, name), allowed)

    @property
    def hyper(self) -> dict[str, Hyper]:
        """The hypers and their defaults: those of the optimizer inside, and the wrapper's own."""
        own = {name: getattr(self, name) for name in self.own_hypers}
        return {**self.opt.hyper, **own}

    @property
    def required(self) -> tuple[str, ...]:
        """The hypers and extras that have no default."""
        return self.opt.required

    @property
    def names(self) -> frozenset[str]:
        """Every hyper and extra that is understood."""
        return self.opt.names | {*self.own_hypers}

    @property
    def donates(self) -> bool:
        """Whether the trees that are passed in are overwritten."""
        return self.opt.donates

    @property
    def inner(self) -> tuple[Optimizer, ...]:
        """The optimizer inside."""
        return (self.opt,)

    def with_inner(self, inner: tuple[Optimizer, ...]) -> Self:
        """The same wrapper around another optimizer."""
        (opt,) = inner
        return replace(self, opt=opt)

    def extend(self, state: State, before: Tree, params: Tree) -> State:
        """The state for more params."""
        own, fresh = dict(state), self.init(params)
        # The optimizer inside knows itself how its state grows.
        fresh.pop(INNER, None)
        inner = self.opt.extend(own.pop(INNER), self.inside(before), self.inside(params))
        return {**extended(own, fresh, keys_of(before), keys_of(params)), INNER: inner}

    def inside(self, params: Tree) -> Tree:
        """What the optimizer inside has in the place of params: mostly the params."""
        return params

    def perturb(
        self, params: Tree, grads: Tree, state: State, hyper: Mapping[str, Hyper] | None = None
    ) -> Tree:
        """Where the optimizer inside wants the gradient."""
        given = self.take_own(hyper, {})
        return self.opt.perturb(params, grads, state[INNER], given.hyper)

    def evaluated(self, params: Tree, state: State) -> Tree:
        """What the optimizer inside wants to be evaluated."""
        return self.opt.evaluated(params, state[INNER])

    def __repr__(self) -> str:
        numbers = []
        for own in fields(self):
            if own.name != "opt":
                numbers.append(f"{own.name}={getattr(self, own.name)!r}")
        return f"{self.name}({', '.join([repr(self.opt), *numbers])})"

    def take_own(self, hyper: Mapping[str, Hyper] | None, extras: Mapping[str, Any]) -> Given:
        """The wrapper's own hypers, apart from what the optimizer inside is to get."""
        hyper = check_names(self.name, hyper, extras, self.names)
        own: dict[str, Scalar] = {}
        others, other_extras = dict(hyper), dict(extras)
        for name, allowed in self.own_hypers.items():
            default = getattr(self, name)
            value = hyper.get(name, extras.get(name, default))
            check_number(self.name, name, value, allowed)
            own[name] = one_number(self.name, name, value)
            others.pop(name, None)
            other_extras.pop(name, None)
        return Given(own, others, other_extras)


def one_number(who: str, name: str, value: Hyper) -> Scalar:
    """A hyper that is the same for all leaves, as `scalar` gives it. Raises ValueError if not."""
    if isinstance(value, (dict, list, tuple)):
        raise ValueError(
            f"{who}: {name!r} must be one number for all leaves, got {value!r}. "
            f"A partition can have a {who} for each part, with values of their own."
        )
    return scalar(who, name, value)


def no_calls(params: Tree) -> Tensor:
    """The counter of a wrapper's state, before its first call."""
    return new_calls(flatten(params)[0])


def take_grads(who: str, params: Tree, grads: Tree) -> Slopes:
    """The leaves of params with their gradients. Raises ValueError if they do not fit."""
    leaves, spec = flatten(params)
    given = flatten_like(spec, grads, params, who, "grads")
    check_like(
        who, "the gradient", params, leaves, given, "Were the gradients taken of other params?"
    )
    if any_distributed((*leaves, *given)):
        check_placed(who, "its gradient", lambda: paths(params), leaves, given)
        # A gradient may be cut otherwise than its leaf, or be a sum that is still to be taken.
        for place, (leaf, grad) in enumerate(zip(leaves, given, strict=True)):
            if grad is not None:
                given[place] = placed(grad, leaf)
    return Slopes(leaves, given, spec)


def dense(grad: Tensor) -> Tensor:
    """A gradient that is sparse as the one that it stands for."""
    return grad if grad.layout is torch.strided else grad.to_dense()


def wide(leaf: Tensor) -> Tensor:
    """A leaf in the precision in which sums of it are kept: float32 if it is of half precision."""
    return leaf if leaf.is_complex() else leaf.to(working_dtype(leaf))


def choose(condition: Tensor, yes: Tree, no: Tree) -> Tree:
    """The tree `yes` if the condition (0-d) holds, else `no`; without a branch, unless the
    condition is known.
    """
    chosen, spec = flatten(yes)
    others: list[Any] = spec.flatten_up_to(no)
    found = known(condition, lambda: (*chosen, *others))
    if found is not None:
        taken = chosen if found else others
        return unflatten(spec, taken)
    pairs = zip(chosen, others, strict=True)
    return unflatten(spec, [choose_leaf(condition, one, other) for one, other in pairs])


def choose_leaf(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """`choose` for one tensor, without a branch."""
    return yes if yes is no else torch.where(condition.to(yes.device), yes, no)


def towards(old: Tensor, new: Tensor, share: float | Tensor) -> Tensor:
    """old + share * (new - old): exactly `new` for share 1, exactly `old` where both are equal."""
    if old.is_complex():
        return torch.view_as_complex(towards(as_real(old), as_real(new), share))
    weight = share.to(old.device, old.dtype) if isinstance(share, Tensor) else share
    return torch.lerp(old, new.to(old.dtype), weight)
