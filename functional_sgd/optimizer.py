"""The contract of an optimizer: what every one can do, and what its caller must do for it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from functional_sgd.errors import did_you_mean
from functional_sgd.hyper import Hyper
from functional_sgd.state import State, extended
from functional_sgd.tree import Tree, keys_of


class Optimizer(ABC):
    """A pure function `(params, grads, state, hyper) -> (params, state)` that describes itself.

    A class of your own defines `hyper`, `init` and `__call__`, and overrides what differs from
    these defaults. Training loops, `fuse`, `to_torch` and wrappers rely on these members alone.

    >>> import optree, torch
    >>> class SignDescent(Optimizer):
    ...     hyper = {"lr": 0.5}
    ...
    ...     def init(self, params):
    ...         return {}
    ...
    ...     def __call__(self, params, grads, state, hyper=None, **extras):
    ...         lr = {**self.hyper, **(hyper or {}), **extras}["lr"]
    ...         return optree.tree_map(lambda p, g: p - lr * g.sign(), params, grads), state
    >>> opt, params = SignDescent(), torch.tensor([1.0])
    >>> opt(params, torch.tensor([3.0]), opt.init(params)), opt.names, opt.donates
    ((tensor([0.5000]), {}), frozenset({'lr'}), False)
    """

    @property
    @abstractmethod
    def hyper(self) -> dict[str, Hyper]:
        """The hypers and their defaults."""

    @abstractmethod
    def init(self, params: Tree) -> State:
        """A fresh state for these parameters, which shares nothing with them."""

    @abstractmethod
    def __call__(
        self,
        params: Tree,
        grads: Tree,
        state: State,
        hyper: Mapping[str, Hyper] | None = None,
        **extras: Any,
    ) -> tuple[Tree, State]:
        """One step: (new params, new state). The arguments are untouched, unless it `donates`."""

    def explain(self, params: Tree = None) -> None:
        """Print what a step runs: of a fused optimizer its passes (see `fuse`), of a wrapper what
        the optimizers inside run.
        """
        if not self.inner:
            print(f"{self!r}: rule by rule, with torch's operators; fuse(opt) makes kernels of it.")
        for opt in self.inner:
            opt.explain(params)

    def extend(self, state: State, before: Tree, params: Tree) -> State:
        """The state for more params: the leaves of `before` (by path) go on, the others begin."""
        return extended(state, self.init(params), keys_of(before), keys_of(params))

    vectors: ClassVar[frozenset[str]] = frozenset()
    """Entries of the state that are of the whole tree, even if as long as it has leaves."""

    # What it reads.

    @property
    def required(self) -> tuple[str, ...]:
        """The hypers, extras and columns without a default: the caller must pass them."""
        return ()

    @property
    def names(self) -> frozenset[str]:
        """Every hyper, extra and column that is understood.

        Two names have a meaning that loops know: `value`, the loss as a 0-d tensor, and `value_fn`,
        a function params -> loss.
        """
        return frozenset((*self.hyper, *self.required))

    # How it works.

    @property
    def donates(self) -> bool:
        """Whether it overwrites params and state, so that those passed in are spent."""
        return False

    @property
    def traceable(self) -> bool:
        """Whether it is made of torch operators that a compiler can follow."""
        return all(one.traceable for one in self.inner)

    @property
    def inner(self) -> tuple["Optimizer", ...]:
        """The optimizers inside."""
        return ()

    def with_inner(self, inner: tuple["Optimizer", ...]) -> Self:
        """The same around other optimizers, as many as `inner` has."""
        return self

    def release(self) -> None:
        """Let go of memory that is kept for the next step, such as a fused optimizer's."""
        for one in self.inner:
            one.release()

    # What its caller must do for it.

    @property
    def perturbs(self) -> bool:
        """Whether the gradient is to be taken somewhere else: at `perturb(params, grads, ...)`."""
        return any(one.perturbs for one in self.inner)

    def perturb(
        self, params: Tree, grads: Tree, state: State, hyper: Mapping[str, Hyper] | None = None
    ) -> Tree:
        """Where the gradient is to be taken, given the gradient at params."""
        return params

    @property
    def averages(self) -> bool:
        """Whether other params than those that are trained are to be evaluated and kept."""
        return any(one.averages for one in self.inner)

    def evaluated(self, params: Tree, state: State) -> Tree:
        """The params to evaluate and to keep."""
        return params


def check_optimizer(who: str, opt: Any) -> None:
    """Raise TypeError unless this is an optimizer."""
    if not isinstance(opt, Optimizer):
        raise TypeError(
            f"{who}: expected an optimizer such as adamw(), got {opt!r}. Call the recipe; a class "
            f"of your own inherits from functional_sgd.Optimizer."
        )


def check_names(
    who: str, hyper: Mapping[str, Hyper] | None, extras: Mapping[str, Any], names: frozenset[str]
) -> Mapping[str, Any]:
    """The hypers of a call.

    Raises ValueError for a name that nobody reads, or that is also among the extras.
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
