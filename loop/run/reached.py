"""Parameters that a loss reaches by another way than through the model, and that no run trains."""

import warnings
from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.autograd.graph import Node

from functional_sgd.placing import Placed


def check_reached(loss: Tensor, placed: Placed, tracked: Mapping[str, Tensor]) -> None:
    """Look once where the graph of a loss ends, before its gradient is taken.

    Raises ValueError if that is a parameter of the model itself, which has been replaced by that of
    the state for this batch; warns of parameters that are not the model's.
    """
    ours = set(map(id, tracked.values()))
    own = {id(value): place[2] for place, value in zip(placed.places, placed.found, strict=True)}
    stale: set[str] = set()
    others: list[Tensor] = []
    reaches_ours = False
    for leaf in _leaves(loss):
        if id(leaf) in ours:
            reaches_ours = True
        elif id(leaf) in own:
            stale.add(own[id(leaf)])
        elif isinstance(leaf, nn.Parameter):
            others.append(leaf)
    if stale:
        raise ValueError(
            f"Learner: the loss reaches {', '.join(map(repr, sorted(stale)))} of the "
            f"{type(placed.module).__name__} as before the run, by a list or an attribute that "
            f"was made then, so its derivative is lost. Look parameters up in the forward pass or "
            f"in the loss itself: model.parameters()."
        )
    # A loss that depends on nothing of the model is an error, once there are no gradients.
    if others and reaches_ours:
        shapes = ", ".join(f"{tuple(leaf.shape)}" for leaf in others)
        warnings.warn(
            f"Learner: the loss depends on parameters that are not those of the "
            f"{type(placed.module).__name__}, of the shapes {shapes}, so they are not trained. Put "
            f"the module that has them (a loss, say) into the model; or detach them.",
            stacklevel=2,
        )


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """The tensors without a past that a loss was computed from, as far as they are tracked."""
    waiting: list[Node | None] = [loss.grad_fn]
    seen: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield leaf
        waiting.extend(before for before, _ in node.next_functions)
