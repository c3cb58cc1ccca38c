"""What ranks make of parameters that are not trained, and of buffers."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import functional_sgd as fs
from loop import (
    Batches,
    Callback,
    CancelBackward,
    DataLoaders,
    Learner,
    State,
    fit,
    global_batch_norm,
    parallel,
)
from tests.loop.ranks.learners import Normed, numbers
from tests.loop.ranks.learners import learner as whole_learner
from tests.ranks import Ranks


class Turned(nn.Module):
    """A layer, and a buffer that every forward pass replaces by the sum of its inputs, turned."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.register_buffer("seen", torch.zeros((), dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = (x.sum() * 1j).to(torch.complex64)
        out: Tensor = self.layer(x)
        return out


class Cancel(Callback):
    """No gradients in the second batch."""

    def before_backward(self, state: State) -> None:
        if state.iter == 1:
            raise CancelBackward(state)


def learner(model: nn.Module, x: Tensor, batch_size: int = 8) -> Learner:
    data = DataLoaders(Batches((x, x.sum(1, keepdim=True)), batch_size))
    return parallel(Learner(model, data, nn.functional.mse_loss, fs.adamw(lr=0.01)))


def frozen_bits(dtype: torch.dtype, compile: bool) -> list[bool]:
    """Whether frozen weights, and a buffer that nobody writes to, are what they were."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 1))
    model[0].requires_grad_(False)
    mine = learner(model.to(dtype), torch.randn(20, 2).to(dtype))
    start = mine.init()
    end = fit(mine, start, 2, [] if compile else [Cancel()], compile=compile)
    assert not torch.equal(start.params["2.weight"], end.params["2.weight"])
    return [torch.equal(value, end.buffers[name]) for name, value in start.buffers.items()]


@pytest.mark.parametrize(
    ("dtype", "compile"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
)
def test_frozen_parameters_keep_their_bits_on_every_rank(
    three: Ranks, dtype: torch.dtype, compile: bool
) -> None:
    assert three(frozen_bits, dtype, compile) == [[True, True]] * 3


def constant() -> bool:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 1))
    model.register_buffer("table", torch.rand(1000).to(torch.bfloat16))
    mine = learner(model, torch.ones(20, 2))
    start = mine.init()
    return torch.equal(start.buffers["table"], fit(mine, start, 2).buffers["table"])


def test_a_constant_buffer_in_half_precision_keeps_its_bits(three: Ranks) -> None:
    assert three(constant) == [True] * 3


def turned() -> complex:
    torch.manual_seed(0)
    mine = learner(Turned(), torch.tensor([[1.0], [2.0], [6.0]]), 3)
    return complex(fit(mine, mine.init(), 1).buffers["seen"])


def test_a_complex_buffer_is_the_mean_over_ranks_too(ranks: Ranks) -> None:
    # Of three samples, rank 0 has one or two; means are weighted by how many.
    one, other = ranks(turned)
    assert one == other
    assert one in (pytest.approx((1 * 1 + 2 * 8) / 3 * 1j), pytest.approx((2 * 3 + 1 * 6) / 3 * 1j))


def untracked(ranks: bool) -> list[Tensor]:
    """A run with BatchNorm that keeps no statistics, so it is validated by those of the batch."""
    mine = whole_learner(fs.sgd(lr=0.1, mom=0.9), model=Normed)
    mine.model.norm = nn.BatchNorm1d(8, track_running_stats=False).double()
    if ranks:
        mine = parallel(replace(mine, model=global_batch_norm(mine.model)))
    return numbers(fit(mine, mine.init(), 2))


def test_batch_norm_without_running_statistics_is_validated_by_the_whole_batch(
    ranks: Ranks,
) -> None:
    for found in ranks(untracked, True):
        for one, other in zip(found, untracked(False), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
