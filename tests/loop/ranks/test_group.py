"""What a rank is told when another one does not answer."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

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
