"""to_torch with optimizers whose groups have no lr for a scheduler of torch."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from functional_sgd import Optimizer, adamw, partition, scheduled, sgd, to_torch
from functional_sgd.schedules import Cosine
from tests.catalogue import by_size

PARTS = partition({"large": sgd(lr=0.1), "small": adamw(lr=0.2)}, by_size)
SCHEDULED = scheduled(sgd(), steps=10, lr=Cosine(0.1, 0.0))


def params() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))]


@pytest.mark.parametrize(
    ("opt", "message"),
    [
        (PARTS, r"'large.lr', 'small.lr'. Write to these, or .* to_torch.opt, params, lr="),
        (SCHEDULED, r"If scheduled.opt, lr=.... sets it, leave that or the other scheduler out"),
    ],
    ids=["partition", "scheduled"],
)
@pytest.mark.parametrize("made", ["new", "loaded", "pickled", "copied"])
def test_a_scheduler_is_told_why_there_is_no_lr(opt: Optimizer, message: str, made: str) -> None:
    optimizer: Any = to_torch(opt, params())
    if made == "loaded":
        optimizer.load_state_dict(optimizer.state_dict())
    elif made == "pickled":
        optimizer = pickle.loads(pickle.dumps(optimizer))
    elif made == "copied":
        optimizer = copy.deepcopy(optimizer)
    with pytest.raises(KeyError, match=f"to_torch: expected a group with 'lr', but .*{message}"):
        torch.optim.lr_scheduler.StepLR(optimizer, 1)


def test_an_lr_for_all_parts_is_scheduled() -> None:
    optimizer = to_torch(PARTS, params(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for leaf in optimizer.named_params().values():
        leaf.grad = torch.ones_like(leaf)
    optimizer.step()
    scheduler.step()
    assert optimizer.hyper()["lr"] == 0.5


def test_a_group_that_has_an_lr_is_the_very_dict_that_was_given() -> None:
    group: dict[str, Any] = {"params": params(), "lr": 0.3}
    assert to_torch(sgd(), [group]).param_groups[0] is group
