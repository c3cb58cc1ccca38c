"""The weights of GradientAccumulation: what a batch counts is what its loss divides by."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from functional_sgd import sgd
from loop import DataLoaders, GradientAccumulation, Learner, State, count_targets, fit
from tests.comparing import assert_close, assert_same
from tests.loop.callbacks.test_accumulation import DOUBLE, X, Y, cut, double, run
from tests.loop.helpers import learned, linear

TOKENS = torch.tensor([[0, 1, 1], [1, -100, -100], [-100, -100, -100], [0, 0, -100]])


def tokens(sizes: list[int], weight: Any) -> State:
    """A layer that classifies three tokens of each sample, of which some are padding."""

    def loss(pred: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(pred.transpose(1, 2), target)

    inputs = torch.randn(4, 3, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))
    data = DataLoaders(list(zip(inputs.split(sizes), TOKENS.split(sizes), strict=True)))
    mine = Learner(linear().double(), data, loss, sgd(lr=1.0))
    return fit(mine, mine.init(), 1, [GradientAccumulation(batches=len(sizes), weight=weight)])


@pytest.mark.parametrize(
    "weight", ["targets", count_targets(), lambda state: int((state.y != -100).sum())]
)
@pytest.mark.parametrize("sizes", [[2, 2], [1, 3], [1, 1, 1, 1]])
def test_weights_of_targets_that_count(sizes: list[int], weight: Any) -> None:
    """The third sample is padding only: its mean loss is 0 / 0, and it counts nothing."""
    assert_close(tokens(sizes, weight).params, tokens([4], weight).params, atol=1e-15)


def test_weights_of_samples_are_wrong_for_targets() -> None:
    gap = tokens([1, 3], "samples").params["weight"] - tokens([4], "samples").params["weight"]
    assert gap.abs().max() > 1e-2


@pytest.mark.parametrize("weight", [0, torch.tensor(0)], ids=["number", "tensor"])
def test_a_batch_of_weight_zero_counts_nothing_even_if_it_is_nan(weight: Any) -> None:
    bad = (X[:1] * torch.nan, Y[:1])
    callback = GradientAccumulation(
        batches=2, weight=lambda state: weight if state.iter == 0 else len(state.x)
    )
    found = run([bad, *cut(8)], [callback], epochs=1)
    assert_close(learned(found), learned(run(cut(8), [], epochs=1)), atol=1e-15)


@pytest.mark.parametrize("weight", [0, torch.tensor(0)], ids=["number", "tensor"])
def test_a_window_of_weight_zero_has_a_gradient_of_zero(weight: Any) -> None:
    found = run(
        cut(4, 4), [GradientAccumulation(2, weight=lambda state: weight)], epochs=1, opt=sgd(lr=1.0)
    )
    assert_same(found.params, double(cut(8)).init().params)


@pytest.mark.parametrize("weight", [0, torch.tensor(0)], ids=["number", "tensor"])
@pytest.mark.parametrize("size", [1, 2])
def test_a_batch_of_weight_zero_that_is_alone_in_its_window_counts_nothing_either(
    size: int, weight: Any
) -> None:
    bad = (X[:1] * torch.nan, Y[:1])
    count = GradientAccumulation(
        size, weight=lambda state: weight if state.iter == size else len(state.x)
    )
    found = run([*cut(8)[:1] * size, bad], [count], epochs=1, opt=sgd(lr=1.0))
    assert_close(found.params, run(cut(8), [], epochs=1, opt=sgd(lr=1.0)).params, atol=1e-15)


def test_weights_are_checked() -> None:
    with pytest.raises(
        ValueError,
        match="weight must be 'samples' or 'targets', or a function of the state, got 'x'",
    ):
        GradientAccumulation(batches=2, weight="x")
    for bad in (-1, torch.ones(2), "x"):
        with pytest.raises(ValueError, match="weight must give a number"):
            run(cut(4, 4), [GradientAccumulation(batches=2, weight=lambda state, bad=bad: bad)])
    with pytest.raises(ValueError, match="no targets to count"):
        count_targets()(State({}, {}, {}, {}))
