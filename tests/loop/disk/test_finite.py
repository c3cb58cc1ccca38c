"""Checkpoints of a run that has diverged do not push out those from before."""

from pathlib import Path

import pytest
import torch

from loop import save_in
from loop.disk.finite import not_finite
from loop.disk.store import checkpoints, is_finite
from tests.loop.saving import tiny


def save_all(folder: Path, values: str, keep: int) -> str:
    """Save states, those for a "-" with NaN; which are left."""
    for count, value in enumerate(values, start=1):
        weight = torch.full((3,), float(count) if value == "+" else torch.nan)
        save_in(tiny(count).replace(params={"w": weight}), folder, keep)
    left = [
        f"{int(path.name[:6])}{'+' if is_finite(path) else '-'}" for path in checkpoints(folder)
    ]
    return " ".join(left)


@pytest.mark.parametrize(
    ("values", "keep", "left"),
    [
        ("++++", 2, "3+ 4+"),
        ("++--", 2, "2+ 3- 4-"),
        ("++-----", 3, "2+ 5- 6- 7-"),
        ("++--+", 1, "5+"),
        ("++--+-", 2, "5+ 6-"),
        ("----", 2, "3- 4-"),
    ],
)
def test_the_newest_finite_checkpoint_stays(
    tmp_path: Path, values: str, keep: int, left: str
) -> None:
    assert save_all(tmp_path, values, keep) == left


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e5m2, torch.complex64])
def test_nan_is_found_in_every_dtype(dtype: torch.dtype) -> None:
    value = torch.tensor([1.0, torch.nan]).to(dtype)
    assert not_finite({"w": value}, {}) == "params['w']"
    assert not_finite({}, {"b": value}) == "buffers['b']"


def test_whole_numbers_and_empty_tensors_are_finite() -> None:
    whole = {"a": torch.ones(2, dtype=torch.uint8), "b": torch.ones(0), "c": torch.tensor(True)}
    assert not_finite(whole, {**whole, "mask": torch.tensor(-torch.inf)}) == ""
