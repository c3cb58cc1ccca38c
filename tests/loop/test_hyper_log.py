"""The log of a hyper that is a tree: what it gives back, and what it costs on disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from functional_sgd.schedules import Linear
from loop import DataLoaders, ParamScheduler, fit, load, save
from loop.disk.encoding import encode
from loop.history import Log
from loop.hyper_log import HyperLog, appended, logged
from tests.loop.helpers import batches, learner


def log_of(*values: Any) -> Any:
    log = None
    for value in values:
        log = appended(log, value)
    return log


VALUES = [
    {"a": 0.1, "b": 0.1, "c": 0.2},
    {"a": 0.2, "b": 0.2, "c": 0.2},
    {"a": 0.3, "b": 0.4, "c": 0.2},  # other groups
    0.5,
    [{"a": 1}, (2, 3.0)],
]


def test_it_gives_back_what_was_appended() -> None:
    log = log_of(*VALUES)
    assert list(log) == VALUES
    assert [log[index] for index in range(-5, 5)] == VALUES * 2
    assert log[1:3] == VALUES[1:3]
    assert log == VALUES
    with pytest.raises(IndexError, match="HyperLog: index 5 is out of range for 5 items"):
        log[5]


@pytest.mark.parametrize(
    "values",
    [
        [{"a": 1, "b": 1.0}],
        [{"a": True, "b": 1}],
        [{"a": 0.5, "b": 0.5}, {"a": 1, "b": 1.0}],  # groups made of equal leaves
    ],
)
def test_numbers_come_back_with_their_types(values: list[dict[str, float]]) -> None:
    found = [[type(leaf) for leaf in value.values()] for value in log_of(*values)]
    assert found == [[type(leaf) for leaf in value.values()] for value in values]


def test_numbers_alone_are_a_plain_log() -> None:
    assert not isinstance(log_of(0.1, 0.2), HyperLog)


def test_a_tree_after_numbers() -> None:
    assert list(log_of(0.1, 0.2, {"a": 0.3})) == [0.1, 0.2, {"a": 0.3}]


def test_appending_leaves_the_shorter_log_alone() -> None:
    short = log_of(VALUES[0])
    one, other = short.append(VALUES[1]), short.append(VALUES[0])
    assert (list(short), list(one), list(other)) == (VALUES[:1], VALUES[:2], [VALUES[0]] * 2)


def test_tensors_are_not_looked_at() -> None:
    """Two tensors of one value are two groups; one tensor in two places is one."""
    shared = torch.tensor(0.1)
    log = log_of({"a": shared, "b": shared, "c": torch.tensor(0.1)})
    assert len(log.stretches[0].logs) == 2
    assert log[0]["b"] is shared


def test_the_size_on_disk_goes_by_the_groups_and_not_by_the_leaves() -> None:
    """Two rates for 200 leaves: 500 batches took 2.9 MB, for names and numbers of every leaf."""
    names = [f"layer.{index}.weight" for index in range(200)]
    log = None
    for batch in range(500):
        log = appended(log, {name: 0.1 + batch if name < "layer.5" else 0.5 for name in names})
    document, _ = encode(log, "lr")
    assert len(str(document)) < 30_000


def test_a_run_with_a_tree_of_rates_is_saved_and_loaded(tmp_path: Path) -> None:
    mine = learner(nn.Linear(2, 2), DataLoaders(batches(4, seed=1)))
    schedule = ParamScheduler({"lr": {"weight": Linear(0.1, 0.2), "bias": Linear(0.2, 0.2)}})
    end = fit(mine, mine.init(), 1, [schedule])
    assert end.history.hypers["lr"][1] == {"weight": pytest.approx(0.125), "bias": 0.2}
    found = load(save(end, tmp_path / "state"), mine.init())
    assert found.history.hypers == end.history.hypers


def test_no_value_is_an_item_like_others() -> None:
    values = [None, 0.1, None, {"a": 0.1}, None, None, {"a": 0.2}]
    assert list(log_of(*values)) == values


def test_logs_that_are_missing_or_too_short_are_filled_in_front() -> None:
    logs = logged({"a": Log([1.0, 2.0]), "b": Log([3.0])}, {"a": 4.0, "c": 5.0}, 2)
    assert {name: list(log) for name, log in logs.items()} == {
        "a": [1.0, 2.0, 4.0],
        "b": [None, 3.0, None],
        "c": [None, None, 5.0],
    }
