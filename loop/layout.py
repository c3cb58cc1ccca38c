"""Tensors in pieces: where each rank's lies, how pieces become whole and whole tensors pieces.

What a step does with pieces is in functional_sgd.sharded. These two files alone know DTensor.
"""

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from functional_sgd.sharded import distributed

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def processes(value: Any) -> frozenset[int]:
    """The processes that have a piece of a DTensor, this one among them, by their numbers."""
    return _on_mesh(value.device_mesh)


# Asked for every gradient of every batch, and a mesh never changes.
@functools.lru_cache(maxsize=32)
def _on_mesh(mesh: "DeviceMesh") -> frozenset[int]:
    return frozenset(mesh.mesh.flatten().tolist())


class Box(NamedTuple):
    """Where a piece lies in its tensor."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """The piece, as indices of the tensor."""
        pairs = zip(self.start, self.shape, strict=True)
        return tuple(slice(at, at + size) for at, size in pairs)


def box_of(tensor: Any) -> Box:
    """What this rank holds of a DTensor."""
    # Imported where it is needed, here and below, since some builds of torch are without it.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, start = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return Box(tuple(start), tuple(shape))


def is_first(tensor: Any) -> bool:
    """Whether this rank is the first of those that hold the same piece."""
    at = tensor.device_mesh.get_coordinate()
    pairs = zip(tensor.placements, at, strict=True)
    return all(place == 0 or not placement.is_replicate() for placement, place in pairs)


def in_rows(value: Tensor, mesh: "DeviceMesh") -> Tensor:
    """A tensor that all ranks have, its first axis cut over the last dimension of the mesh."""
    if distributed(value):
        return value
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    last = Shard(0) if value.dim() else Replicate()
    placements = [*[Replicate()] * (mesh.ndim - 1), last]
    # src_data_rank=None: each rank cuts what it has; by default rank 0 sends all others their part.
    cut: Tensor = distribute_tensor(value.detach(), mesh, placements, src_data_rank=None)
    return cut


def cut_like(value: Tensor, target: Any) -> Tensor:
    """A tensor that all ranks have, cut as the target is."""
    # A copy, for a view would keep the whole tensor in memory.
    return laid_out(value.detach()[box_of(target).slices].clone(), target)


def laid_out(piece: Tensor, target: Any) -> Tensor:
    """This rank's piece as a DTensor that lies like the target."""
    from torch.distributed.tensor import DTensor

    # Without shape and stride, torch takes all pieces to be of one size.
    found: Tensor = DTensor.from_local(
        piece.to(target.device),
        target.device_mesh,
        target.placements,
        run_check=False,
        shape=target.shape,
        stride=target.stride(),
    )
    return found


def in_place(piece: Tensor, target: Tensor) -> Tensor:
    """This rank's piece of what lies as the target does; a plain tensor is whole."""
    return laid_out(piece, target) if distributed(target) else piece


def gathered(piece: Tensor) -> Tensor:
    """All of a tensor, on every rank; its derivative is the sum over ranks, cut as the piece is."""
    whole: Tensor = _Gathered.apply(piece)
    return whole


def any_rank(flag: bool, like: Any) -> bool:
    """Whether this is so on any of the ranks that have pieces of a tensor."""
    import torch.distributed as dist

    found = torch.tensor(float(flag), device=like.device)
    # A mesh has a group for each dimension and none for all processes: so the maximum of maxima.
    for dimension in range(like.device_mesh.ndim):
        group = like.device_mesh.get_group(dimension)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return bool(found)


class _Gathered(torch.autograd.Function):
    """Gathers; backwards, reduces and scatters."""

    @staticmethod
    def forward(ctx: Any, piece: Any) -> Tensor:
        from torch.distributed.tensor import Replicate

        ctx.mesh, ctx.placements = piece.device_mesh, piece.placements
        whole: Tensor = piece.redistribute(placements=[Replicate()] * ctx.mesh.ndim).to_local()
        # Of a replicated tensor it is the piece itself, and an output must be another tensor.
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Partial

        parts = [Partial("sum")] * ctx.mesh.ndim
        summed = DTensor.from_local(grads[0].contiguous(), ctx.mesh, parts, run_check=False)
        return summed.redistribute(placements=ctx.placements)
