"""Compute in half precision: autocast around the forward pass, and a loss scale for float16."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from functional_sgd.outputs import map_output
from functional_sgd.precision import HALVES
from functional_sgd.sharded import distributed, full, local
from loop.callback import Callback, Order
from loop.layout import any_rank
from loop.metrics.tally import widened
from loop.run.signals import CancelStep
from loop.run.stages import device_of
from loop.state import State


@dataclass(frozen=True)
class MixedPrecision(Callback):
    """Run [predict] and [loss] under torch.autocast: half-precision matrix products, float32
    parameters and sums.

    `dtype` is bfloat16, which has the range of float32 and needs nothing more, or float16, whose
    small gradients would vanish. With float16 the gradients are computed of scale * loss and
    divided by the scale afterwards. The scale finds its own size, by the rules and defaults of
    torch.amp.GradScaler: a step whose gradient is not finite is skipped (parameters and optimizer
    state stay the same, bit for bit) and the scale is multiplied by `backoff_factor`; after
    `growth_interval` good steps in a row it is multiplied by `growth_factor`, unless that is
    infinite.

    Predictions in half precision are float32 from after_pred on. state.loss is never the scaled
    one. The scale and the count of good steps are in the state, so they go on from run to run; to
    know whether a gradient is finite, a float16 step waits for the device once. With
    GradientAccumulation the step of a window is checked, the scale is the same for all of its
    batches, and an overflow in any of them skips the step.

    Raises ValueError for another dtype or factors that do not fit it, and, when a float16 run
    starts, for float16 parameters; FloatingPointError when the scale has fallen below 1.2e-38, as
    it does if gradients are never finite. Source: Micikevicius et al. 2018.
    """

    dtype: torch.dtype = torch.bfloat16
    init_scale: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    order: ClassVar[int] = Order.UNSCALE
    traceable: ClassVar[tuple[str, ...]] = ("after_pred", "before_backward")

    def __post_init__(self) -> None:
        if self.dtype not in HALVES:
            raise ValueError(
                f"MixedPrecision: dtype must be torch.bfloat16 or torch.float16, got "
                f"{self.dtype!r}."
            )
        if not _SMALLEST <= self.init_scale <= _LARGEST:
            raise ValueError(
                f"MixedPrecision: init_scale must be a positive float32, got {self.init_scale!r}."
            )
        if not 1 < self.growth_factor < math.inf:
            raise ValueError(
                f"MixedPrecision: growth_factor must be above 1, got {self.growth_factor!r}."
            )
        if not 0 < self.backoff_factor < 1:
            raise ValueError(
                f"MixedPrecision: backoff_factor must be between 0 and 1, got "
                f"{self.backoff_factor!r}."
            )
        if self.growth_interval < 1:
            raise ValueError(
                f"MixedPrecision: growth_interval must be at least 1, got {self.growth_interval!r}."
            )

    @property
    def scales(self) -> bool:
        """Whether there is a loss scale."""
        return self.dtype == torch.float16

    def around_fit(self, state: State) -> AbstractContextManager["MixedPrecision"]:
        """Let other callbacks that take a step find this one among the resources."""
        return nullcontext(self)

    def around_predict(self, state: State) -> AbstractContextManager[object]:
        """The model's forward pass in mixed precision."""
        return torch.autocast(device_of(state).type, self.dtype)

    def around_loss(self, state: State) -> AbstractContextManager[object]:
        """The loss in mixed precision, in which autocast takes loss functions for float32."""
        return torch.autocast(device_of(state).type, self.dtype)

    def before_fit(self, state: State) -> State | None:
        """Check the parameters; put the scale where they are."""
        if not self.scales:
            return None
        for name, value in state.params.items():
            if value.dtype == torch.float16:
                raise ValueError(
                    f"MixedPrecision: params[{name!r}] is float16, too coarse to be updated. Keep "
                    f"the model in float32."
                )
        remembered = self.remembered(state)
        scale = remembered["scale"].to(device_of(state))
        return state.remember(self.name, {**remembered, "scale": scale})

    def after_pred(self, state: State) -> State:
        """Predictions as float32."""
        # Handlers run in the grad mode of fit's caller, but this conversion is part of the graph.
        with torch.set_grad_enabled(state.training):
            return state.replace(pred=map_output(_widened, state.pred))

    def before_backward(self, state: State) -> State | None:
        """The same loss, whose derivatives come out scaled."""
        if not self.scales or state.loss is None:
            return None
        with torch.enable_grad():
            return state.replace(loss=scaled_gradient(state.loss, self.remembered(state)["scale"]))

    def after_backward(self, state: State) -> State | None:
        """The gradients of the loss itself."""
        if not self.scales or state.grads is None:
            return None
        scale = self.remembered(state)["scale"]
        grads: dict[str, Tensor | None] = {}
        for name, grad in state.grads.items():
            grads[name] = None if grad is None else grad / scale
        return state.replace(grads=grads)

    def before_step(self, state: State) -> State:
        """Skip the step if the gradient is not finite; move the scale."""
        state, finite = self.checked(state)
        if not finite:
            raise CancelStep(state)
        return state

    def checked(self, state: State) -> tuple[State, bool]:
        """(the state with the next scale, whether its gradients are finite); with bfloat16, (the
        state, True).
        """
        if not self.scales:
            return state, True
        finite, before = all_finite(state.grads or {}), self.remembered(state)
        scale, good_steps = self.next_scale(before["scale"], before["good_steps"], finite)
        if not finite and float(scale) < _SMALLEST:
            raise FloatingPointError(
                f"{type(self).__name__}: the loss scale has fallen to {float(scale):.3g}, and "
                f"gradients are still not "
                f"finite, so it is not the range of float16 that they exceed. Look for NaN or "
                f"infinity in the data and "
                f"the loss (TerminateOnNaN), lower lr, or use dtype=torch.bfloat16."
            )
        return state.remember(self.name, {"scale": scale, "good_steps": good_steps}), finite

    def next_scale(self, scale: Tensor, good_steps: int, finite: bool) -> tuple[Tensor, int]:
        """(scale, good steps in a row) after one more step; the scale is a 0-d float32 tensor.

        >>> rules = MixedPrecision(torch.float16, growth_interval=2)
        >>> scale = torch.tensor(8.0)
        >>> rules.next_scale(scale, 1, finite=True), rules.next_scale(scale, 1, finite=False)
        ((tensor(16.), 0), (tensor(4.), 0))
        """
        if not finite:
            return scale * self.backoff_factor, 0
        if good_steps + 1 < self.growth_interval:
            return scale, good_steps + 1
        grown = scale * self.growth_factor
        return torch.where(grown.isfinite(), grown, scale), 0

    def remembered(self, state: State) -> Mapping[str, Any]:
        """{"scale": 0-d float32, "good_steps": int} in this state."""
        memory: Mapping[str, Any] | None = state.memory.get(self.name)
        if memory is None:
            scale = torch.tensor(self.init_scale, dtype=torch.float32)
            return {"scale": scale, "good_steps": 0}
        return memory


