"""to_torch: the hypers of param groups, and what they are called there."""

from typing import Any

import pytest
import torch
from torch import nn

from functional_sgd import adamw, partition, sgd, to_torch

# A partition whose parts have different rates.


def two_rates() -> Any:
    return partition({"a": sgd(lr=1.0), "b": sgd(lr=0.1)}, {"w": "a", "*": "b"})


def stepped(opt: torch.optim.Optimizer, *params: nn.Parameter) -> list[float]:
    """Where params of 5 are after a step along gradients of 1."""
    for param in params:
        param.grad = torch.ones(1)
    opt.step()
    return [round(param.item(), 6) for param in params]


def two_params() -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.full((1,), 5.0)), nn.Parameter(torch.full((1,), 5.0))


def test_one_rate_for_all_parts_wins_over_theirs() -> None:
    w, v = two_params()
    assert stepped(to_torch(two_rates(), [("w", w), ("v", v)], lr=0.5), w, v) == [4.5, 4.5]


def test_so_does_that_of_a_group_and_only_there() -> None:
    w, v = two_params()
    groups = [{"params": [("w", w)], "lr": 0.2}, {"params": [("v", v)]}]
    assert stepped(to_torch(two_rates(), groups), w, v) == [4.8, 4.9]


def test_a_scheduler_that_writes_one_rate_is_heard() -> None:
    w, v = two_params()
    opt = to_torch(two_rates(), [("w", w), ("v", v)])
    opt.param_groups[0]["lr"] = 0.0
    assert stepped(opt, w, v) == [5.0, 5.0]


def test_the_rate_of_a_part_can_be_written() -> None:
    w, v = two_params()
    opt = to_torch(two_rates(), [("w", w), ("v", v)])
    opt.param_groups[0]["a.lr"] = 0.3
    assert stepped(opt, w, v) == [4.7, 4.9]


# Names in groups.


def test_weight_decay_can_be_written_under_its_name_in_torch() -> None:
    (w, _) = two_params()
    opt = to_torch(sgd(lr=0.1, wd=0.5), [w])
    assert opt.param_groups[0]["weight_decay"] == 0.5
    opt.param_groups[0]["weight_decay"] = 0.0
    assert stepped(opt, w) == [4.9]
    opt.param_groups[0]["wd"] = 1.0
    assert opt.state_dict()["param_groups"][0]["weight_decay"] == 1.0


def test_a_slip_in_the_name_of_a_group_is_an_error_and_names_of_others_are_not() -> None:
    w, v = two_params()
    with pytest.raises(ValueError, match="no rule reads 'weigth_decay'"):
        to_torch(adamw(), [{"params": [w], "weigth_decay": 0.0}])
    to_torch(adamw(), [{"params": [w], "layer": "head"}, {"params": [v], "layer": "body"}])
