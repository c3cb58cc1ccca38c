"""What forward passes change is alike on all ranks, or an error on all of them."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import functional_sgd as fs
from loop import Batches, DataLoaders, Learner, State, fit, parallel
from tests.ranks import Ranks

COUNT, BATCH = 21, 4  # so the last batch has one sample, and rank 1 none of it


class Base(nn.Module):
    """A layer, and something that a forward pass in training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(5, 3), nn.Linear(5, 5)
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("rows", torch.zeros(0, 5))
        self.register_buffer("scale", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.change(x)
        out: Tensor = self.layer(self.other(x))
        return out

    def change(self, x: Tensor) -> None:
        """Nothing."""


class Begun(Base):
    """A parameter that the first batch initialises."""

    def change(self, x: Tensor) -> None:
        if self.seen == 0:
            self.other.bias.copy_(-x.mean(0))
            self.seen.fill_(1)


class BegunOnOne(Base):
    """The same, on rank 1 alone."""

    def change(self, x: Tensor) -> None:
        if dist.get_rank() == 1:
            self.other.bias.copy_(-x.mean(0))


class Bounded(Base):
    """A parameter that every forward pass keeps within bounds."""

    def change(self, x: Tensor) -> None:
        self.other.weight.clamp_(-0.1, 0.1)


class LateBounded(Base):
    """The same, and from the eighth batch on, with others on each rank."""

    def change(self, x: Tensor) -> None:
        self.seen += 1
        far = 0.01 * dist.get_rank() if self.seen >= 8 else 0.0
        self.other.weight.clamp_(-0.1, 0.1 - far)


class Late(Base):
    """A parameter that is another one after the eighth batch."""

    def change(self, x: Tensor) -> None:
        self.seen += 1
        if self.seen >= 8:
            self.other.bias = nn.Parameter(self.other.bias + dist.get_rank())


class Frozen(Base):
    """A frozen parameter that follows the data."""

    def __init__(self) -> None:
        super().__init__()
        self.other.requires_grad_(False)

    def change(self, x: Tensor) -> None:
        self.other.bias.add_(x.sum(0))


class Counting(Base):
    """A number of samples."""

    def change(self, x: Tensor) -> None:
        self.seen = self.seen + len(x)


class CountingBatches(Base):
    """A number of batches."""

    def change(self, x: Tensor) -> None:
        self.seen = self.seen + 1


class Growing(Base):
    """A sample of every batch."""

    def change(self, x: Tensor) -> None:
        self.rows = torch.cat([self.rows, x[:1]])


class GrowingOnOne(Base):
    """The same, on rank 1 alone."""

    def change(self, x: Tensor) -> None:
        if dist.get_rank() == 1:
            self.rows = torch.cat([self.rows, x[:1]])


class Lazy(Base):
    """A buffer that the first batch gives its shape."""

    def change(self, x: Tensor) -> None:
        if len(self.scale) == 0:
            self.scale = x.new_ones(5)


def trained(make: Callable[[], nn.Module]) -> tuple[str, int]:
    """What a run of three epochs raises, and after how many batches."""
    torch.manual_seed(0)
    x = torch.randn(COUNT, 5)
    data = DataLoaders(Batches((x, x.abs().argmax(1) % 3), BATCH))
    mine = parallel(Learner(make(), data, nn.functional.cross_entropy, fs.sgd(lr=0.1)))
    try:
        end = fit(mine, mine.init(), 3)
    except ValueError as error:
        state: State = error.state  # type: ignore[attr-defined]
        return str(error), state.train_iter
    return "", end.train_iter


@pytest.mark.parametrize(
    ("make", "words", "batches"),
    [
        (Begun, "a forward pass has changed the parameter 'other.bias'", 0),
        (BegunOnOne, "a forward pass has changed the parameter 'other.bias'", 0),
        (LateBounded, "a forward pass has changed the parameter 'other.weight'", 7),
        (Late, "a forward pass has changed the parameter 'other.bias'", 12),
        (Frozen, "a forward pass has changed the parameter 'other.bias'", 6),
        (Counting, "the buffer 'seen' is another one on each rank after this epoch", 6),
        (Growing, r"the buffer 'rows', of shape \(1, 5\), one of shape \(2, 5\)", 1),
        (GrowingOnOne, r"the buffer 'rows' has another shape .* \[\(0, 5\), \(1, 5\)\]", 0),
    ],
)
def test_what_follows_the_data_of_a_rank_is_an_error_on_all(
    ranks: Ranks, make: Callable[[], nn.Module], words: str, batches: int
) -> None:
    for text, done in ranks(trained, make):
        with pytest.raises(ValueError, match=words):
            raise ValueError(text)
        assert done == batches


@pytest.mark.parametrize("make", [Base, Bounded, CountingBatches, Lazy])
def test_what_changes_alike_is_none(ranks: Ranks, make: Callable[[], nn.Module]) -> None:
    assert ranks(trained, make) == [("", 18)] * 2


def limited() -> str:
    model = nn.Sequential(nn.Embedding(9, 3, max_norm=0.5), nn.Flatten(), nn.Linear(3, 3))
    x = torch.arange(8)[:, None]
    data = DataLoaders(Batches((x, x[:, 0] % 3), 4))
    try:
        parallel(Learner(model, data, nn.functional.cross_entropy, fs.sgd(lr=0.1)))
    except ValueError as error:
        return str(error)
    return ""


def test_an_embedding_with_max_norm_is_refused_before_the_run(ranks: Ranks) -> None:
    for text in ranks(limited):
        assert "parallel: '0' of the model, an Embedding, has max_norm=0.5" in text
