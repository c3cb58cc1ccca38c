"""What else takes a parallel learner does with it what it does on one process."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from loop import (
    gathering,
    global_batch_norm,
    overfit_one_batch,
    parallel,
    refresh_buffers,
    shard,
    unshard,
)
from tests.loop.ranks.learners import Normed, batches, learner, loaders, numbers, plain
from tests.loop.ranks.runs import dense
from tests.ranks import Ranks

KINDS = {"in memory": batches, "fetched": loaders, "any loader": plain}


def one_learnt(kind: str, ranks: bool) -> list[Tensor]:
    """The end of a run on one batch."""
    mine = dense(KINDS[kind]())
    if ranks:
        mine = parallel(mine)
    return numbers(overfit_one_batch(mine, mine.init(seed=3), 5))


@pytest.mark.parametrize("kind", KINDS)
def test_one_batch_is_the_whole_one_on_all_ranks(ranks: Ranks, kind: str) -> None:
    expected = one_learnt(kind, False)
    for found in ranks(one_learnt, kind, True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


def one_learnt_in_pieces() -> list[Tensor]:
    mine = dense()
    mine = parallel(replace(mine, model=gathering(mine.model)))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return numbers(unshard(overfit_one_batch(mine, shard(mine, mine.init(seed=3), mesh), 5)))


def test_one_batch_is_learnt_in_pieces(ranks: Ranks) -> None:
    expected = one_learnt("in memory", False)
    for found in ranks(one_learnt_in_pieces):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


def refreshed(kind: str, fresh: bool) -> dict[str, Tensor]:
    """Buffers that are measured again, on the learner's data or on other."""
    data = batches(7).train if fresh else None
    mine = learner(model=lambda: nn.Sequential(nn.Dropout(0.3), Normed()))
    if kind == "global":
        mine = replace(mine, model=global_batch_norm(mine.model))
    if kind == "pieces":
        mine = replace(mine, model=gathering(mine.model))
    if kind != "one":
        mine = parallel(mine)
    state = mine.init(seed=3)
    if kind == "pieces":
        state = shard(mine, state, init_device_mesh("cpu", (dist.get_world_size(),)))
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 7)
    return dict(refresh_buffers(mine, state, data).buffers)


@pytest.mark.parametrize(
    ("kind", "fresh"), [("parts", False), ("parts", True), ("global", False), ("pieces", False)]
)
def test_buffers_are_refreshed_as_by_one_process(ranks: Ranks, kind: str, fresh: bool) -> None:
    expected = refreshed("one", fresh)
    for found in ranks(refreshed, kind, fresh):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
