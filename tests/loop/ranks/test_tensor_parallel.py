"""Modules that torch has cut over one dimension of a mesh, batches that are cut over the other."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import functional_sgd as fs
from loop import (
    AverageParams,
    Callback,
    Checkpoint,
    DataLoaders,
    GradientAccumulation,
    Learner,
    State,
    fit,
    load_latest,
    parallel,
    predict,
    unshard,
)
from tests.loop.ranks.learners import learner, numbers
from tests.loop.ranks.runs import Send
from tests.loop.ranks.test_two_ranks import check_equal, check_near
from tests.ranks import Ranks

CALLBACKS: dict[str, Sequence[Callback]] = {
    "none": (),
    "accumulation and average": (GradientAccumulation(batches=2), AverageParams(0.9)),
}


class Net(nn.Module):
    """Two layers that are cut, with dropout in front, and one that is whole."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.down(torch.relu(self.up(self.drop(x))))))
        return out


def whole(callbacks: str = "none", dropout: float = 0.0) -> Learner:
    """On one process."""
    opt = fs.chain(fs.clip_norm, fs.adamw(lr=0.02), max_norm=0.5)
    return learner(opt, model=lambda: Net(dropout), callbacks=CALLBACKS[callbacks])


def in_two_ways(mesh: DeviceMesh, mine: Learner) -> Learner:
    """Cut over both dimensions."""
    plan: Any = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    model = parallelize_module(mine.model, mesh["tensor"], plan)
    return parallel(replace(mine, model=model), mesh["data"])


def mesh_of(data: int) -> DeviceMesh:
    """Of all processes."""
    shape = (data, dist.get_world_size() // data)
    return init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))


def trained(data: int, callbacks: str, donate: bool) -> tuple[list[Tensor], Tensor, list[str]]:
    mine = in_two_ways(mesh_of(data), whole(callbacks))
    end = fit(mine, mine.init(seed=5), 2, donate=donate)
    placements = [str(getattr(value, "placements", "whole")) for value in end.params.values()]
    return numbers(unshard(end)), predict(mine, end), placements


PLACEMENTS = ["(Shard(dim=0),)"] * 2 + ["(Shard(dim=1),)", "(Replicate(),)"] + ["whole"] * 2


@pytest.mark.parametrize("data", [1, 2])
@pytest.mark.parametrize("callbacks", CALLBACKS)
def test_two_ranks_end_where_one_process_ends(ranks: Ranks, data: int, callbacks: str) -> None:
    one = whole(callbacks)
    end = fit(one, one.init(seed=5), 2)
    every = ranks(trained, data, callbacks, False)
    check_equal([found for found, _, _ in every])
    check_near(every[0][0], numbers(end))
    for _, predicted, placements in every:
        torch.testing.assert_close(predicted, predict(one, end), rtol=1e-11, atol=1e-12)
        assert placements == PLACEMENTS


@pytest.mark.parametrize("donate", [False, True])
def test_four_ranks_end_where_one_process_ends(four: Ranks, donate: bool) -> None:
    one = whole()
    every = four(trained, 2, "none", donate)
    check_equal([found for found, _, _ in every])
    check_near(every[0][0], numbers(fit(one, one.init(seed=5), 2)))


@dataclass(frozen=True)
class Dropped(Callback):
    """Keeps what the first batch has made of the first layer's input."""

    seen: list[Tensor]
    reports: ClassVar[bool] = False

    def after_pred(self, state: State) -> None:
        if state.training:
            self.seen.append(state.pred.detach())


def dropped() -> tuple[Tensor, list[Tensor]]:
    seen: list[Tensor] = []
    mine = in_two_ways(mesh_of(2), whole(dropout=0.5))
    end = fit(mine, mine.init(seed=5), 1, [Dropped(seen)])
    return seen[0], numbers(unshard(end))


def test_dropout_is_agreed_where_params_are_cut_and_differs_where_batches_are(four: Ranks) -> None:
    every = four(dropped)
    first = [seen for seen, _ in every]
    assert torch.equal(first[0], first[1])
    assert torch.equal(first[2], first[3])
    assert not torch.equal(first[0], first[2])
    check_equal([found for _, found in every])


def stopped_in(folder: str, rank: int, event: int) -> tuple[str, int, list[Tensor]]:
    Send.counted[0] = 0
    mine = in_two_ways(mesh_of(2), whole())
    keep = Checkpoint(folder, batches=3)
    send: Any = Send(rank, event, signal.SIGTERM)
    end = fit(mine, mine.init(seed=5), 2, [keep, send], stop="return")
    again = fit(mine, mine.init(seed=5), 2, [keep], resume=folder)
    return end.stopped, end.train_iter, numbers(unshard(again))


@pytest.mark.parametrize(("rank", "event"), [(1, 40), (3, 66)])
def test_a_signal_for_any_rank_ends_all_and_the_run_goes_on(
    four: Ranks, tmp_path: Path, rank: int, event: int
) -> None:
    one = whole()
    end = fit(one, one.init(seed=5), 2)
    every = four(stopped_in, str(tmp_path / "run"), rank, event)
    assert {stopped for stopped, _, _ in every} == {"SIGTERM"}
    assert len({at for _, at, _ in every}) == 1
    check_equal([found for _, _, found in every])
    check_near(every[0][2], numbers(end))
    check_near(numbers(load_latest(tmp_path / "run")), numbers(end))


class Reporting(Callback):
    """Says that it is there."""

    reports: ClassVar[bool] = True

    def before_fit(self, state: State) -> State:
        return state.remember(self.name, dist.get_rank())


def reporting() -> int | None:
    mine = in_two_ways(mesh_of(2), whole())
    found: int | None = fit(mine, mine.init(), 1, [Reporting()]).memory.get("reporting")
    return found


def test_one_rank_reports(four: Ranks) -> None:
    assert four(reporting) == [0, None, None, None]


def squared(pred: Tensor, target: Tensor) -> Tensor:
    """A loss of predictions in pieces."""
    return (pred * pred).mean()


def of_pieces(cut: bool) -> list[Tensor]:
    mine = whole()
    mine = replace(mine, loss=squared, metrics=[], data=DataLoaders(mine.data.train))
    if cut:
        plan: Any = {"head": ColwiseParallel(use_local_output=False)}
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
        model = parallelize_module(mine.model, mesh["tensor"], plan)
        mine = parallel(replace(mine, model=model), mesh["data"])
    return numbers(unshard(fit(mine, mine.init(seed=5), 1)))


def test_a_loss_in_pieces_is_that_of_all(ranks: Ranks) -> None:
    every = ranks(of_pieces, True)
    check_equal(every)
    check_near(every[0], of_pieces(False))


def refused(over_both: bool) -> str:
    mesh = mesh_of(2)
    tensor = mesh._flatten("both") if over_both else mesh["tensor"]
    plan: Any = {"up": ColwiseParallel()}
    mine = whole()
    mine = replace(mine, model=parallelize_module(mine.model, tensor, plan))
    try:
        parallel(mine, mesh["data"] if over_both else None)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("over_both", [False, True])
def test_params_and_batches_cut_over_the_same_processes_are_refused(
    four: Ranks, over_both: bool
) -> None:
    words = "cut over 4 processes, and batches over 2 of 4" if over_both else "batches over 4 of 4"
    for said in four(refused, over_both):
        assert words in said
        assert "parallel(learner, mesh['data'])" in said
