"""Rules as users write them, right and wrong, for the tests to put into chains."""

from typing import Any

import optree
import torch
from torch import Tensor

from functional_sgd import elementwise, leafwise, treewise

Columns = dict[str, Tensor]


@elementwise
def plain_step(param: Tensor, update: Tensor, *, lr: float) -> Columns:
    """sgd_step in the other spelling."""
    return dict(param=param + -lr * update)


@elementwise(last_grad=torch.zeros_like)
def add_last(grad: Tensor, last_grad: Tensor) -> Columns:
    """A slot that is given the very tensor that the caller passed."""
    return dict(update=grad + last_grad, last_grad=grad)


@elementwise(last_param=torch.clone)
def remember(param: Tensor, last_param: Tensor) -> Columns:
    """A slot that is given the param itself."""
    return dict(last_param=param)


@elementwise
def by_loss(update: Tensor, *, value: Tensor) -> Columns:
    """A rule that needs the loss."""
    return dict(update=update * value)


@elementwise
def maybe_by_loss(update: Tensor, *, value: Tensor | None = None) -> Columns:
    """A rule that uses the loss if it is given."""
    return dict(update=update if value is None else update * value)


@leafwise
def unit(update: Tensor) -> Columns:
    """Length one."""
    return dict(update=update / update.norm())


@treewise
def scale_tree(grad: Any, *, factor: float = 1.0) -> dict[str, Any]:
    """A rule of the whole tree with a hyper."""
    return dict(grad=optree.tree_map(lambda leaf: factor * leaf, grad))


@elementwise
def wants_curvature(update: Tensor, curvature: Tensor) -> Columns:
    """A rule that reads what no rule writes: the caller gives it."""
    return dict(update=update / curvature)


@elementwise
def returns_none(update: Tensor) -> None:
    """Forgot the return."""


@elementwise
def returns_number(update: Tensor) -> dict[str, float]:
    """Not a tensor."""
    return dict(update=1.0)


@elementwise
def returns_sum(update: Tensor) -> Columns:
    """Not elementwise."""
    return dict(update=update.sum())


@elementwise
def returns_step(update: Tensor) -> Columns:
    """Writes the counter."""
    return dict(step=update)


@elementwise
def raises(update: Tensor) -> Columns:
    """Fails its trial run."""
    raise RuntimeError("no luck")


@elementwise(writes=("update",))
def picky(update: Tensor) -> Columns:
    """Cannot be tried on ones, so it says what it writes."""
    if bool((update == 1).all()):
        raise RuntimeError("not on ones")
    return dict(update=2 * update)


@elementwise(own=torch.zeros_like)
def never_writes(update: Tensor, own: Tensor) -> Columns:
    """Owns a slot that it does not write."""
    return dict(update=update + own)
