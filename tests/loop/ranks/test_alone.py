"""A run without `parallel` on one of several processes is told so."""

import warnings
from dataclasses import replace

import torch
import torch.distributed as dist

import functional_sgd as fs
from loop import Learner, fit, fit_one_cycle, gathering, parallel, predict, shard, trace, validate
from tests.loop.ranks.learners import learner
from tests.loop.ranks.towers import EACH, tower
from tests.ranks import Ranks


def run(kind: str) -> list[str]:
    """What a run warns of, and where."""
    mine: Learner = learner(fs.sgd(lr=0.1))
    start = mine.init()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if kind == "fit":
            fit(mine, start, 0)
        if kind == "trace":
            trace(mine, start).close()
        if kind == "fit_one_cycle":
            fit_one_cycle(mine, start, 1)
        if kind == "parallel":
            mine = parallel(mine)
            fit(mine, mine.init(), 0)
        if kind == "parallel to itself":  # as of a mesh whose dimension for batches is 1 long
            groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
            mine = parallel(mine, groups[dist.get_rank()])
            fit(mine, mine.init(), 0)
        if kind == "pieces":
            mine = parallel(replace(tower(), model=gathering(tower().model, EACH)))
            mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
            fit(mine, shard(mine, mine.init(), mesh), 0)
        if kind == "tensor parallel":
            from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

            mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
            model = torch.nn.Sequential(torch.nn.Linear(5, 4).double())
            mine = replace(mine, model=parallelize_module(model, mesh, {"0": ColwiseParallel()}))
            fit(mine, mine.init(), 0)
        if kind == "evaluated":
            validate(mine, start)
            predict(mine, start)
    return [str(one.message) for one in caught if str(one.message).startswith("fit: this is one")]


def test_fit_without_parallel_is_told_what_to_do(ranks: Ranks) -> None:
    for kind in ("fit", "trace", "fit_one_cycle"):
        for said in ranks(run, kind):
            assert len(said) == 1
            assert "this is one of 2 processes" in said[0]
            assert "fit parallel(learner, ...)" in said[0]


def test_learners_that_know_of_the_others_are_not(ranks: Ranks) -> None:
    for kind in ("parallel", "parallel to itself", "pieces", "tensor parallel", "evaluated"):
        assert ranks(run, kind) == [[], []]
