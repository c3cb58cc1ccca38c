"""Change the gradients before the step."""

from dataclasses import dataclass
from typing import ClassVar

from functional_sgd import clip_norm
from functional_sgd.reduction import global_norm
from loop.callback import Callback, Order
from loop.state import State


@dataclass(frozen=True)
class GradientClip(Callback):
    """Shorten the whole gradient to length max_norm > 0 if it is longer: the rule `clip_norm`."""

    max_norm: float = 1.0
    order: ClassVar[int] = Order.CLIP
    traceable: ClassVar[tuple[str, ...]] = ("before_step",)

    def __post_init__(self) -> None:
        if not self.max_norm > 0:
            raise ValueError(f"GradientClip: max_norm must be above 0, got {self.max_norm}.")

    def before_step(self, state: State) -> State:
        """Clip. Parameters without a gradient do not count."""
        assert state.grads is not None
        length = global_norm([grad for grad in state.grads.values() if grad is not None])
        grads = dict(state.grads)
        for name, grad in state.grads.items():
            if grad is not None:
                clipped = clip_norm(grad, grad_norm=length, max_norm=self.max_norm)
                grads[name] = clipped["grad"]
        return state.replace(grads=grads)
