"""Leaves that lie on several processes: the one place that knows DTensor.

What a step of DTensors means is what the rules do with the DTensors themselves. It is computed on
this process's pieces wherever that gives the same: elementwise rules need no other piece, and a
declared reduction needs one number of each. Nothing of torch.distributed is imported here before
somebody else has made a DTensor.
"""

import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar, overload

import torch
from torch import Tensor

from functional_sgd.collectives import Combination, Placement, Spec, all_replicas, by_mesh
from functional_sgd.memo import by_identity

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None)})

Value = TypeVar("Value")

Names: TypeAlias = Callable[[], Sequence[str]]
"""The paths of all leaves, once they are needed."""

Rows: TypeAlias = Sequence[int | None]
"""The leaf of each row of a table; None for a row that is finished."""


def any_distributed(values: Iterable[object]) -> bool:
    """Whether one of these is a DTensor."""
    # By type, since thousands of leaves are of one or two.
    return any(map(_is_kind, set(map(type, values)) - _PLAIN))


def distributed(value: object) -> "TypeIs[DTensor]":
    """Whether this is a DTensor."""
    return type(value) not in _PLAIN and _is_kind(type(value))


def _is_kind(kind: type) -> bool:
    known = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return known is not None and issubclass(kind, known)


def n_processes() -> int:
    """How many processes there are; 1 unless somebody has started torch.distributed."""
    known: Any = sys.modules.get("torch.distributed")
    if known is None or not known.is_available() or not known.is_initialized():
        return 1
    count: int = known.get_world_size()
    return count


@overload
def local(value: Tensor) -> Tensor: ...
@overload
def local(value: Value) -> Value: ...
def local(value: object) -> object:
    """This process's piece of a DTensor; anything else as it is."""
    if not distributed(value):
        return value
    # Not to_local(), which autograd records; tracked steps do not run on pieces.
    piece = value._local_tensor
    if type(piece) is Tensor:
        return piece
    wait = getattr(piece, "trigger_wait", None)  # it may still be on its way
    return piece if wait is None else wait()


@overload
def full(value: Tensor) -> Tensor: ...
@overload
def full(value: Value) -> Value: ...
def full(value: object) -> object:
    """All of a DTensor, as a plain tensor; anything else as it is."""
    if not distributed(value):
        return value
    whole = value.full_tensor()
    return _PlainBackwards.apply(whole) if whole.requires_grad else whole


