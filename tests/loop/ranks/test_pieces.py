"""States in pieces (FSDP): the numbers of one process, a share of the memory."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

import functional_sgd as fs
from functional_sgd.sharded import distributed
from loop import (
    AverageParams,
    Batches,
    DataLoaders,
    GradientAccumulation,
    Learner,
    SaveModel,
    State,
    fit,
    gathering,
    parallel,
    predict,
    shard,
    unshard,
    validate,
)
from tests.loop.ranks.learners import numbers
from tests.loop.ranks.test_two_ranks import check_equal, check_near
from tests.ranks import Ranks, started


class Block(nn.Module):
    """Widths that two ranks cannot share evenly."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 11),
            nn.Linear(11, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.tanh(self.up(self.norm(x))))
        return out


class Tower(nn.Module):
    """An embedding, blocks, and a head whose weights are those of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.scale = nn.Embedding(13, 7), nn.Parameter(torch.tensor(1.5))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(7, 13, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.scale * self.table(tokens)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


def loss(pred: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(pred.flatten(0, 1), target.flatten())


OPTS: dict[str, Callable[[], fs.Optimizer]] = {
    "adamw": lambda: fs.chain(fs.clip_norm, fs.adamw(lr=0.01), max_norm=0.5),
    "lamb": lambda: fs.lamb(lr=0.01),
    "schedule free": lambda: fs.schedule_free_adamw(lr=0.01),
}

CALLBACKS: dict[str, Callable[[], list[Any]]] = {
    "none": list,
    "average": lambda: [AverageParams(0.9)],
    "accumulation": lambda: [GradientAccumulation(batches=2)],
    "best": lambda: [SaveModel(None)],
}


def tower(opt: str = "adamw", callbacks: str = "none") -> Learner:
    """On 29 sequences, in batches of 8: the last has 5."""
    tokens = torch.randint(0, 13, (29, 7), generator=torch.Generator().manual_seed(0))
    pairs = tokens[:, :-1], tokens[:, 1:]
    data = DataLoaders(Batches(pairs, 8, shuffle=True), Batches(pairs, 8))
    torch.manual_seed(1)
    return Learner(Tower().double(), data, loss, OPTS[opt](), callbacks=CALLBACKS[callbacks]())


def started_in_pieces(one: Learner, blocks: tuple[str, ...], again: bool) -> tuple[Learner, State]:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    mine = parallel(replace(one, model=gathering(one.model, blocks, again)))
    return mine, shard(mine, mine.init(seed=3), mesh)


def in_pieces(
    opt: str, callbacks: str, blocks: tuple[str, ...], again: bool, donate: bool
) -> tuple[list[Tensor], dict[str, Any]]:
    mine, start = started_in_pieces(tower(opt, callbacks), blocks, again)
    before = {name: value.to_local().clone() for name, value in start.params.items()}
    end = fit(mine, start, 3, donate=donate)
    facts = {
        "untouched": donate
        or all(torch.equal(before[name], start.params[name].to_local()) for name in before),
        "elements": sum(value.to_local().numel() for value in end.params.values()),
        "placements": all(
            end.params[name].placements == ((Shard(0),) if value.dim() else (Replicate(),))
            for name, value in end.params.items()
        ),
        "slots": all(
            distributed(value)
            for tree in end.opt_state.values()
            if isinstance(tree, dict)
            for value in tree.values()
        ),
        "predictions": predict(mine, end),
        "validated": validate(mine, end),
    }
    return numbers(unshard(end)), facts


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with started(2) as processes:
        yield processes


EACH = ("blocks.0", "blocks.1")


@pytest.mark.parametrize(
    ("opt", "callbacks", "blocks", "again", "donate"),
    [
        ("adamw", "none", (), True, False),
        ("adamw", "none", EACH, False, False),
        ("adamw", "none", EACH, True, False),
        ("adamw", "none", EACH, True, True),
        ("adamw", "average", EACH, True, False),
        ("adamw", "accumulation", EACH, True, False),
        ("adamw", "best", EACH, True, True),
        ("lamb", "none", EACH, True, False),
        ("schedule free", "none", EACH, True, False),
    ],
)
def test_pieces_end_where_one_process_ends(
    ranks: Ranks, opt: str, callbacks: str, blocks: tuple[str, ...], again: bool, donate: bool
) -> None:
    one = tower(opt, callbacks)
    end = fit(one, one.init(seed=3), 3)
    (first, facts), (second, _) = ranks(in_pieces, opt, callbacks, blocks, again, donate)
    check_equal([first, second])
    check_near(first, numbers(end))
    total = sum(value.numel() for value in end.params.values())
    assert facts["untouched"]
    assert facts["placements"]
    assert facts["slots"]
    assert facts["elements"] <= total / 2 + 13 * 7 + len(end.params)
    torch.testing.assert_close(facts["predictions"], predict(one, end), rtol=1e-10, atol=1e-10)
    assert facts["validated"] == pytest.approx(validate(one, end), rel=1e-10)
