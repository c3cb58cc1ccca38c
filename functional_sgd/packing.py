"""All leaves of a tree in one tensor for each dtype and device, and back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from functional_sgd.sharded import any_distributed
from functional_sgd.tree import Spec, Tree, flatten, flatten_like, unflatten


@dataclass(frozen=True, eq=False)
class Packing:
    """How the leaves of a tree lie in flat tensors: `packing(tree)` lays them there, `unpack(flat)`
    takes them out.

    >>> _, packing = pack([torch.zeros(2), torch.zeros(1)])
    >>> flat = {"float32": torch.tensor([1.0, 2.0, 3.0])}
    >>> packing([torch.ones(2), torch.tensor([3.0])]), packing.unpack(flat)
    ({'float32': tensor([1., 1., 3.])}, [tensor([1., 2.]), tensor([3.])])
    """

    example: Tree
    spec: Spec
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    groups: dict[str, tuple[int, ...]]  # the leaves in each flat tensor, in order

    def __call__(self, tree: Tree) -> dict[str, Tensor]:
        """A tree built like the one that was packed, as flat tensors. Raises ValueError for another
        tree.
        """
        leaves = flatten_like(self.spec, tree, self.example, "pack", "a tree")
        for leaf, shape, dtype in zip(leaves, self.shapes, self.dtypes, strict=True):
            if not isinstance(leaf, Tensor) or leaf.shape != shape:
                found = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
                raise ValueError(
                    f"pack: expected a leaf of shape {tuple(shape)}, got {found}. Was it another "
                    f"tree?"
                )
            if leaf.dtype != dtype:
                raise ValueError(
                    f"pack: expected a leaf of {dtype}, got {leaf.dtype}. Convert it, or pack the "
                    f"tree anew: flat tensors are named after their dtypes."
                )
        flat = {}
        for name, group in self.groups.items():
            flat[name] = torch.cat([leaves[index].reshape(-1) for index in group])
        return flat

    def unpack(self, flat: dict[str, Tensor]) -> Tree:
        """The tree, whose leaves are views of the flat tensors; differentiable, so gradients arrive
        flat.

        Raises ValueError if the flat tensors are not those of this packing.
        """
        if flat.keys() != self.groups.keys():
            raise ValueError(
                f"unpack: expected flat tensors {', '.join(self.groups)}, got "
                f"{', '.join(flat) or 'none'}."
            )
        leaves: list[Tensor | None] = [None] * len(self.shapes)
        for name, group in self.groups.items():
            sizes = [self.shapes[index].numel() for index in group]
            if flat[name].shape != (sum(sizes),):
                raise ValueError(
                    f"unpack: {name} must have {sum(sizes)} elements in one axis, got shape "
                    f"{tuple(flat[name].shape)}."
                )
            for index, piece in zip(group, flat[name].split_with_sizes(sizes), strict=True):
                leaves[index] = piece.view(self.shapes[index])
        return unflatten(self.spec, leaves)


def pack(params: Tree) -> tuple[dict[str, Tensor], Packing]:
    """All leaves in one tensor for each dtype and device: (flat, packing), with
    `packing.unpack(flat)` the tree again.

    flat is a tree like any other: an optimizer takes its step on a few long leaves instead of many
    short ones, and gradients by it arrive flat if the loss takes its leaves out:
    `value_and_grad(lambda flat, x: loss(packing.unpack(flat), x))`. Elementwise chains give the
    same numbers on flat as on the tree; leafwise rules (trust_ratio, centralize) would see other
    leaves, so they do not, and a hyper cannot differ by leaf. Nothing is shared with params.

    Raises TypeError if a leaf is not a tensor.

    >>> flat, packing = pack({"w": torch.ones(2, 2), "b": torch.zeros(1)})
    >>> flat
    {'float32': tensor([0., 1., 1., 1., 1.])}
    >>> packing.unpack(flat)["w"].shape
    torch.Size([2, 2])
    """
    leaves, spec = flatten(params)
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"pack: expected a tree of tensors, got a leaf of type {type(leaf).__name__}: "
                f"{leaf!r}."
            )
    if any_distributed(leaves):
        raise TypeError(
            "pack: expected plain tensors, got DTensors, of which each process would gather all. "
            "Pack their pieces, leaf.to_local(), or leave the tree as it is: fuse treats its "
            "leaves together."
        )
    one_device = len({leaf.device for leaf in leaves}) < 2
    groups: dict[str, tuple[int, ...]] = {}
    for index, leaf in enumerate(leaves):
        dtype = str(leaf.dtype).removeprefix("torch.")
        name = dtype if one_device else f"{dtype} on {leaf.device}"
        groups[name] = (*groups.get(name, ()), index)
    example = unflatten(spec, [0] * len(leaves))  # for messages; it keeps no tensor alive
    shapes = [leaf.shape for leaf in leaves]
    dtypes = [leaf.dtype for leaf in leaves]
    packing = Packing(example, spec, tuple(shapes), tuple(dtypes), groups)
    return packing(params), packing
