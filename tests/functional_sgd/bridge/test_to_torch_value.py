"""to_torch with optimizers that read the loss: it is that of the closure."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import functional_sgd as fs
from functional_sgd import to_torch


def bowl(weight: Tensor) -> Any:
    """A closure: its loss is the square, whose lowest value is 0."""

    def closure() -> Tensor:
        weight.grad = None
        loss = weight.square().sum()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("how", ["closure", "value", "both"])
def test_the_loss_of_the_closure_is_the_value_that_some_read(how: str) -> None:
    """Polyak's step from 4, of loss 16 and slope 8: 4 - 16 / 64 * 8 = 2; a value that is given
    wins.
    """
    weight = nn.Parameter(torch.tensor([4.0]))
    optimizer = to_torch(fs.polyak_sgd(), [weight])
    closure = bowl(weight)
    if how == "closure":
        loss = optimizer.step(closure)
        assert loss.requires_grad
        assert loss.item() == 16.0
    elif how == "value":
        optimizer.step(value=closure())
    else:
        optimizer.step(closure, value=torch.tensor(16.0) / 2)
    assert weight.item() == (3.0 if how == "both" else 2.0)


@pytest.mark.parametrize("opt", [fs.momo(), fs.sam(fs.momo()), fs.accumulate(fs.momo(), 2)])
def test_what_reads_the_loss_steps_by_closures(opt: fs.Optimizer) -> None:
    weight = nn.Parameter(torch.tensor([4.0]))
    optimizer = to_torch(opt, [weight])
    for _ in range(2):
        optimizer.step(bowl(weight))
    assert 0 < weight.item() < 4


def test_a_loss_that_is_missing_is_an_error() -> None:
    weight = nn.Parameter(torch.tensor([4.0]))
    bowl(weight)()
    with pytest.raises(
        ValueError, match=r"reads 'value'.*Pass step\(value=loss\), or step\(closure"
    ):
        to_torch(fs.momo(), [weight]).step()