class _PlainBackwards(torch.autograd.Function):
    """A plain number that DTensors were computed with: its derivative comes back as one of them."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return full(grads[0])


def placed(value: Tensor, like: object) -> Tensor:
    """The value as `like` is placed: summed if it is Partial, moved if it is cut otherwise.

    Beside a DTensor, a plain value counts as one that all processes have.
    """
    if type(like) in _PLAIN and type(value) in _PLAIN:
        return value
    if not distributed(like):
        return full(value)
    if not distributed(value):
        value = _replicated(value, like.device_mesh)
    if value.placements == like.placements:
        return value
    return value.redistribute(like.device_mesh, like.placements)


def all_placed(leaves: Sequence[object], values: Sequence[object]) -> bool:
    """Whether each value is a DTensor that is placed just like its leaf, and of its shape.

    False may mean that somebody has to look closer.
    """
    return by_identity(_same_places, _specs(leaves), _specs(values))  # type: ignore[no-any-return]


def _specs(values: Sequence[object]) -> tuple[Spec | None, ...]:
    return tuple(map(_spec, values))


def _spec(value: object) -> Spec | None:
    found: Spec | None = getattr(value, "_spec", None)
    return found


def _same_places(leaves: Sequence[Spec | None], values: Sequence[Spec | None]) -> bool:
    return len(leaves) == len(values) and all(map(_same_place, leaves, values))


def _same_place(leaf: Spec | None, value: Spec | None) -> bool:
    if leaf is None or value is None:
        return False
    if leaf.mesh is not value.mesh and leaf.mesh != value.mesh:
        return False
    if leaf.placements != value.placements or leaf.shape != value.shape:
        return False
    if leaf.tensor_meta.dtype.is_complex != value.tensor_meta.dtype.is_complex:
        return False
    return not _any_partial(leaf.placements)


def _any_partial(placements: Sequence[Placement]) -> bool:
    return any(one.is_partial() for one in placements)


def _cuts(specs: Sequence[Spec | None]) -> list[bool]:
    return [one is not None and not all_replicas(one.placements) for one in specs]


def check_placed(
    who: str, what: str, names: Names, leaves: Sequence[object], values: Sequence[object]
) -> None:
    """Raise an error, with the path, unless each value can be brought to where its leaf is."""
    for place, (leaf, value) in enumerate(zip(leaves, values, strict=True)):
        check_whole(who, names, place, leaf)
        if value is None or not (distributed(leaf) or distributed(value)):
            continue
        if not (distributed(leaf) and distributed(value)):
            raise TypeError(
                f"{who}: leaf {names()[place]!r} is {_word(leaf)}, but {what} is {_word(value)}, "
                f"of which nobody knows where it belongs. Take the gradient of this very leaf, or "
                f"use DTensor.from_local or full_tensor()."
            )
        if value.device_mesh != leaf.device_mesh:
            raise ValueError(
                f"{who}: leaf {names()[place]!r} is on {leaf.device_mesh}, but {what} on "
                f"{value.device_mesh}. Bring it to the mesh of its leaf."
            )


def _word(value: object) -> str:
    return "a DTensor" if distributed(value) else "a plain tensor"


def check_whole(who: str, names: Names, place: int, leaf: object) -> None:
    """Raise ValueError for a leaf that is Partial."""
    if distributed(leaf) and _any_partial(leaf.placements):
        raise ValueError(
            f"{who}: expected leaf {names()[place]!r} to be replicated or sharded, got "
            f"{leaf.placements}: Partial is a sum that nobody has taken yet. Call its "
            f"redistribute(placements=...)."
        )


def settled(value: Tensor) -> Tensor:
    """The value, summed if it is Partial."""
    if not distributed(value) or not _any_partial(value.placements):
        return value
    from torch.distributed.tensor import Replicate

    kept = list(value.placements)
    for dim, one in enumerate(kept):
        if one.is_partial():
            kept[dim] = Replicate()
    return value.redistribute(placements=kept)


def element_numbers(like: Tensor, leaf: Tensor | None) -> Tensor:
    """The number of each element within its leaf, in logical order.

    `like` is a column of the leaf; if that is a DTensor, the column's piece on this process.
    """
    if leaf is None or not distributed(leaf):
        return torch.arange(like.numel(), device=like.device).reshape(like.shape)
    mesh = leaf.device_mesh
    coordinate: Any = mesh.get_coordinate()  # None only on processes that have no piece
    shape = (*leaf.shape, *like.shape[leaf.dim() :])  # complex leaves are pairs of reals
    numbers = torch.zeros((), dtype=torch.int64, device=like.device)
    for axis, size in enumerate(shape):
        own = torch.arange(size, device=like.device)
        for dim, placement in enumerate(leaf.placements):
            # Not is_shard(axis), which is False for the _StridedShard of torch 2.15.
            if getattr(placement, "dim", None) == axis:
                if type(placement).__name__ != "Shard":
                    raise ValueError(f"random numbers: expected Shard, got {placement}. Use that.")
                # DTensor splits like torch.chunk, which may leave nothing for the last processes.
                chunks = own.chunk(mesh.size(dim))
                mine = coordinate[dim]
                own = chunks[mine] if mine < len(chunks) else own[:0]
        numbers = numbers.unsqueeze(-1) * size + own
    return numbers.reshape(like.shape)


def over_pieces(draw: Callable[[Tensor, Tensor], Iterable[Tensor]], like: Tensor) -> Any:
    """DTensors of what `draw(piece, leaf)` gives for the pieces of a DTensor."""
    like = settled(like)
    return tuple(_joined(piece, like, like.shape) for piece in draw(local(like), like))


def _replicated(value: Tensor, mesh: "DeviceMesh") -> "DTensor":
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _joined(piece: Tensor, leaf: Any, shape: Sequence[int]) -> "DTensor":
    """The DTensor of this shape that is cut as a leaf is, of this process's piece."""
    from torch.distributed.tensor import DTensor

    mesh, placements, strides = leaf.device_mesh, leaf.placements, [1]
    for size in reversed(shape[1:]):
        # As torch counts them: an axis of length 0 is as long as one of length 1.
        strides.insert(0, strides[0] * max(size, 1))
    stride = tuple(strides[: len(shape)])
    # Without a shape, from_local assumes that all pieces are as large as this one.
    return DTensor.from_local(
        piece, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


class _Moved(NamedTuple):
    """A slot that is placed otherwise than its leaf."""

    place: int  # of the leaf
    piece: Tensor  # what is worked on
    slot: Tensor


class Shards:
    """The leaves of one call, some of which are DTensors, and the pieces that are worked on.

    A column of a leaf that is cut is its piece if it has the leaf's shape; a column of a shape of
    its own stays a DTensor, which only rules that look at whole leaves read.
    """

    def __init__(self, params: Sequence[Tensor], slots: Mapping[str, Sequence[Tensor]]) -> None:
        self.leaves: Sequence[Any] = params  # those that are cut are DTensors
        self.originals: dict[str, Sequence[Tensor]] = {"param": params, **slots}
        self.cut: list[bool] = by_identity(_cuts, _specs(params))
        self.any_cut = any(self.cut)
        self.pieces: dict[str, list[Tensor]] = {"param": list(map(local, params))}
        self.moved: list[_Moved] = []
        for name, values in slots.items():
            pieces = self.pieces[name] = self.column(values)
            if not all_placed(params, values):
                for index, (piece, value) in enumerate(zip(pieces, values, strict=True)):
                    if piece is not local(value) and not distributed(piece):
                        self.moved.append(_Moved(index, piece, value))

    def column(self, values: Sequence[Any]) -> list[Any]:
        """The pieces of a column."""
        if all_placed(self.leaves, values):
            pieces = [value._local_tensor for value in values]
            # A piece that is still on its way has a type of its own; `local` waits for it.
            if set(map(type, pieces)) == {Tensor}:
                return pieces
        pieces = list(values)
        for index, value in enumerate(values):
            if value is not None:
                pieces[index] = self.piece(index, value)
        return pieces

    def piece(self, index: int, value: Tensor) -> Tensor:
        """What is worked on of a leaf's column."""
        leaf = self.leaves[index]
        pairs = (*leaf.shape, 2) if leaf.is_complex() else leaf.shape
        if self.cut[index] and value.shape not in (leaf.shape, pairs):
            return value if distributed(value) else _replicated(value, leaf.device_mesh)
        return local(placed(value, leaf))

    def whole(self, index: int, value: Any) -> Any:
        """A column of a leaf as a DTensor, as rules that look at whole leaves see it.

        A plain leaf is a replicated one to them, if all others are on one mesh.
        """
        leaf = self.leaves[index]
        if value is None or distributed(value):
            return value
        if not self.cut[index]:
            mesh = leaf.device_mesh if distributed(leaf) else self._only_mesh
            return value if mesh is None else _replicated(value, mesh)
        return _joined(value, leaf, (*leaf.shape, *value.shape[leaf.dim() :]))

    def size(self, index: int) -> int:
        """How many elements a leaf has, on all processes."""
        leaf = self.leaves[index]
        count: int = leaf.numel()
        return 2 * count if leaf.is_complex() else count  # as rules see them, pairs of reals

    def wrapped(self, name: str, values: Sequence[Any]) -> list[Any]:
        """Results as their arguments came: DTensors of the same placements.

        What has been overwritten in place is the very object that came.
        """
        pieces, originals = self.pieces.get(name), self.originals.get(name, self.leaves)
        results = []
        for index, (value, like) in enumerate(zip(values, originals, strict=True)):
            if pieces is not None and value is pieces[index]:
                results.append(like)
            elif value is None or not distributed(self.leaves[index]):
                results.append(value)
            else:
                results.append(self._wrapped(index, value, like))
        return results

    def _wrapped(self, index: int, value: Tensor, like: Tensor) -> Tensor:
        leaf = self.leaves[index]
        if not distributed(value) and distributed(like) and like.placements == leaf.placements:
            from torch.distributed.tensor import DTensor

            if value.dtype == like.dtype:  # a tenth of the time of from_local
                return DTensor(value, like._spec, requires_grad=False)
        return placed(self.whole(index, value), like)

    def write_back(self) -> None:
        """After a donated step: bring slots that were moved to where they were."""
        for place, piece, slot in self.moved:
            local(slot).copy_(local(placed(self.whole(place, piece), slot)))

    def combine(
        self, tables: Sequence[Tensor], indices: Sequence[Rows], kinds: Sequence[str]
    ) -> None:
        """Make the parts of this process the totals of all, in place.

        Each table has a row for each of some leaves (None: it is a total already), and a column for
        each number, to be combined as `kinds` says ("sum", "max", "all"). There is one collective
        for all leaves of a mesh, and one more for each further kind.
        """
        specs = []
        for index in itertools.chain(*indices):
            spec = None if index is None else _spec(self.leaves[index])
            specs.append(spec)
        flat = tables[0] if len(tables) == 1 else torch.cat([t.to(tables[0]) for t in tables])
        combinations: list[Combination] = by_identity(by_mesh, tuple(specs))
        for combination in combinations:
            combination.combine(flat, kinds)
        if len(tables) > 1:
            pieces = torch.split(flat, list(map(len, tables)))
            for table, totals in zip(tables, pieces, strict=True):
                table.copy_(totals)

    @property
    def n_collectives(self) -> int:
        """How many collectives bring the numbers of all leaves together."""
        return sum(len(combination.groups) for combination in by_mesh(_specs(self.leaves)))

    @functools.cached_property
    def _only_mesh(self) -> "DeviceMesh | None":
        """The mesh of all leaves that are DTensors; None if there are several."""
        meshes = {leaf.device_mesh for leaf in self.leaves if distributed(leaf)}
        return meshes.pop() if len(meshes) == 1 else None
