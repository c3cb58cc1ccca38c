"""Logs as columns: a few bytes an item, and no more memory than the file has bytes for."""

import json
import math
from typing import Any

import pytest
import torch

from loop.disk.encoding import decode, encode
from loop.history import Log
from tests.loop.disk.test_encoding import there_and_back
from tests.loop.saving import identical

LONG = {
    "numbers": [0.1 * count for count in range(3000)],
    "whole numbers": list(range(3000)),
    "tensors": [torch.tensor(0.1 * count) for count in range(3000)],
    "one object": [{"a": 0.1}] * 3000,
    "trees": [{"b": 0.1 * count, "a": (0.2, [0.3 * count])} for count in range(3000)],
    "not numbers": [math.nan, math.inf, -0.0] * 1000,
    "one after the other": [0.1 * count for count in range(999)] + [True, None] * 9 + [2] * 2000,
    "large": [2**62 + count for count in range(999)] + [2**70 + count for count in range(99)],
}


@pytest.mark.parametrize("kind", LONG)
def test_a_long_log_comes_back(kind: str) -> None:
    assert identical(there_and_back(Log(LONG[kind])), Log(LONG[kind]))


@pytest.mark.parametrize("kind", ["numbers", "whole numbers", "tensors", "one object", "trees"])
def test_a_long_log_takes_little_text(kind: str) -> None:
    node, tensors = encode(Log(LONG[kind]), "log")
    assert len(json.dumps(node)) < 200
    assert sum(tensor.nbytes for tensor in tensors.values()) <= 3000 * 24


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (
            {"log": [{"scalars": "t"}, {"scalars": "t"}]},
            "there is no tensor t, or it is used twice",
        ),
        ([{"tensor": "t"}, {"tensor": "t"}], "used twice"),
        ({"log": [{"scalars": "wide"}]}, "wide has 2 dimensions, expected 1"),
        ({"log": [{"numbers": "t"}]}, "t is torch.uint8, expected one of"),
        ({"log": [{"repeated": [[1], "t"]}]}, "a log says 3 where there are 1 values"),
        ({"log": [{"trees": [[0, 2], ["d", "e"]]}]}, "do not fit together"),
        ({"log": [{"trees": [[0, 1], ["d", "long"]]}]}, "do not fit together"),
        ({"log": [{"tuple": []}]}, "a log has no tuple"),
        ({"log": [{}]}, "makes no sense|not enough values"),
        ({"log": [{"repeated": 3}]}, "makes no sense"),
        ({"dict": [[True, 1]]}, "a key must be str or int"),
        ({"dict": [[{"tensor": "t"}, 1]]}, "a key must be str or int"),
    ],
)
def test_what_is_crafted_is_a_value_error(node: Any, message: str) -> None:
    tensors = {
        "t": torch.tensor([3], dtype=torch.uint8),
        "wide": torch.ones(10**9, 0),
        "d": torch.ones(1, dtype=torch.float64),
        "e": torch.ones(1, dtype=torch.float64),
        "long": torch.ones(2, dtype=torch.float64),
    }
    with pytest.raises(ValueError, match=message):
        decode(node, tensors)
