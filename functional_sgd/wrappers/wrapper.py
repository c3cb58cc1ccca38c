"""What the wrappers have in common: an optimizer inside, hypers of their own, and a few things done
to trees.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from functional_sgd.call import check_like
from functional_sgd.chaining import Optimizer
from functional_sgd.hyper import Scalar, scalar
from functional_sgd.rule import COUNTER
from functional_sgd.state import State, working_dtype
from functional_sgd.tracing import known
from functional_sgd.tree import Spec, Tree, flatten, flatten_like, unflatten
from functional_sgd.wiring import did_you_mean

INNER = "inner"
"""The entry of a wrapper's state that is the state of its optimizer."""


@dataclass(frozen=True)
class Wrapper:
    """An optimizer around another one. Its state is {"step": calls so far, ..., "inner": the
    other's state}.

    A subclass defines `init` and `__call__`. Its fields are `opt` and numbers; those named in
    `own_hypers` are hypers, with the fields as their defaults.
    """

    opt: Optimizer

    name: ClassVar[str] = "wrapper"
    own_hypers: ClassVar[tuple[str, ...]] = ()
    needs_old: ClassVar[bool] = (
        False  # whether it reads params and state again after its optimizer has run
    )

    def __post_init__(self) -> None:
        check_optimizer(self.name, self.opt)
        if self.needs_old and spends(self.opt):
            raise ValueError(
                f"{self.name}: needs params and state as they were, but {self.opt!r} overwrites "
                f"them. "
                f"Fuse it without donate."
            )
        for name in self.own_hypers:
            if name in names_of(self.opt):
                raise ValueError(
                    f"{self.name}: has a hyper {name!r}, and so has {self.opt!r}. One must go."
                )

    @property
    def hyper(self) -> dict[str, Any]:
        """The hypers and their defaults: those of the optimizer inside, and the wrapper's own."""
        return {**self.opt.hyper, **{name: getattr(self, name) for name in self.own_hypers}}

    @property
    def required(self) -> tuple[str, ...]:
        """The hypers and extras that have no default."""
        return required_of(self.opt)

    @property
    def names(self) -> frozenset[str]:
        """Every hyper and extra that is understood."""
        return names_of(self.opt) | {*self.own_hypers}

    @property
    def donate(self) -> bool:
        """Whether the trees that are passed in are overwritten."""
        return spends(self.opt)

    def map_inner(self, function: Callable[[Optimizer], Optimizer]) -> Self:
        """The same wrapper around function(its optimizer)."""
        return replace(self, opt=function(self.opt))

    def __repr__(self) -> str:
        numbers = [
            f"{own.name}={getattr(self, own.name)!r}" for own in fields(self) if own.name != "opt"
        ]
        return f"{self.name}({', '.join([repr(self.opt), *numbers])})"

    def take_own(
        self, hyper: Mapping[str, Any] | None, extras: Mapping[str, Any]
    ) -> tuple[dict[str, Scalar], dict[str, Any], dict[str, Any]]:
        """(the values of the wrapper's own hypers, the other hypers, the other extras)."""
        hyper = as_hyper(self.name, hyper, extras, self.names)
        given = {**{name: getattr(self, name) for name in self.own_hypers}, **hyper, **extras}
        own = {name: one_number(self.name, name, given[name]) for name in self.own_hypers}
        others = [
            {name: value for name, value in values.items() if name not in own}
            for values in (hyper, extras)
        ]
        return own, others[0], others[1]


def check_optimizer(who: str, opt: Any) -> None:
    """Raise TypeError unless this is an optimizer."""
    if isinstance(opt, type) or not isinstance(opt, Optimizer):
        raise TypeError(
            f"{who}: expected an optimizer such as adamw(), got {opt!r}. Call the recipe."
        )


def as_hyper(
    who: str, hyper: Mapping[str, Any] | None, extras: Mapping[str, Any], names: Iterable[str]
) -> Mapping[str, Any]:
    """The hypers of a call. Raises ValueError for a name that nobody reads, or that is also among
    the extras.
    """
    hyper = {} if hyper is None else hyper
    if not isinstance(hyper, Mapping):
        raise TypeError(
            f"{who}: hyper must be a dict such as dict(lr=0.1), got {type(hyper).__name__}."
        )
    for name in (*hyper, *extras):
        if name not in names:
            raise ValueError(f"{who}: no rule reads {name!r}. {did_you_mean(name, names)}")
        if name in hyper and name in extras:
            raise ValueError(
                f"{who}: {name!r} is given both in hyper and by keyword. Give it once."
            )
    return hyper


def one_number(who: str, name: str, value: Any) -> Scalar:
    """A hyper that is the same for all leaves, as `scalar` gives it. Raises ValueError for a tree."""
    if isinstance(value, (dict, list, tuple)):
        raise ValueError(
            f"{who}: {name!r} must be one number for all leaves, got {value!r}. "
            f"A partition can have a {who} for each part, with values of their own."
        )
    return scalar(who, name, value)


def required_of(opt: Optimizer) -> tuple[str, ...]:
    """The hypers and extras of an optimizer that have no default."""
    return tuple(getattr(opt, "required", ()))


def names_of(opt: Optimizer) -> frozenset[str]:
    """Every hyper and extra that an optimizer understands."""
    return frozenset(getattr(opt, "names", (*opt.hyper, *required_of(opt))))


def spends(opt: Optimizer) -> bool:
    """Whether an optimizer overwrites the trees that it is given."""
    return bool(getattr(opt, "donate", False))


def counter_like(state: State) -> Tensor:
    """A zero to count with, where the counter of this state is."""
    return torch.zeros_like(state[COUNTER])


def take_grads(
    who: str, params: Tree, grads: Tree
) -> tuple[list[Tensor], list[Tensor | None], Spec]:
    """(leaves of params, their gradients or None, how to rebuild a tree). Raises ValueError if they
    do not fit.
    """
    leaves, spec = flatten(params)
    given = flatten_like(spec, grads, params, who, "grads")
    check_like(
        who, "the gradient", params, leaves, given, "Were the gradients taken of other params?"
    )
    return leaves, given, spec


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
        return unflatten(spec, chosen if found else others)
    return unflatten(
        spec,
        [choose_leaf(condition, one, other) for one, other in zip(chosen, others, strict=True)],
    )


def choose_leaf(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """`choose` for one tensor, without a branch."""
    return yes if yes is no else torch.where(condition.to(yes.device), yes, no)


def towards(old: Tensor, new: Tensor, share: float | Tensor) -> Tensor:
    """old + share * (new - old): exactly `new` for share 1, exactly `old` where both are equal."""
    if old.is_complex():
        return torch.view_as_complex(
            towards(torch.view_as_real(old), torch.view_as_real(new), share)
        )
    weight = share.to(old.device, old.dtype) if isinstance(share, Tensor) else share
    return torch.lerp(old, new.to(old.dtype), weight)
