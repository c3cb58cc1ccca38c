"""export_dcp: what torch.distributed.checkpoint reads is what is in the state."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import functional_sgd as fs
from loop import Batches, DataLoaders, Learner, export_dcp, fit, gathering, parallel, shard, unshard
from tests.comparing import assert_same
from tests.ranks import Ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def learner(whole: bool) -> Learner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
    x = torch.randn(8, 3)
    data = DataLoaders(Batches((x, x.sum(1, keepdim=True)), 4))
    opt = fs.chain(fs.clip_norm, fs.adamw())
    return Learner(model if whole else gathering(model), data, nn.functional.mse_loss, opt)


def trained_in_pieces(folder: str) -> dict[str, Any]:
    mine = parallel(learner(whole=False))
    start = shard(mine, mine.init(seed=0), init_device_mesh("cpu", (2,)))
    end = fit(mine, start, 1)
    export_dcp(end, folder)
    found = unshard(end)
    return {"params": dict(found.params), "opt_state": dict(found.opt_state)}


def read(like: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What DCP reads, in one process."""
    empty = torch.utils._pytree.tree_map_only(Tensor, torch.zeros_like, like)
    dcp.load(empty, checkpoint_id=folder, no_dist=True)
    return empty


def test_pieces_of_two_ranks_are_read_by_one_process(ranks: Ranks, tmp_path: Path) -> None:
    expected, _ = ranks(trained_in_pieces, str(tmp_path / "export"))
    assert float(expected["opt_state"]["step"].max()) == 2
    assert_same(read(expected, tmp_path / "export"), expected)


def test_a_process_alone(tmp_path: Path) -> None:
    mine = learner(whole=True)
    state = fit(mine, mine.init(seed=0), 1)
    export_dcp(state, tmp_path / "export")
    buffers, params = dict(state.buffers), dict(state.params)
    expected = {"params": params, "buffers": buffers, "opt_state": dict(state.opt_state)}
    assert_same(read(expected, tmp_path / "export"), expected)


def test_nothing_is_written_over(tmp_path: Path) -> None:
    mine = learner(whole=True)
    (tmp_path / "other").write_text("")
    with pytest.raises(FileExistsError, match="there is something in"):
        export_dcp(mine.init(), tmp_path)
