"""GradientAccumulation with an optimizer that reads the loss: it gets that of the big batch."""

from typing import Any

import pytest
import torch

from functional_sgd import lbfgs
from functional_sgd.catalogue import polyak_sgd
from loop import CancelStep, GradientAccumulation, State, fit
from tests.comparing import assert_close, assert_same
from tests.loop.callbacks.test_accumulation import NoLength, X, Y, cut, double, run
from tests.loop.helpers import learned, losses, on, raise_once


def trained(train: Any, callbacks: list[Any]) -> State:
    """Two epochs of steps as long as the loss says."""
    return run(train, callbacks, epochs=2, opt=polyak_sgd())


@pytest.mark.parametrize("sizes", [(4, 4), (3, 1, 4)])
def test_the_value_of_a_window_is_the_loss_of_the_big_batch(sizes: tuple[int, ...]) -> None:
    small = trained(cut(*sizes), [GradientAccumulation(batches=len(sizes))])
    assert_close(learned(small), learned(trained(cut(8), [])), atol=1e-13)


def test_windows_of_one_batch_change_no_bit_of_the_value() -> None:
    small = trained(cut(3, 5), [GradientAccumulation(batches=1)])
    assert_same(learned(small), learned(trained(cut(3, 5), [])))


def test_the_step_after_a_phase_has_the_value_of_its_window() -> None:
    """Without a length no batch is known to be the last, so all steps are taken there."""
    small = trained(NoLength(cut(3, 1, 4)), [GradientAccumulation(batches=4)])
    assert_close(learned(small), learned(trained(cut(8), [])), atol=1e-13)


def test_a_value_of_weight_zero_counts_nothing_even_if_it_is_nan() -> None:
    bad = (X[:1] * torch.nan, Y[:1])
    counts = GradientAccumulation(
        batches=2, weight=lambda state: 0 if state.iter == 0 else len(state.x)
    )
    assert_close(trained([bad, *cut(8)], [counts]).params, trained(cut(8), []).params, atol=1e-13)


def test_a_window_of_one_batch_without_weight_takes_no_step() -> None:
    bad = (X[:1] * torch.nan, Y[:1])
    mine = double([bad], polyak_sgd())
    end = fit(mine, mine.init(), 1, [GradientAccumulation(batches=1, weight=lambda state: 0)])
    assert_same(end.params, mine.init().params)


@pytest.mark.parametrize("cancel", [False, True])
def test_after_the_step_the_loss_is_that_of_the_batch_again(cancel: bool) -> None:
    seen: list[float] = []
    spies = [on("seen", order=9, after_step=lambda state: seen.append(float(state.loss)))]
    spies += [on("cancel", order=9, before_step=raise_once(CancelStep))] if cancel else []
    end = trained(cut(3, 1, 4), [GradientAccumulation(batches=2), *spies])
    assert seen == losses(end)


def test_an_optimizer_that_asks_for_the_loss_as_a_function_is_refused() -> None:
    mine = double(cut(4, 4), lbfgs())
    with pytest.raises(ValueError, match=r"GradientAccumulation: LBFGS.* reads 'value_fn'"):
        fit(mine, mine.init(), 1, [GradientAccumulation(batches=2)])
