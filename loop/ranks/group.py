"""The processes of a run: what they add up, and what they tell each other."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from functional_sgd.sharded import distributed
from loop.layout import processes

Said = TypeVar("Said")


@dataclass(frozen=True, repr=False)
class Group:
    """The processes that share the batches of a run, and which of them this is."""

    handle: Any  # a torch.distributed.ProcessGroup
    rank: int
    size: int

    @property
    def members(self) -> frozenset[int]:
        """All of them, by their numbers among all processes."""
        import torch.distributed as dist

        return frozenset(dist.get_process_group_ranks(self.handle))

    def adds(self, param: Tensor) -> bool:
        """Whether gradients of this param are to be added up over the group.

        Those of one in pieces that lie on its processes are already, by the derivative of what
        gathers them.
        """
        return not distributed(param) or not self.members <= processes(param)

    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sum of each tensor over all ranks: one all-reduce for each dtype among them.

        The bits are the same on every rank. It can be traced.
        """
        # A rank may have none of a gradient, or other rows of it, where another's is sparse.
        tensors = [_dense(tensor) for tensor in tensors]
        found = list(tensors)
        places: dict[torch.dtype, list[int]] = {}
        for place, tensor in enumerate(tensors):
            places.setdefault(tensor.dtype, []).append(place)
        for chosen in places.values():
            flat = torch.cat([tensors[place].reshape(-1) for place in chosen])
            sizes = [tensors[place].numel() for place in chosen]
            pieces: Sequence[Tensor] = self._sum(flat).split(sizes)  # type: ignore[no-untyped-call]
            for place, piece in zip(chosen, pieces, strict=True):
                found[place] = piece.view(tensors[place].shape)
        return found

    def _sum(self, flat: Tensor) -> Tensor:
        """The sum over ranks, of a tensor that nobody else has."""
        if type(flat) is Tensor:
            import torch.distributed as dist

            try:
                dist.all_reduce(flat, group=self.handle)  # half the time of a functional one
            except RuntimeError as error:
                error.add_note(_ANOTHER)
                raise
            return flat
        # In a graph the tensor is a stand-in, and only functional collectives can be traced.
        from torch.distributed import _functional_collectives as collectives

        total = collectives.all_reduce(flat, "sum", self.handle)
        waited: Tensor = collectives.wait_tensor(total)  # type: ignore[no-untyped-call]
        return waited

    def gathered(self, value: Said) -> list[Said]:
        """What every rank has given, in their order; tensors come on the CPU."""
        import torch.distributed as dist

        every: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(every, value, self.handle)
        except RuntimeError as error:
            error.add_note(_ANOTHER)
            raise
        return every

    def another(self) -> "Group":
        """The same processes, by other connections: what is told there is not mixed up with what is
        told here. All ranks must ask for it. It is for the CPU.
        """
        import torch.distributed as dist

        ranks = dist.get_process_group_ranks(self.handle)
        # Local synchronization, or processes that are not in this group would have to call it too.
        handle = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        return Group(handle, self.rank, self.size)

    def __deepcopy__(self, known: dict[int, object]) -> "Group":
        return self  # a copy of a model talks to the same processes

    def __repr__(self) -> str:
        return f"rank {self.rank} of {self.size}"


def _dense(tensor: Tensor) -> Tensor:
    """A gradient that is sparse (of an embedding, say) as the dense one that it stands for."""
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


_ANOTHER = (
    "parallel: this rank was talking to the others. If its own message says that a connection was "
    "closed, or that it has timed out, another rank has failed or ended, or is still at work: read "
    "what that one has printed."
)


def everyone(who: str, group: Group, params: Iterable[Tensor]) -> Group:
    """The processes that take part in a run whose batches are cut over a group: those that have
    pieces of the params as well (tensor parallel).

    Raises ValueError unless one dimension of a mesh of all processes is for the params, and another
    for the batches.
    """
    import torch.distributed as dist

    pieces = {processes(param) for param in params if distributed(param)}
    if not pieces:
        return group
    count, world = max(map(len, pieces)), dist.get_world_size()
    overlap = max(len(own & group.members) for own in pieces)  # 1 is this process itself
    if overlap > 1 or count * group.size != world:
        raise ValueError(
            f"{who}: the model's params are cut over {count} processes, and batches over "
            f"{group.size} of {world}; expected two dimensions of one mesh of all processes: "
            f"parallelize_module(model, mesh['tensor'], ...) and {who}(learner, mesh['data'])."
        )
    return group if count == 1 else Group(dist.group.WORLD, dist.get_rank(), world)


def group_of(who: str, mesh: Any) -> Group:
    """The group of a mesh of one dimension, or of all processes if there is none.

    Raises RuntimeError if torch.distributed has not been started, and ValueError for a mesh of more
    dimensions.
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            f"{who}: this process has no others: torch.distributed has not been started. Call "
            f"torch.distributed.init_process_group(), and start the script by torchrun."
        )
    dimensions = getattr(mesh, "ndim", 1)
    if dimensions != 1:
        names = getattr(mesh, "mesh_dim_names", None) or ()
        called = f", {names}" if names else ""
        example = names[0] if names else "data"
        raise ValueError(
            f"{who}: the mesh has {dimensions} dimensions{called}; expected the one over which "
            f"batches are cut. Pass it alone: mesh[{example!r}]."
        )
    handle = mesh.get_group() if hasattr(mesh, "get_group") else mesh or dist.group.WORLD
    return Group(handle, dist.get_rank(handle), dist.get_world_size(handle))
