"""Blocks that are run a second time in the backward pass change their buffers once."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import parametrizations

import functional_sgd as fs
from loop import DataLoaders, fit, gathering, parallel, shard, unshard
from tests.loop.ranks.learners import batches, learner, numbers
from tests.ranks import Ranks


class Counting(nn.Module):
    """A scale by a buffer that every forward pass in training replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen = self.seen + 1
        return x / self.seen


def changing() -> nn.Module:
    """BatchNorm, spectral_norm, and a buffer that is replaced."""
    turned = parametrizations.spectral_norm(nn.Linear(8, 8))
    return nn.Sequential(
        nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh()),
        nn.Sequential(turned, Counting()),
        nn.Linear(8, 3),
    )


def ended(blocks: list[str], again: bool) -> tuple[int, list[Tensor]]:
    mine = learner(fs.sgd(lr=0.1), DataLoaders(batches().train), model=changing)
    mine = parallel(replace(mine, model=gathering(mine.model, blocks, again)))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    end = unshard(fit(mine, shard(mine, mine.init(seed=3), mesh), 1))
    return int(end.buffers["0.1.num_batches_tracked"]), numbers(end)


@pytest.mark.parametrize("blocks", [["0", "1"], ["0.1", "1.0", "0", "1"]])
def test_buffers_are_changed_once_a_batch(ranks: Ranks, blocks: list[str]) -> None:
    once = ranks(ended, blocks, False)
    for (count, found), (_, expected) in zip(ranks(ended, blocks, True), once, strict=True):
        assert count == len(batches().train)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
