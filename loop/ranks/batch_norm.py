"""BatchNorm that sees the batches of all ranks."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from loop.metrics.tally import widened
from loop.ranks.group import Group, group_of


def global_batch_norm(model: nn.Module, mesh: Any = None) -> nn.Module:
    """A copy of the model whose BatchNorm layers normalise by the batches of all ranks, for
    `parallel`. Parameters and buffers have the names and the values that they had.

    `mesh` is that of `parallel`. Mean and variance take an all-reduce each, forwards and backwards,
    on any device. So a part of one sample, or of none, is no error. Evaluation takes the running
    statistics, as ever; layers without (track_running_stats=False) take those of the batch of all
    ranks then too, so all ranks must call the model.

    Raises ValueError for a layer with a forward pass of its own, or with a parametrization; and
    what `parallel` raises for the mesh.
    """
    group = group_of("global_batch_norm", mesh)
    own = copy.deepcopy(model)
    for name, layer in own.named_modules():
        if isinstance(layer, _BatchNorm):
            _check_forward(name, layer)
            # Its class, and nothing else: it keeps its hooks, and all the places where it is.
            layer.__class__ = GlobalBatchNorm
            vars(layer)["group"] = group
    return own


class GlobalBatchNorm(_BatchNorm):
    """A BatchNorm layer of any number of dimensions; `global_batch_norm` makes it."""

    group: Group
    alone = False  # whether every rank has whole batches already

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; in training, or without running statistics, by mean and variance over all
        ranks.
        """
        if self.alone or (not self.training and self.running_mean is not None):
            return super().forward(x)
        axes = [axis for axis in range(x.dim()) if axis != 1]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        # Sums over a batch are too coarse in half precision.
        wide = widened(x)
        length = wide.new_tensor([x.numel() / max(x.shape[1], 1)])
        # The number of values, which may differ between ranks, travels with the sums.
        sums = _Sum.apply(torch.cat([wide.sum(axes), length]), self.group)
        mean, count = sums[:-1] / sums[-1], sums[-1].detach()
        # In two steps: the mean of squares minus the square of the mean loses digits.
        centered = wide - mean.view(shape)
        variance = _Sum.apply(centered.square().sum(axes), self.group) / count
        if self.running_mean is not None:
            # Unbiased, as torch's running variance is; the clamp is for a batch of one sample.
            self._follow(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
        normal = centered * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        result: Tensor = normal.to(x.dtype)
        return result

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"GlobalBatchNorm: expected (N, C, ...), got {tuple(input.shape)}.")

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics; without momentum they are the means of all batches."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share: Any = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        for running, now in ((self.running_mean, mean), (self.running_var, variance)):
            running.copy_((1 - share) * running + share * now)


class _Sum(torch.autograd.Function):
    """A sum over ranks; what reaches it from behind is summed, too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        """The sum."""
        ctx.group = group
        return group.sums([tensor])[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The sum of the derivatives."""
        return ctx.group.sums([grad.contiguous()])[0], None


def _check_forward(name: str, layer: _BatchNorm) -> None:
    """Raise ValueError for a layer that computes something else than torch's own do."""
    forward = type(layer).forward
    if is_parametrized(layer):
        has = "a parametrization"
    elif forward not in _KNOWN or "forward" in vars(layer):
        has = "a forward pass of its own"
    else:
        return
    raise ValueError(
        f"global_batch_norm: expected layers of torch.nn, such as BatchNorm1d; {name!r} of the "
        f"model, a {type(layer).__name__}, has {has}, which would be lost. Sum over the ranks in "
        f"it yourself, or give the model a layer of torch.nn in its place."
    )


_KNOWN = (_BatchNorm.forward, nn.SyncBatchNorm.forward, GlobalBatchNorm.forward)
