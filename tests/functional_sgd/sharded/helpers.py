"""Trees of DTensors, and how they compare with those of one process."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import optree
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from functional_sgd import Optimizer, all_finite, elementwise, fuse, largest, mean
from tests.catalogue import random_like

Tree = Any
Placements = Sequence[Any]

R, S0, S1 = Replicate(), Shard(0), Shard(1)

EXECUTORS: dict[str, Callable[[Optimizer], Optimizer]] = {
    "leaf by leaf": lambda opt: opt,
    "fused": fuse,
    "donated": lambda opt: fuse(opt, donate=True),
}

LAYOUTS: dict[str, tuple[Placements, Placements]] = {
    # of the params, of their gradients
    "replicated": ([R], [R]),
    "sharded by rows": ([S0], [S0]),
    "sharded by columns": ([S1], [S1]),
    "replicated with partial gradients": ([R], [Partial()]),
    "sharded with partial gradients": ([S0], [Partial()]),
    "sharded with gradients cut otherwise": ([S0], [S1]),
}

ON_A_GRID: dict[str, tuple[Placements, Placements]] = {
    "rows and columns": ([S0, S1], [S0, S1]),
    "rows of replicas": ([R, S0], [R, S0]),
    "rows cut twice": ([S0, S0], [S0, S0]),
    "rows of replicas with partial gradients": ([R, S0], [Partial(), S0]),
}


@elementwise
def by_all_kinds(
    update: Tensor,
    grad: Tensor,
    *,
    steepest: Tensor = largest(lambda grad: grad.abs()),
    steepest_of_all: Tensor = largest(lambda grad: grad.abs(), over="tree"),
    typical: Tensor = mean(lambda grad: grad.abs()),
    typical_of_all: Tensor = mean(lambda grad: grad.abs(), over="tree"),
    finite: Tensor = all_finite("grad"),
) -> dict[str, Tensor]:
    factor = steepest / steepest_of_all + typical / typical_of_all
    return dict(update=update * factor * finite)


@cache
def line() -> DeviceMesh:
    """All processes in a row. One mesh, since torch keeps results by meshes that are equal: with
    several of them, some ranks may wait in the groups of one and some in those of another.
    """
    return init_device_mesh("cpu", (dist.get_world_size(),))


@cache
def grid() -> DeviceMesh:
    """Four processes as two by two; one mesh."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))


def tree(seed: int = 0) -> dict[str, Tensor]:
    """Leaves whose rows and columns are not even in number, one without axes, one with one row."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (5, 3), "b": (6, 4), "c": (7,), "d": (), "e": (1, 3, 2), "f": (4, 2)}
    wide = torch.float64
    return {
        name: torch.randn(shape, generator=generator, dtype=wide) for name, shape in shapes.items()
    }


def cut(leaf: Tensor, mesh: DeviceMesh, placements: Placements, rank_of_sum: int = 0) -> DTensor:
    """A DTensor of the numbers of a plain leaf; what its axes do not allow is replicated."""
    fitting = [R if one.is_shard() and one.dim >= leaf.dim() else one for one in placements]
    settled = [R if one.is_partial() else one for one in fitting]
    whole = distribute_tensor(leaf.clone(), mesh, settled, src_data_rank=None)
    if settled == fitting:
        return whole
    piece = whole.to_local()
    for dim, one in enumerate(fitting):
        if one.is_partial():  # terms that add up to the numbers, to the bit
            share = piece * 0.25
            piece = piece - share if mesh.get_local_rank(dim) == 0 else share
            if mesh.get_local_rank(dim) > 1:
                piece = torch.zeros_like(piece)
    return DTensor.from_local(
        piece, mesh, fitting, run_check=False, shape=leaf.shape, stride=leaf.stride()
    )


def cut_tree(leaves: Tree, mesh: DeviceMesh, placements: Placements, plain: str = "") -> Tree:
    """`cut` for every leaf but those whose names are in `plain`."""
    return {
        n: leaf.clone() if n in plain else cut(leaf, mesh, placements) for n, leaf in leaves.items()
    }


def whole(values: Tree) -> Tree:
    """All of every leaf."""
    return optree.tree_map(lambda v: v.full_tensor() if isinstance(v, DTensor) else v, values)


def pieces(values: Tree) -> list[Tensor]:
    """Copies of what this process has."""
    leaves = optree.tree_leaves(values)
    return [(v.to_local() if isinstance(v, DTensor) else v).clone() for v in leaves]


def where(values: Tree) -> list[Any]:
    """How each leaf is placed."""
    leaves = optree.tree_leaves(values)
    return [
        (v.device_mesh, v.placements, v.shape, v.to_local().shape)
        if isinstance(v, DTensor)
        else None
        for v in leaves
    ]


def distance(found: Tree, expected: Tree) -> float:
    """The largest difference of two trees, relative to numbers above 1."""
    assert optree.tree_structure(found) == optree.tree_structure(expected)
    pairs = zip(optree.tree_leaves(found), optree.tree_leaves(expected), strict=True)
    largest = 0.0
    for one, other in pairs:
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        if one.numel():
            difference = (one.double() - other.double()).abs() / other.double().abs().clamp(min=1)
            largest = max(largest, float(difference.max()))
    return largest


def compared(
    opt: Optimizer,
    way: str,
    mesh: DeviceMesh,
    placements: Placements,
    of_grads: Placements,
    steps: int = 3,
    plain: str = "",
    start: Callable[[], Tree] = tree,
    **hyper: Any,
) -> float:
    """How far steps on DTensors end from the same steps on one process.

    Fails if anything changes its place, or inputs that are not donated change.
    """
    params = start()
    state = opt.init(params)
    executor = EXECUTORS[way]
    try:
        theirs = executor(opt)
    except ValueError:  # some wrappers need the old values
        assert way == "donated"
        return 0.0
    placed = cut_tree(params, mesh, placements, plain)
    placed_state = theirs.init(placed)
    place = where(placed), where(placed_state)
    for number in range(steps):
        grads = random_like(params, 100 + number)
        params, state = opt(params, grads, state, hyper)
        before = pieces((placed, placed_state))
        given = cut_tree(grads, mesh, of_grads, plain)
        old = placed, placed_state
        placed, placed_state = theirs(placed, given, placed_state, hyper)
        assert (where(placed), where(placed_state)) == place
        if theirs.donates:
            pairs = zip(optree.tree_leaves(old[0]), optree.tree_leaves(placed), strict=True)
            assert all(one is other for one, other in pairs)
        else:
            assert all(map(torch.equal, pieces(old), before))
    return distance((whole(placed), whole(placed_state)), (params, state))


def collectives(run: Callable[[], Any]) -> int:
    """How many collectives something starts on this process."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as profile:
        run()
    return sum(e.count for e in profile.key_averages() if e.key.startswith("gloo:"))
