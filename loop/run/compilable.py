"""What cannot be part of a compiled batch, found out before there is one."""

from collections.abc import Sequence

from loop.learner import Learner


def check_optimizer_compilable(learner: Learner) -> None:
    """Raise ValueError for an optimizer that needs more of a batch than a graph of it gives."""
    opt = learner.opt
    asked = [name for name in ("value", "value_fn") if name in opt.names]
    if opt.perturbs or asked:
        why = "takes the gradient a second time" if opt.perturbs else f"reads {asked[0]!r}"
        raise ValueError(
            f"fit(compile=True): {opt!r} {why}, which a compiled batch does not have. "
            f"Fit without compile=True."
        )


def check_compilable(callbacks: Sequence[object]) -> None:
    """Raise ValueError for callbacks that cannot act on a compiled batch."""
    for callback in callbacks:
        if getattr(callback, "eager", False):
            raise ValueError(
                f"fit(compile=True): {callback!r} must see the layers of the model at work, or "
                f"changes them, which a "
                f"compiled batch does not notice. Leave it out, or fit without compile=True."
            )
