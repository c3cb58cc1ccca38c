"""Leaves that are cut over two processes: the numbers of one process, and nothing moves."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial

import functional_sgd as fs
from functional_sgd import fuse
from tests.catalogue import OPTIMIZERS
from tests.functional_sgd.sharded.helpers import (
    EXECUTORS,
    LAYOUTS,
    S0,
    R,
    compared,
    cut_tree,
    distance,
    line,
    pieces,
    tree,
    whole,
)
from tests.ranks import Ranks
from tests.turns import LONG, of_turn


def far_from_one_process(layout: str, way: str) -> dict[str, float]:
    """The optimizers of the catalogue that end elsewhere, and how far; executors take turns."""
    mesh, (placements, of_grads) = line(), LAYOUTS[layout]
    found = {}
    for name in of_turn(OPTIMIZERS, [*EXECUTORS].index(way), len(EXECUTORS)):
        try:
            found[name] = compared(OPTIMIZERS[name](), way, mesh, placements, of_grads)
        except Exception as error:
            found[name] = repr(error)[:200]  # type: ignore[assignment]
    return {n: one for n, one in found.items() if isinstance(one, str) or not one <= 1e-14}


CHOSEN = [*LAYOUTS] if LONG else ["sharded with partial gradients"]
"""LAWS=long tries all layouts, and every executor with every optimizer: four minutes."""


@pytest.mark.parametrize("way", EXECUTORS)
@pytest.mark.parametrize("layout", CHOSEN)
def test_the_catalogue_on_pieces_gives_the_numbers_of_one_process(
    ranks: Ranks, layout: str, way: str
) -> None:
    assert ranks(far_from_one_process, layout, way) == [{}, {}]


def said(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def misuses() -> dict[str, str]:
    mesh = line()
    other = init_device_mesh("cpu", (2,), mesh_dim_names=("other",))
    opt = fuse(fs.adamw(lr=0.1))
    params = cut_tree(tree(), mesh, [S0])
    plain, partial = tree(), cut_tree(tree(), mesh, [Partial()])
    state = opt.init(params)
    wrapped = fs.accumulate(fuse(fs.adamw(lr=0.1)), every=2)
    return {
        "plain gradients": said(lambda: opt(params, plain, state)),
        "plain params": said(lambda: opt(plain, params, opt.init(plain))),
        "partial params": said(lambda: opt(partial, params, state)),
        "a state of partial params": said(lambda: opt.init(partial)),
        "another mesh": said(lambda: opt(params, cut_tree(tree(), other, [S0]), state)),
        "a wrapper": said(lambda: wrapped(params, plain, wrapped.init(params))),
        "pack": said(lambda: fs.pack(params)),
    }


def test_what_cannot_be_right_is_refused_by_name(ranks: Ranks) -> None:
    found = ranks(misuses)[0]
    assert found["plain gradients"].startswith(
        "TypeError: chain(weight_decay, average_grad, average_sqr_grad, debias, scale_by_rms, "
    )
    assert "leaf 'a' is a DTensor, but its gradient is a plain tensor" in found["plain gradients"]
    assert found["a wrapper"].startswith("TypeError: accumulate: leaf 'a' is a DTensor, but its")
    assert "leaf 'a' is a plain tensor, but its gradient is a DTensor" in found["plain params"]
    for misuse in ("partial params", "a state of partial params"):
        assert "expected leaf 'a' to be replicated or sharded" in found[misuse]
    assert "Bring it to the mesh of its leaf" in found["another mesh"]
    assert "pack: expected plain tensors, got DTensors" in found["pack"]


def spent_twice() -> str:
    opt = fuse(fs.adamw(lr=0.1), donate=True, debug=True)
    params = cut_tree(tree(), line(), [S0])
    grads, state = cut_tree(tree(1), line(), [S0]), opt.init(params)
    moved, after = opt(params, grads, state)
    opt(moved, grads, after)
    return said(lambda: opt(params, grads, state))


def test_spent_dtensors_say_so(ranks: Ranks) -> None:
    assert "leaf 'a' was donated to an earlier step" in ranks(spent_twice)[0]


def parameters_of_a_module() -> bool:
    """As FSDP2 has them: what the module holds is what is overwritten."""
    mesh = line()
    held = {n: torch.nn.Parameter(leaf) for n, leaf in cut_tree(tree(), mesh, [S0]).items()}
    opt = fuse(fs.lamb(lr=0.1), donate=True)
    before, state = pieces(held), opt.init(held)
    moved, _ = opt(held, cut_tree(tree(1), mesh, [S0]), state)
    same = all(moved[name] is held[name] for name in held)
    pairs = zip(before, pieces(held), strict=True)
    return same and not any(torch.equal(old, new) for old, new in pairs if old.numel())


def test_tracked_parameters_are_trained_where_they_are(ranks: Ranks) -> None:
    assert ranks(parameters_of_a_module) == [True, True]


def slots_placed_otherwise(way: str) -> tuple[bool, float]:
    """A state that was loaded with replicated slots."""
    plain = fs.chain(fs.clip_norm, fs.adamw(lr=0.1))
    opt = EXECUTORS[way](plain)
    params, expected = cut_tree(tree(), line(), [S0]), tree()
    state, expected_state = opt.init(params), plain.init(expected)
    state["grad_avg"] = cut_tree(whole(state["grad_avg"]), line(), [R])
    for seed in (1, 2):
        params, state = opt(params, cut_tree(tree(seed), line(), [S0]), state)
        expected, expected_state = plain(expected, tree(seed), expected_state)
    stay = all(leaf.placements == (R,) for leaf in state["grad_avg"].values())
    return stay, distance((whole(params), whole(state)), (expected, expected_state))


@pytest.mark.parametrize("way", EXECUTORS)
def test_slots_stay_where_they_are(ranks: Ranks, way: str) -> None:
    for stay, far in ranks(slots_placed_otherwise, way):
        assert stay
        assert far <= 1e-14


def test_steps_of_plain_tensors_load_nothing_for_others() -> None:
    code = """
import sys, torch, functional_sgd as fs
opt, params = fs.skip_nonfinite(fs.fuse(fs.lamb())), {"w": torch.ones(3)}
opt(params, params, opt.init(params))
assert "torch.distributed.tensor" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def of_fsdp_over_tensor_parallel() -> str:
    """What a rule that draws says of rows that are cut twice, the other way round."""
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "model"))
    cut = [_StridedShard(0, split_factor=1), Shard(0)]
    params = {"w": distribute_tensor(torch.ones(4, 2), mesh, cut)}
    opt = fs.noisy_sgd(lr=0.1)
    return said(lambda: opt(params, params, opt.init(params)))


def test_rows_that_are_cut_by_strides_cannot_be_drawn_for(ranks: Ranks) -> None:
    for message in ranks(of_fsdp_over_tensor_parallel):
        assert message.startswith("ValueError: random numbers: expected Shard, got")
