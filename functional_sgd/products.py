"""Products of matrices that are rounded alike one by one and in batches."""

from typing import Any

import torch
from torch import Tensor


def add_product(
    start: Tensor, one: Tensor, other: Tensor, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """beta * start + alpha * one @ other, of three matrices: `torch.addmm`, rounded once.

    Under torch.vmap it is `torch.baddbmm`, so every matrix of a batch is what it would be alone.
    There torch.addmm would be a product, a multiple and a sum, each of them rounded, and each a
    pass over memory.

    >>> two = 2 * torch.eye(2)
    >>> add_product(two, two, two, beta=0.5, alpha=3.0)
    tensor([[13.,  0.],
            [ 0., 13.]])
    """
    result: Tensor = _AddProduct.apply(start, one, other, beta, alpha)
    return result


class _AddProduct(torch.autograd.Function):
    """`add_product`, also of batches with one axis in front."""

    @staticmethod
    def forward(start: Tensor, one: Tensor, other: Tensor, beta: float, alpha: float) -> Tensor:
        add = torch.addmm if start.dim() == 2 else torch.baddbmm
        return add(start, one, other, beta=beta, alpha=alpha)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, one, other, ctx.beta, ctx.alpha = inputs
        ctx.save_for_backward(one, other)
        ctx.save_for_forward(one, other)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        one, other = ctx.saved_tensors
        scaled = ctx.alpha * grad
        return ctx.beta * grad, scaled @ other.mT, one.mT @ scaled, None, None

    @staticmethod
    def jvp(ctx: Any, start: Tensor, one: Tensor, other: Tensor, *rest: Any) -> Tensor:
        left, right = ctx.saved_tensors
        change: Tensor = ctx.beta * start + ctx.alpha * (one @ right + left @ other)
        return change

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, start: Tensor, one: Tensor, other: Tensor, *factors: float
    ) -> tuple[Tensor, int]:
        batches = []
        for matrix, axis in zip((start, one, other), in_dims[:3], strict=True):
            if axis is None:  # the same for the whole batch
                batches.append(matrix.expand(info.batch_size, *matrix.shape))
            else:
                batches.append(matrix.movedim(axis, 0))
        if start.dim() - (in_dims[0] is not None) == 2:
            return _AddProduct.apply(*batches, *factors), 0
        inner = batches[0].shape[:2]  # a batch of batches is a longer one
        made = _AddProduct.apply(*(batch.flatten(0, 1) for batch in batches), *factors)
        return made.unflatten(0, inner), 0
