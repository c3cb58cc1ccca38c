"""differences: whether two states are the same bit for bit, and where they are not."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from functional_sgd import adamw
from loop import AverageParams, History, State, differences, fit
from loop.disk.encoding import storable
from loop.history import Log
from tests.loop.helpers import learner, net


@storable
@dataclass(frozen=True)
class Kept:
    best: Any
    count: int = 0


def state(**changes: Any) -> State:
    params = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.zeros(2)}
    return State(params, {}, {"step": torch.tensor([1, 1])}, {"lr": 0.1}).replace(**changes)


def test_runs_that_are_the_same() -> None:
    mine = learner(net(), opt=adamw(lr=0.1), callbacks=[AverageParams(0.5)])
    one, other = (fit(mine, mine.init(3), 2) for _ in range(2))
    assert differences(one, other) == {}
    on_the_way = fit(mine, mine.init(3), steps=3, steps_per_epoch=5)
    found = differences(one, on_the_way)
    assert {"params['0.weight']", "train_iter", "history.losses"} <= found.keys()
    assert found["train_iter"] == f"{one.train_iter} and 3"


CASES: list[tuple[dict[str, Any], dict[str, Any], dict[str, str]]] = [
    ({}, {"seed": 7}, {"seed": "0 and 7"}),
    (
        {},
        {"params": {"w": torch.tensor([[1.0, 2.5], [3.0, 4.25]]), "b": torch.zeros(2)}},
        {"params['w']": "2 of 4 elements, by 0.5 at most"},
    ),
    (
        {"buffers": {"n": torch.tensor([0.0, float("nan")])}},
        {"buffers": {"n": torch.tensor([-0.0, float("nan")])}},
        {"buffers['n']": "in bits alone: zeros of another sign, or another kind of NaN"},
    ),
    (
        {"buffers": {"n": torch.zeros(2)}},
        {"buffers": {"n": torch.zeros(2).double(), "m": torch.zeros(1)}},
        {"buffers['n']": "float32[2] and float64[2]", "buffers['m']": "only in the second"},
    ),
    ({"hyper": {"lr": 1}}, {"hyper": {"lr": 1.0}}, {"hyper['lr']": "1 and 1.0"}),
    ({"hyper": {"lr": float("nan")}}, {"hyper": {"lr": float("nan")}}, {}),
    (
        {"memory": {"k": Kept((1, torch.ones(1)))}},
        {"memory": {"k": Kept((1, torch.zeros(1)), 2)}},
        {
            "memory['k'].best[1]": "1 of 1 elements, by 1 at most",
            "memory['k'].count": "0 and 2",
        },
    ),
    (
        {"history": History(losses=Log().append(1.0))},
        {"history": History(losses=Log().append(2.0).append(3.0))},
        {
            "history.losses": "1 and 2 entries; different in 1, first in number 0: 1.0 and 2.0",
        },
    ),
    ({"done": (0, 1)}, {"done": (0,)}, {"done[1]": "only in the first"}),
    (
        {"memory": {"z": torch.tensor([1 + 2j])}},
        {"memory": {"z": torch.tensor([1 + 3j])}},
        {"memory['z']": "1 of 1 elements, by 1 at most"},
    ),
    (
        {"memory": {"z": torch.tensor([1 + 2j, 0j])}},
        {"memory": {"z": torch.tensor([4 + 6j, 0j])}},
        {"memory['z']": "1 of 2 elements, by 5 at most"},
    ),
]


@pytest.mark.parametrize(("one", "other", "expected"), CASES, ids=range(len(CASES)))
def test_where_they_differ(
    one: dict[str, Any], other: dict[str, Any], expected: dict[str, str]
) -> None:
    assert differences(state(**one), state(**other)) == expected


def test_logs_of_other_lengths() -> None:
    one, other = (
        state(history=History(losses=Log().append(1.0).append(last))) for last in (2.0, 2.0)
    )
    assert differences(one, other) == {}
    longer = state(history=History(losses=one.history.losses.append(5.0)))
    assert differences(one, longer) == {"history.losses": "2 and 3 entries"}
