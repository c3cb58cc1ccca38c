"""Rules that condition the gradient before anything else reads it."""

import optree
import torch
from torch import Tensor

from functional_sgd.rule import elementwise, leafwise, treewise
from functional_sgd.tree import Tree


@elementwise
def clip_value(grad: Tensor, *, max_value: float = 1.0) -> dict[str, Tensor]:
    """Cut every element of the gradient to [-max_value, max_value]; max_value > 0.

    Source: torch.nn.utils.clip_grad_value_.

    >>> clip_value(torch.tensor([-3.0, 0.5]), max_value=1.0)
    {'grad': tensor([-1.0000,  0.5000])}
    """
    return dict(grad=grad.clamp(-max_value, max_value))


@treewise
def clip_norm(grad: Tree, *, max_norm: float = 1.0) -> dict[str, Tree]:
    """Shorten the whole gradient, all leaves together, to length max_norm > 0 if it is longer.

    grad = grad * min(1, max_norm / (norm + 1e-6));  norm = sqrt(sum of all squares)

    Reads the tree of gradients; leaves without a gradient do not count. Source: Pascanu et al.
    2013, with torch.nn.utils.clip_grad_norm_'s 1e-6.

    >>> clip_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, max_norm=2.5)
    {'grad': {'a': tensor([1.5000]), 'b': tensor([2.0000])}}
    """
    scale = (max_norm / (global_norm(grad) + 1e-6)).clamp(max=1.0)
    return dict(grad=optree.tree_map(lambda leaf: leaf * scale.to(leaf.device, leaf.dtype), grad))


def global_norm(tree: Tree) -> Tensor:
    """The length of all leaves taken as one vector (0-d); its derivative at zero is zero."""
    norms: list[Tensor] = [torch.linalg.vector_norm(leaf) for leaf in optree.tree_leaves(tree)]
    length: Tensor = torch.linalg.vector_norm(
        torch.stack([norm.to(norms[0].device) for norm in norms])
    )
    return length


@leafwise
def centralize(grad: Tensor) -> dict[str, Tensor]:
    """Subtract from the gradient of every output unit its mean; vectors and scalars stay as they
    are.

    grad = grad - mean over all axes but the first, for leaves of 2 or more axes (torch's layout:
    outputs first)

    Source: gradient centralization (Yong et al. 2020).

    >>> centralize(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))
    {'grad': tensor([[-1.,  1.],
            [ 0.,  0.]])}
    """
    if grad.dim() < 2:
        return dict(grad=grad)
    return dict(grad=grad - grad.mean(dim=tuple(range(1, grad.dim())), keepdim=True))
