"""Leaves that are cut over four processes, in a row or as two by two."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import functional_sgd as fs
from functional_sgd import chain, fuse
from functional_sgd.randomness import Key, uniform
from tests.catalogue import OPTIMIZERS
from tests.functional_sgd.sharded.helpers import (
    EXECUTORS,
    ON_A_GRID,
    S0,
    S1,
    R,
    by_all_kinds,
    collectives,
    compared,
    cut,
    cut_tree,
    distance,
    grid,
    line,
    pieces,
    tree,
    where,
    whole,
)
from tests.ranks import Ranks, started
from tests.turns import LONG, of_turn


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with started(4) as processes:
        yield processes


CHOSEN = (
    "adamw lamb larc ranger clip_norm_adam clip_norm_inside centralize_sgd lars partition "
    "schedule_free_adamw skip_nonfinite skip_nonfinite_of_all_others average_params"
).split()
"""Some of each kind: what a leaf gets does not depend on how many pieces it has."""


def turn_of(layout: str, way: str) -> list[str]:
    """Each is tried with one layout in two executors, with the other one in the third."""
    return of_turn(CHOSEN, [*EXECUTORS].index(way) + [*ON_A_GRID].index(layout), 2)


def far_from_one_process(layout: str, way: str) -> dict[str, float]:
    mesh, (placements, of_grads) = grid(), ON_A_GRID[layout]
    names = turn_of(layout, way)
    found = {n: compared(OPTIMIZERS[n](), way, mesh, placements, of_grads) for n in names}
    return {name: one for name, one in found.items() if not one <= 1e-14}


@pytest.mark.parametrize("way", EXECUTORS)
@pytest.mark.parametrize("layout", [*ON_A_GRID][:: 1 if LONG else 3])
def test_on_a_grid_the_numbers_are_those_of_one_process(
    ranks: Ranks, layout: str, way: str
) -> None:
    assert ranks(far_from_one_process, layout, way) == [{}] * 4


def in_a_row(way: str) -> dict[str, float]:
    names = of_turn(CHOSEN, [*EXECUTORS].index(way), len(EXECUTORS))
    found = {n: compared(OPTIMIZERS[n](), way, line(), [S0], [S0]) for n in names}
    opt = chain(by_all_kinds, fs.sgd_step, lr=0.1)
    found["reductions"] = compared(opt, way, line(), [S0], [S0])
    return {name: one for name, one in found.items() if not one <= 1e-14}


@pytest.mark.parametrize("way", EXECUTORS)
def test_some_processes_may_have_an_empty_piece(ranks: Ranks, way: str) -> None:
    """Five rows, or one, over four processes."""
    assert ranks(in_a_row, way) == [{}] * 4


@fs.elementwise
def add_noise(update: Tensor, *, key: Key) -> dict[str, Tensor]:
    return dict(update=update + uniform(key, update))


def drawn(placements: Any, way: str) -> float:
    opt = chain(add_noise, fs.sgd_step, lr=0.1)
    return compared(opt, way, grid(), placements, placements)


@pytest.mark.parametrize("way", EXECUTORS)
def test_random_numbers_are_those_of_one_process(ranks: Ranks, way: str) -> None:
    for placements in ([S0, S1], [S0, S0], [R, S0]):
        assert max(ranks(drawn, placements, way)) <= 1e-14


def two_meshes(way: str) -> tuple[float, int, bool]:
    """Some leaves on all four, others on the inner axis of two by two, others plain."""
    outer, both = line(), grid()
    plain = tree()
    places = {"a": (outer, [S0]), "b": (both, [S0, S1]), "c": (both["inner"], [S0])}

    def put(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: cut(v, *places[n]) if n in places else v.clone() for n, v in values.items()}

    opt = chain(fs.clip_norm, fs.lamb(lr=0.1))
    theirs = EXECUTORS[way](opt)
    placed = put(plain)
    state, placed_state = opt.init(plain), theirs.init(placed)
    first = where(placed)
    for seed in range(3):
        plain, state = opt(plain, tree(seed + 1), state)
        placed, placed_state = theirs(placed, put(tree(seed + 1)), placed_state)
    far = distance((whole(placed), whole(placed_state)), (plain, state))
    stays = where(placed) == first
    grads = put(tree(5))
    return far, collectives(lambda: theirs(placed, grads, placed_state)), stays


@pytest.mark.parametrize("way", EXECUTORS)
def test_leaves_may_be_on_several_meshes(ranks: Ranks, way: str) -> None:
    """A collective for each mesh, and each of the two norms."""
    for far, count, stays in ranks(two_meshes, way):
        assert far <= 1e-14
        assert count == 6
        assert stays


def collectives_on_a_grid(placements: Any) -> int:
    opt = fuse(fs.lamb())
    params = cut_tree(tree(), grid(), placements)
    state = opt.init(params)
    return collectives(lambda: opt(params, params, state))


def test_norms_on_a_grid_take_one_collective(ranks: Ranks) -> None:
    for placements in ([S0, S1], [S0, S0], [R, S0]):
        assert ranks(collectives_on_a_grid, placements) == [1] * 4


def bits(opt_name: str) -> list[list[Any]]:
    """What each process has of replicas, after some steps."""
    mesh = grid()
    opt = fuse(OPTIMIZERS[opt_name]())
    params = cut_tree(tree(), mesh, [R, S0])
    state = opt.init(params)
    for seed in range(3):
        params, state = opt(params, cut_tree(tree(seed), mesh, [R, S0]), state)
    return [piece.tolist() for piece in pieces((params, state))]


def test_replicas_are_equal_bit_for_bit(ranks: Ranks) -> None:
    first, second, third, fourth = ranks(bits, "lamb")
    assert first == third
    assert second == fourth


def elsewhere() -> str:
    """A norm of a leaf on a mesh without this process."""
    first = DeviceMesh("cpu", torch.tensor([0, 1]))
    DeviceMesh("cpu", torch.tensor([2, 3]))  # every process takes part in making groups
    piece = torch.ones(2) if first.get_coordinate() is not None else torch.ones(0)
    params = {
        "w": DTensor.from_local(
            piece, first, [S0], run_check=False, shape=torch.Size([4]), stride=(1,)
        )
    }
    opt = fuse(chain(fs.clip_norm, fs.sgd(lr=0.1)))
    try:
        opt(params, params, opt.init(params))
    except ValueError as error:
        return str(error)
    return ""


def test_a_process_outside_of_the_mesh_is_told_so(ranks: Ranks) -> None:
    *inside, third, fourth = ranks(elsewhere)
    assert inside == ["", ""]
    for text in (third, fourth):
        assert "to which this process does not belong" in text
