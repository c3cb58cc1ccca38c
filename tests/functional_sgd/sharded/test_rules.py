"""What rules of each kind see of leaves that are cut over two processes, and what that costs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import optree
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import functional_sgd as fs
from functional_sgd import chain, elementwise, fuse, leafwise, treewise
from functional_sgd.randomness import Key, normal, uniform
from tests.catalogue import OPTIMIZERS, random_like
from tests.functional_sgd.sharded.helpers import (
    EXECUTORS,
    S0,
    S1,
    by_all_kinds,
    collectives,
    compared,
    cut_tree,
    distance,
    line,
    tree,
    where,
    whole,
)
from tests.ranks import Ranks


@elementwise
def add_noise(update: Tensor, *, key: Key) -> dict[str, Tensor]:
    return dict(update=update + uniform(key, update) + normal(key, update, draw=1))


@leafwise
def add_noise_to_whole_leaves(update: Tensor, *, key: Key) -> dict[str, Tensor]:
    return dict(update=update + uniform(key, update))


@leafwise(row_avg=lambda p: p.new_zeros(p.shape[:1]))
def by_rows(update: Tensor, row_avg: Tensor) -> dict[str, Tensor]:
    axes = tuple(range(1, update.dim()))
    rows = update.square().mean(dim=axes) if axes else update.square()
    row_avg = 0.5 * row_avg + 0.5 * rows
    return dict(row_avg=row_avg, scale=row_avg.reshape(-1, *[1] * len(axes)))


@elementwise
def divide_by_rows(update: Tensor, scale: Tensor) -> dict[str, Tensor]:
    return dict(update=update / (1 + scale))


@treewise
def centre_on_all(update: Any) -> dict[str, Any]:
    leaves = [leaf for leaf in optree.tree_leaves(update) if leaf is not None]
    mean_of_all = sum(leaf.sum() for leaf in leaves) / sum(leaf.numel() for leaf in leaves)
    return dict(update=optree.tree_map(lambda leaf: leaf - mean_of_all, update))


@elementwise
def by_erf(update: Tensor, *, size: Tensor = fs.norm("update")) -> dict[str, Tensor]:
    """No kernel knows erfinv, so torch runs it."""
    return dict(update=torch.erfinv(0.5 * update / (1 + size)))


CHAINS: dict[str, Callable[[], Any]] = {
    "random": lambda: chain(add_noise, fs.sgd_step, lr=0.1),
    "random, whole leaves": lambda: chain(add_noise_to_whole_leaves, fs.sgd_step, lr=0.1),
    "random, with a norm": lambda: chain(fs.clip_norm, add_noise, fs.sgd_step, lr=0.1),
    "reductions of all kinds": lambda: chain(by_all_kinds, fs.sgd_step, lr=0.1),
    "slots of rows": lambda: chain(by_rows, divide_by_rows, fs.sgd_step, lr=0.1),
    "slots of 8 bits": lambda: fs.eight_bit(fs.momentum(lr=0.1)),
    "treewise": lambda: chain(centre_on_all, fs.sgd_step, lr=0.1),
    "left to torch": lambda: chain(by_erf, fs.sgd_step, lr=0.1),
    "two norms": lambda: chain(fs.clip_norm, fs.lamb(lr=0.1)),
}


def without_axes_left_out() -> dict[str, Tensor]:
    return {name: leaf for name, leaf in tree().items() if leaf.dim()}


def of_chain(name: str, way: str, placements: Any, plain: str) -> float:
    args = (line(), placements, placements)
    return compared(CHAINS[name](), way, *args, plain=plain, start=without_axes_left_out)


@pytest.mark.parametrize("way", EXECUTORS)
@pytest.mark.parametrize("name", CHAINS)
def test_rules_of_every_kind_give_the_numbers_of_one_process(
    ranks: Ranks, name: str, way: str
) -> None:
    for placements in ([S0], [S1]):
        assert max(ranks(of_chain, name, way, placements, "")) <= 1e-14


@pytest.mark.parametrize("way", EXECUTORS)
@pytest.mark.parametrize("name", CHAINS)
def test_some_leaves_may_be_plain(ranks: Ranks, name: str, way: str) -> None:
    assert max(ranks(of_chain, name, way, [S0], "bc")) <= 1e-14


def collectives_of_steps(names: list[str], ways: list[str]) -> list[int]:
    found = []
    for name in names:
        for way in ways:
            opt = EXECUTORS[way]({**OPTIMIZERS, **CHAINS}[name]())
            params = cut_tree(without_axes_left_out(), line(), [S0])
            grads = {name: leaf * 1.0 for name, leaf in params.items()}
            params, state = opt(params, grads, opt.init(params))
            found.append(collectives(partial(opt, params, grads, state)))
    return found


WAYS = [*EXECUTORS]


@pytest.mark.parametrize("name", ["adamw", "lion", "radam", "sgd"])
def test_elementwise_chains_need_no_collective(ranks: Ranks, name: str) -> None:
    assert ranks(collectives_of_steps, [name], WAYS) == [[0, 0, 0]] * 2


@pytest.mark.parametrize("name", ["clip_norm_adam", "lamb", "larc", "lars"])
def test_norms_of_all_leaves_take_one_collective(ranks: Ranks, name: str) -> None:
    assert ranks(collectives_of_steps, [name], WAYS) == [[1, 1, 1]] * 2


def test_a_norm_after_a_norm_takes_another(ranks: Ranks) -> None:
    assert ranks(collectives_of_steps, ["two norms"], WAYS) == [[2, 2, 2]] * 2


def test_sums_and_maxima_and_checks_take_one_each(ranks: Ranks) -> None:
    assert ranks(collectives_of_steps, ["reductions of all kinds"], WAYS) == [[3, 3, 3]] * 2


def collectives_of_wrappers() -> tuple[int, int]:
    params = cut_tree(without_axes_left_out(), line(), [S0])
    opt = fs.skip_nonfinite(fuse(fs.adamw()))
    state = opt.init(params)
    sam = fs.sam(fs.adamw())
    inner = sam.init(params)
    return (
        collectives(lambda: opt(params, params, state)),
        collectives(lambda: sam.perturb(params, params, inner)),
    )


def test_wrappers_that_ask_something_of_all_leaves_take_one_collective(ranks: Ranks) -> None:
    assert ranks(collectives_of_wrappers) == [(1, 1)] * 2


def skipping(rank_of_nan: int) -> tuple[int, bool]:
    mesh = line()
    params = cut_tree(tree(), mesh, [S0])
    opt = fs.skip_nonfinite(fuse(fs.adamw(lr=0.1)))
    state = opt.init(params)
    grads = cut_tree(random_like(tree(), 1), mesh, [S0])
    if mesh.get_local_rank() == rank_of_nan:
        grads["b"].to_local()[0, 0] = torch.nan
    moved, after = opt(params, grads, state)
    assert type(after["skipped"]) is Tensor
    assert type(after["inner"]["step"]) is Tensor
    return int(after["skipped"]), distance(whole(moved), whole(params)) == 0.0


def test_a_nan_on_one_process_makes_all_of_them_skip(ranks: Ranks) -> None:
    assert ranks(skipping, 1) == [(1, True)] * 2


def explained(name: str) -> str:
    opt = fuse({**OPTIMIZERS, **CHAINS}[name]())
    from functional_sgd.fusion.explain import explained as text

    return str(text(opt, cut_tree(without_axes_left_out(), line(), [S0])))


def test_explain_says_that_pieces_run_in_kernels(ranks: Ranks) -> None:
    text = ranks(explained, "adamw")[0]
    assert "5 leaves of float64 on cpu: C, 1 pass" in text
    assert "without kernels" not in text


def test_explain_says_what_is_asked_of_all_processes(ranks: Ranks) -> None:
    text = ranks(explained, "lamb")[0]
    assert "5 leaves cut over processes: 1 collective a step (size, length)" in text


def donated_of_views() -> float:
    """Pieces that lie as every other column of something else."""
    mesh = line()
    params = {"w": torch.arange(12.0, dtype=torch.float64).reshape(4, 3)}
    opt = fs.clip_norm, fs.momentum(lr=0.1)
    plain, donated = chain(*opt), fuse(chain(*opt), donate=True)
    rank = mesh.get_local_rank()
    room = torch.zeros(2, 6, dtype=torch.float64)
    room[:, ::2] = params["w"][2 * rank : 2 * rank + 2]
    placed = {"w": DTensor.from_local(room[:, ::2], mesh, [S0])}
    state, placed_state = plain.init(params), donated.init(placed)
    for number in range(2):
        grads = random_like(params, number)
        params, state = plain(params, grads, state)
        placed, placed_state = donated(placed, cut_tree(grads, mesh, [S0]), placed_state)
    assert torch.equal(room[:, ::2], placed["w"].to_local())
    return distance((whole(placed), whole(placed_state)), (params, state))


def test_pieces_that_are_views_are_overwritten_where_they_are(ranks: Ranks) -> None:
    assert max(ranks(donated_of_views)) <= 1e-14


def tracked() -> float:
    """A derivative through a step of DTensors."""
    mesh = line()

    def end(params: Any, opt: Any) -> Any:
        grads = {name: 0.5 * leaf for name, leaf in params.items()}
        moved, _ = opt(params, grads, opt.init(params))
        return sum((leaf**2).sum() for leaf in moved.values())

    start = without_axes_left_out()
    opt = fuse(fs.chain(fs.clip_norm, fs.lamb(lr=0.1)))
    plain = {name: leaf.clone().requires_grad_() for name, leaf in start.items()}
    placed = {n: leaf.requires_grad_() for n, leaf in cut_tree(start, mesh, [S0]).items()}
    expected = torch.autograd.grad(end(plain, opt), list(plain.values()))
    found = torch.autograd.grad(end(placed, opt), list(placed.values()))
    return distance(whole(list(found)), list(expected))


def test_a_tracked_step_has_the_derivative_of_one_process(ranks: Ranks) -> None:
    assert max(ranks(tracked)) <= 1e-14


def some_without_gradient(way: str) -> bool:
    mesh, opt = line(), EXECUTORS[way](fs.lamb(lr=0.1))
    params = cut_tree(without_axes_left_out(), mesh, [S0])
    start, first = whole(params), where(params)
    state = opt.init(params)
    grads: dict[str, Any] = {name: leaf * 0.5 for name, leaf in params.items()}
    grads["b"] = None
    moved, _ = opt(params, grads, state)
    unmoved = {name for name, leaf in whole(moved).items() if torch.equal(leaf, start[name])}
    assert where(moved) == first
    return unmoved == {"b"} and moved["b"] is params["b"]


@pytest.mark.parametrize("way", EXECUTORS)
def test_leaves_without_a_gradient_stay(ranks: Ranks, way: str) -> None:
    assert ranks(some_without_gradient, way) == [True, True]


def rounded_by_chance(way: str) -> float:
    values = {n: leaf.bfloat16() for n, leaf in without_axes_left_out().items()}
    opt = chain(fs.eight_bit(fs.momentum(lr=0.1)), fs.round_stochastically)
    return compared(opt, way, line(), [S0], [S0], start=lambda: values)


@pytest.mark.parametrize("way", EXECUTORS)
def test_what_is_rounded_by_chance_is_that_of_one_process(ranks: Ranks, way: str) -> None:
    assert ranks(rounded_by_chance, way) == [0.0, 0.0]


def of_dtype(dtype: torch.dtype, way: str) -> float:
    mesh = line()
    values = {n: leaf.to(dtype) for n, leaf in without_axes_left_out().items()}
    args = (line(), [S0], [S0])
    assert mesh.size() == 2
    return compared(chain(fs.clip_norm, fs.adamw(lr=0.1)), way, *args, start=lambda: values)


@pytest.mark.parametrize("way", EXECUTORS)
def test_half_precision_and_complex_leaves(ranks: Ranks, way: str) -> None:
    assert ranks(of_dtype, torch.bfloat16, way) == [0.0, 0.0]
