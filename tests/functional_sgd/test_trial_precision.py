"""The trial run of a rule: numbers that would be rounded on their way."""

from typing import Any

import pytest
import torch
from torch import Tensor

from functional_sgd import chain, elementwise, sgd_step


@elementwise
def rounds(update: Tensor, *, step: Tensor, low: float = 0.1, high: float = 0.3) -> Any:
    return dict(update=update * torch.where(step > 1, low, high))


@elementwise
def chooses_signs(update: Tensor) -> Any:
    return dict(update=update * torch.where(update > 0, 1.0, -0.5))


@elementwise
def marks(update: Tensor) -> Any:
    return dict(update=torch.where(update > 0, float("nan"), -float("inf")))


def test_numbers_that_are_rounded_to_float32_are_found() -> None:
    """torch.where of two numbers is float32, whatever the leaf is; 1.0 and -0.5 lose nothing."""
    with pytest.raises(TypeError, match=r"rule rounds: torch.where makes float32 of numbers alone"):
        chain(rounds, sgd_step, lr=0.1)
    chain(chooses_signs, sgd_step, lr=0.1)
    chain(marks, sgd_step, lr=0.1)
