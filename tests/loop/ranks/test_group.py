"""What a rank is told when another one does not answer."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from functional_sgd import sgd
from loop import Batches, DataLoaders, Learner, fit, parallel
from loop.ranks.group import Group, group_of
from tests.ranks import Ranks


def told(what: str) -> list[str]:
    """The notes of rank 0, which waits for rank 1 in vain."""
    handle = dist.new_group([0, 1], timeout=timedelta(seconds=0.2))
    group: Group = group_of("parallel", handle)
    if group.rank == 1:
        return []
    try:
        if what == "sums":
            group.sums([torch.ones(2)])
        else:
            group.gathered("something")
    except RuntimeError as error:
        return error.__notes__
    return []


@pytest.mark.parametrize("what", ["sums", "gathered"])
def test_a_rank_that_waits_in_vain_is_told_to_look_at_the_others(ranks: Ranks, what: str) -> None:
    notes, _ = ranks(told, what)
    assert len(notes) == 1
    assert "another rank has failed or ended" in notes[0]


def with_sparse_gradients() -> tuple[Tensor, Tensor]:
    """An embedding after a batch, of ranks and of a process alone."""
    words = torch.tensor([2, 0, 2])
    data = DataLoaders(Batches((words, torch.ones(3, 2)), 3))
    model = nn.Embedding(4, 2, sparse=True, _weight=torch.zeros(4, 2))
    one = Learner(model, data, nn.functional.mse_loss, sgd(lr=0.3))
    ends = [fit(mine, mine.init(), 1) for mine in (parallel(one), one)]
    return ends[0].params["weight"], ends[1].params["weight"]


@pytest.mark.filterwarnings("ignore:fit. this is one of")
def test_gradients_that_are_sparse_are_added_up_too(ranks: Ranks) -> None:
    for found, whole in ranks(with_sparse_gradients):
        torch.testing.assert_close(found, torch.tensor([[0.1], [0], [0.2], [0]]).expand(4, 2))
        torch.testing.assert_close(found, whole)
