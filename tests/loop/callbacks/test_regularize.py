"""RNNRegularizer: AR and TAR, by hand and in a run (B32)."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from functional_sgd import sam, sgd, value_and_grad
from loop import (
    CancelBatch,
    DataLoaders,
    GradientAccumulation,
    Learner,
    State,
    TrackerLogger,
    fit,
    predict,
    trace,
    validate,
)
from loop.callbacks.regularize import Held, RNNRegularizer, activation_penalty, temporal_penalty
from tests.comparing import assert_close, assert_same
from tests.loop.helpers import Kept, learned, learner, losses, on, raiser

H = torch.tensor([[[1.0, 2.0], [3.0, 2.0], [0.0, 1.0]], [[0.0, 0.0], [1.0, -1.0], [2.0, 2.0]]])
"""2 samples, 3 steps, 2 features."""


def test_b32_activation_penalty_by_hand() -> None:
    """(1 + 4 + 9 + 4 + 0 + 1 + 0 + 0 + 1 + 1 + 4 + 4) / 12"""
    assert float(activation_penalty(H)) == pytest.approx(29 / 12, rel=1e-7)


def test_b32_temporal_penalty_by_hand() -> None:
    """Differences [2, 0], [-3, -1], [1, -1], [1, 3]: (4 + 0 + 9 + 1 + 1 + 1 + 1 + 9) / 8"""
    assert float(temporal_penalty(H)) == pytest.approx(26 / 8, rel=1e-7)


def test_one_step_has_no_temporal_penalty() -> None:
    assert temporal_penalty(H[:, :1]) == 0


def test_half_precision_is_squared_in_float32() -> None:
    big = torch.full((1, 2, 2), 300.0, dtype=torch.half)
    assert activation_penalty(big) == 90_000
    assert temporal_penalty(big * torch.tensor([[-1.0], [1.0]])).dtype == torch.float32


class Recurrent(nn.Module):
    """(output, raw, dropped): a running sum over time of a linear layer, and twice that."""

    def __init__(self, as_list: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False)
        nn.init.eye_(self.layer.weight)
        self.as_list = as_list

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        """x (N, time, 2)."""
        raw = self.layer(x).cumsum(dim=1)
        return raw[:, -1], [None, raw] if self.as_list else raw, 2 * raw


def batches(count: int = 3, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(4, 5, 2, generator=generator), torch.randn(4, 2, generator=generator))
        for _ in range(count)
    ]


def recurrent(*callbacks: Any, **rest: Any) -> Learner:
    """A learner for it."""
    data = DataLoaders(batches(), batches(2, seed=1))
    return Learner(Recurrent(**rest), data, mse_loss, sgd(lr=0.01), callbacks=callbacks)


def by_hand(alpha: float, beta: float) -> dict[str, Tensor]:
    """The same training written out."""
    params = {"layer.weight": torch.eye(2)}

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        raw = (x @ params["layer.weight"].T).cumsum(dim=1)
        penalty = alpha * (2 * raw).pow(2).mean() + beta * (raw[:, 1:] - raw[:, :-1]).pow(2).mean()
        return mse_loss(raw[:, -1], y) + penalty

    for x, y in batches():
        _, grads = value_and_grad(loss)(params, x, y)
        params = {name: value - 0.01 * grads[name] for name, value in params.items()}
    return params


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 1.0), (0.5, 0.0), (0.0, 3.0), (0.0, 0.0)])
@pytest.mark.parametrize("as_list", [False, True])
def test_the_gradient_is_that_of_the_loss_with_penalties(
    alpha: float, beta: float, as_list: bool
) -> None:
    mine = recurrent(RNNRegularizer(alpha, beta), as_list=as_list)
    assert_close(fit(mine, mine.init(), 1).params, by_hand(alpha, beta), rtol=1e-5, atol=1e-6)


def test_recorded_losses_are_without_penalties() -> None:
    mine = recurrent(RNNRegularizer(5.0, 7.0))
    state = fit(mine, mine.init(), 1)
    first = batches()[0]
    assert_close(state.history.losses[0], mse_loss(first[0].cumsum(dim=1)[:, -1], first[1]))
    assert float(fit(mine, mine.init(), 1, lr=0.0).history.losses[0]) == float(
        state.history.losses[0]
    )


def test_the_loss_after_the_backward_pass_is_that_of_the_batch_even_with_sam() -> None:
    """Whose second pass, at perturbed params, does the handlers once more."""
    seen: list[float] = []
    mine = recurrent(
        RNNRegularizer(5.0, 7.0), on(after_backward=lambda state: seen.append(float(state.loss)))
    )
    end = fit(dataclasses.replace(mine, opt=sam(sgd(lr=0.01), rho=0.5)), mine.init(), 1)
    assert seen == losses(end)


def test_validation_and_prediction_see_the_output_only() -> None:
    mine = recurrent(RNNRegularizer())
    start = mine.init()
    outputs = torch.cat([x.cumsum(dim=1)[:, -1] for x, _ in batches(2, seed=1)])
    assert_close(predict(mine, start), outputs)
    expected = mse_loss(outputs, torch.cat([y for _, y in batches(2, seed=1)]))
    assert validate(mine, start)["valid_loss"] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    "event", ["after_pred", "after_loss", "before_backward", "before_step", "after_step"]
)
def test_nothing_is_left_of_a_batch(event: str) -> None:
    """A batch cancelled anywhere: no penalty in memory, and none in the next batch."""
    mine = recurrent(RNNRegularizer())
    left: list[State] = []
    spy = on("spy", -100, before_batch=left.append)
    end = fit(mine, mine.init(), 1, [spy, on("end", 100, **{event: raiser(CancelBatch)})])
    assert len(left) == 5
    for state in left:
        assert state.resources["rnn_regularizer"] == Held()
    for state in (*left, end):
        assert "rnn_regularizer" not in state.memory
    assert end.resources == {}


def test_nothing_is_measured_in_validation() -> None:
    mine = recurrent(RNNRegularizer())
    measured = [
        (state.training, state.resources["rnn_regularizer"].penalty is not None)
        for event, state in trace(mine, mine.init())
        if event == "after_loss"
    ]
    assert measured == [(True, True)] * 3 + [(False, False)] * 2


def test_an_accumulated_gradient_has_the_penalties_in_it() -> None:
    """Of two batches of two it is the gradient of the batch of four."""
    x, y = batches(1)[0]
    whole, halves = DataLoaders([(x, y)]), DataLoaders([(x[:2], y[:2]), (x[2:], y[2:])])
    expected = Learner(Recurrent(), whole, mse_loss, sgd(lr=0.01), callbacks=[RNNRegularizer()])
    found = Learner(
        Recurrent(),
        halves,
        mse_loss,
        sgd(lr=0.01),
        callbacks=[RNNRegularizer(), GradientAccumulation(batches=2)],
    )
    assert_close(
        fit(found, found.init(), 1).params,
        fit(expected, expected.init(), 1).params,
        rtol=1e-5,
        atol=1e-6,
    )


def test_the_state_given_is_untouched_and_runs_repeat() -> None:
    mine = recurrent(RNNRegularizer())
    start = mine.init()
    kept = Kept(start)
    assert_same(learned(fit(mine, start, 2)), learned(fit(mine, fit(mine, start, 1), 1)))
    kept.check()


def test_it_works_where_gradients_are_off() -> None:
    mine = recurrent(RNNRegularizer())
    expected = fit(mine, mine.init(), 1)
    with torch.no_grad():
        assert_same(fit(mine, mine.init(), 1).params, expected.params)


def test_the_loss_has_the_penalty_only_while_it_is_differentiated() -> None:
    mine = recurrent(RNNRegularizer(1.0, 0.0))
    found = {
        event: state.loss.detach()
        for event, state in trace(mine, mine.init())
        if event in ("after_loss", "before_backward", "after_backward")
        and state.training
        and state.iter == 0
        if state.loss is not None
    }
    raw = batches()[0][0].cumsum(dim=1)
    assert_close(
        found["before_backward"], found["after_loss"] + activation_penalty(2 * raw), rtol=1e-6
    )
    assert_same(found["after_backward"], found["after_loss"])


def test_the_logged_loss_is_the_recorded_one() -> None:
    """A tracker is told the loss of the output, as the history is, and not the penalties."""
    told: list[dict[str, float]] = []
    mine = recurrent(RNNRegularizer(5.0, 7.0))
    logger = TrackerLogger(lambda numbers, step: told.append(numbers), every=1)
    state = fit(mine, mine.init(), 1, [logger])
    assert [numbers["loss"] for numbers in told if "loss" in numbers] == losses(state)


def test_a_model_that_returns_something_else() -> None:
    mine = learner(callbacks=[RNNRegularizer()])
    with pytest.raises(
        TypeError,
        match=r"RNNRegularizer: the model must return \(output, raw, dropped\), got Tensor",
    ):
        fit(mine, mine.init(), 1)


@pytest.mark.parametrize("values", [(-1.0, 0.0), (0.0, -1.0), (float("nan"), 0.0)])
def test_penalties_are_not_negative(values: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="RNNRegularizer: alpha and beta"):
        RNNRegularizer(*values)