def scaled_gradient(value: Tensor, scale: Tensor | float) -> Tensor:
    """An equal tensor, through which derivatives pass multiplied by `scale`.

    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> y = scaled_gradient(x * x, torch.tensor(10.0))
    >>> y.item(), torch.autograd.grad(y, x)
    (9.0, (tensor(60.),))
    """
    result: Tensor = _ScaledGradient.apply(value, scale)
    return result


def all_finite(grads: Mapping[str, Tensor | None]) -> bool:
    """Whether no gradient has a NaN or an infinity; this waits for the device.

    >>> bad = torch.tensor([1.0, float("nan")])
    >>> all_finite({"a": torch.ones(2), "b": None}), all_finite({"a": bad})
    (True, False)
    """
    pieces: list[Tensor] = []
    meshes: dict[object, Tensor] = {}
    for grad in grads.values():
        if grad is None:
            continue
        # Terms of a sum may be finite where the sum is not.
        if distributed(grad) and any(one.is_partial() for one in grad.placements):
            grad = full(grad)
        if distributed(grad):
            meshes[grad.device_mesh] = grad
        pieces.append(local(grad))
    finite = _finite(pieces)
    for grad in meshes.values():
        finite = not any_rank(not finite, grad)
    return finite


def _finite(tensors: Sequence[Tensor]) -> bool:
    # torch raises an error for the infinity norm of an empty tensor, as a piece may be.
    leaves = [tensor for tensor in tensors if tensor.numel() > 0]
    if not leaves:
        return True
    # The largest absolute value of each leaf; NaN if it has one.
    largest = torch._foreach_norm(leaves, math.inf)
    return bool(torch.stack([value.to(leaves[0].device) for value in largest]).isfinite().all())


class _ScaledGradient(torch.autograd.Function):
    """The identity, whose derivative is `scale`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: Tensor | float) -> Tensor:
        """Equal, and another tensor."""
        ctx.scale = scale.to(value.dtype) if isinstance(scale, Tensor) else scale
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Scaled."""
        return grad * ctx.scale, None


def _widened(value: object) -> object:
    return widened(value) if isinstance(value, Tensor) else value


_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
