"""Bring together the parts of numbers that processes have, with one collective for many leaves."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Size, Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

IDENTITY = {"sum": 0.0, "max": float("-inf"), "all": 1.0}
"""What adds nothing to a combination: that of no elements."""


class Placement(Protocol):
    """How a DTensor is spread over one dimension of its mesh."""

    def is_replicate(self) -> bool:
        """Whether each process has all of it."""

    def is_partial(self) -> bool:
        """Whether it is the sum of what the processes have."""


class Spec(Protocol):
    """How a DTensor is placed: torch's DTensorSpec, as far as it is used here."""

    @property
    def mesh(self) -> "DeviceMesh":
        """The processes."""

    @property
    def placements(self) -> tuple[Placement, ...]:
        """One for each dimension of the mesh."""

    @property
    def shape(self) -> Size:
        """That of the whole."""

    @property
    def tensor_meta(self) -> Any:
        """Its shape, strides and dtype."""


def all_replicas(placements: Sequence[Placement]) -> bool:
    """Whether all processes have the same."""
    return all(one.is_replicate() for one in placements)


class Combination(NamedTuple):
    """The rows of a table of parts that the processes of a mesh bring together."""

    rows: list[int] | None  # None: all
    silent: list[int]  # those among them that other processes send, which have the same piece
    groups: list["ProcessGroup | None"]
    device: str

    def combine(self, table: Tensor, kinds: Sequence[str]) -> None:
        """Replace the parts by totals."""
        import torch.distributed as dist

        # Not a set: its order differs between processes, and all must call the same collectives in
        # the same order.
        for kind in dict.fromkeys(kinds):
            columns = [place for place, one in enumerate(kinds) if one == kind]
            chosen = table if self.rows is None else table[self.rows]
            own = chosen[:, columns].to(self.device)  # a copy
            if self.silent:
                # Replicas hold the same piece: one of them speaks, or a sum would count it several
                # times.
                own[self.silent] = IDENTITY[kind]
            operation = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
            for group in self.groups:
                dist.all_reduce(own, op=operation.get(kind, dist.ReduceOp.MIN), group=group)
            chosen[:, columns] = own.to(table.device)
            if self.rows is not None:
                table[self.rows] = chosen


def by_mesh(specs: Sequence[Spec | None]) -> list[Combination]:
    """Who combines which rows; a row without a spec, or of a whole leaf, needs nobody."""
    meshes: dict[DeviceMesh, dict[int, Sequence[Placement]]] = {}
    for row, spec in enumerate(specs):
        if spec is not None and not all_replicas(spec.placements):
            meshes.setdefault(spec.mesh, {})[row] = spec.placements
    found = []
    for mesh, placements in meshes.items():
        coordinate = mesh.get_coordinate()
        if coordinate is None:
            raise ValueError(
                f"reductions: a leaf is on {mesh}, to which this process does not belong, so it "
                f"has no part in a number made of it. Give each process leaves of its own meshes."
            )
        layouts = list(placements.values())
        # Along other dimensions all processes hold the same, so nothing has to be combined.
        dims = []
        for dim, along in enumerate(zip(*layouts, strict=True)):
            if not all_replicas(along):
                dims.append(dim)
        # Of pieces that several processes have alike, one counts: so one sum serves all leaves.
        silent = []
        for place, own in enumerate(layouts):
            if any(own[dim].is_replicate() and coordinate[dim] for dim in dims):
                silent.append(place)
        rows = None if len(placements) == len(specs) else list(placements)
        found.append(Combination(rows, silent, _groups(mesh, dims), mesh.device_type))
    return found


def _groups(mesh: "DeviceMesh", dims: Sequence[int]) -> list["ProcessGroup | None"]:
    """The process groups that reach every process along these dimensions of a mesh."""
    import torch.distributed as dist

    if len(dims) > 1 and len(dims) == mesh.ndim and mesh.size() == dist.get_world_size():
        return [dist.group.WORLD]  # one collective in the place of one for each dimension
    return [mesh.get_group(dim) for dim in dims]
