"""to_torch and step_in_backward on params that are DTensors: every one of them moves."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

import functional_sgd as fs
from functional_sgd import step_in_backward, to_torch


@pytest.fixture(scope="module")
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one."""
    place: Path = tmp_path_factory.mktemp("alone")
    dist.init_process_group("gloo", init_method=f"file://{place}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def cut_ones() -> nn.Parameter:
    mesh = dist.init_device_mesh("cpu", (1,))
    return nn.Parameter(distribute_tensor(torch.ones(2), mesh, [Shard(0)]))


OPTIMIZERS: dict[str, Any] = {
    "donates": fs.sgd(lr=0.5),
    "wrapped": fs.skip_nonfinite(fs.sgd(lr=0.5)),
    "of torch": fs.torch_optimizer(torch.optim.SGD, lr=0.5),
    "lbfgs": fs.lbfgs(lr=0.5, line_search=False),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_params_move_whether_they_are_overwritten_or_not(name: str) -> None:
    """From 1 by 0.5 along a gradient of 0.5; that of the sum is 1, as L-BFGS's first step wants."""
    weight = cut_ones()
    optimizer = to_torch(OPTIMIZERS[name], [weight])
    (weight.sum() / 2).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    local: Any = weight.detach()
    assert local.to_local().tolist() == [0.75, 0.75]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_alone")
def test_params_move_within_backward() -> None:
    weight = cut_ones()
    step_in_backward(fs.sgd(lr=0.5), {"w": weight})
    (weight.sum() / 2).backward()  # type: ignore[no-untyped-call]
    local: Any = weight.detach()
    assert local.to_local().tolist() == [0.75, 0.75]
