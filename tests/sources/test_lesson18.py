"""Lesson 18 (L are its rows): the workbook's numbers from the loop itself, and looking into what it
keeps.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from functional_sgd import (
    Optimizer,
    adamw,
    average_grad,
    average_sqr_grad,
    by_path,
    chain,
    elementwise,
    momentum,
    scale_by_rms,
    sgd,
    sgd_step,
)
from functional_sgd.schedules import Constant, one_cycle
from loop import DataLoaders, Learner, ParamScheduler, SingleBatch, State, fit, load, save, trace
from tests.comparing import assert_same
from tests.loop.callbacks.test_annealing import X, last_row_stays, squared, tensors
from tests.loop.helpers import assert_same_run, learner, losses, on, one_weight

QUIRK = on("quirk", after_step=last_row_stays)
"""The workbook copies the parameters from before its last row."""


def workbook(opt: Optimizer, **slots: dict[str, float]) -> tuple[Learner, State]:
    """29 points of y = 2x + 30, one a batch, in order; from intercept and slope 1, and these
    averages.
    """
    data = [
        (torch.tensor([[float(x)]]).double(), torch.tensor([[2.0 * x + 30]]).double()) for x in X
    ]
    mine = Learner(nn.Linear(1, 1).double(), DataLoaders(data), squared, opt)
    averages = {slot: tensors(values) for slot, values in slots.items()}
    start = mine.init()
    params = tensors({"weight": 1.0, "bias": 1.0})
    return mine, start.replace(params=params, opt_state={**start.opt_state, **averages})


def line(state: State) -> tuple[float, float]:
    """(intercept, slope)."""
    return float(state.params["bias"].detach()), float(state.params["weight"].detach())


SGD = workbook(sgd(lr=1e-4))


def test_l1_l2_l5_the_first_rows() -> None:
    """Row 1: prediction 15, error 1849, slopes -86 and -1204. Row 2 begins at 1.0086 and 1.1204,
    with (86, 202).
    """
    states = {(event, state.iter): state for event, state in trace(*SGD)}
    first, second = states["after_backward", 0], states["before_batch", 1]
    assert (first.x.item(), first.y.item(), first.pred.item(), first.loss.item()) == (
        14,
        58,
        15,
        1849,
    )
    assert (first.grads["bias"].item(), first.grads["weight"].item()) == (-86, -1204)
    assert (second.x.item(), second.y.item()) == (86, 202)
    assert line(second) == pytest.approx((1.0086, 1.1204), rel=1e-14)
    assert states["after_pred", 1].pred.item() == pytest.approx(97.363)


def test_l3_l4_finite_differences_check_the_gradient() -> None:
    """-85.99 and -1202.04 at h = 0.01: for a square they are off by exactly h and h x^2. One
    evaluation for each.
    """
    mine, start = SGD
    x, y = next(iter(mine.data.train))

    def loss(bias: float, weight: float) -> float:
        return float(squared(weight * x + bias, y))

    slopes = [(loss(1 + h, 1 + k) - loss(1, 1)) / 0.01 for h, k in ((0.01, 0), (0, 0.01))]
    assert slopes == pytest.approx([-85.99, -1202.04], rel=1e-9)
    grads = next(state.grads for event, state in trace(mine, start) if event == "after_backward")
    exact = [grads["bias"].item(), grads["weight"].item()]
    assert [a - b for a, b in zip(slopes, exact, strict=True)] == pytest.approx(
        [0.01, 0.01 * 14**2], rel=1e-8
    )


def test_l6_batches_of_one_sample_make_29_steps_an_epoch() -> None:
    assert set(fit(*SGD, 2).opt_state["step"].tolist()) == {2 * 29}


def test_l7_the_first_epoch_by_the_sheet_and_as_it_should_be() -> None:
    """The sheet's 1.07 and 2.57 lack the last of the 29 updates."""
    assert line(fit(*SGD, 1, [QUIRK])) == pytest.approx(
        (1.0666479742323505, 2.5741401222765083), rel=1e-13
    )
    assert line(fit(*SGD, 1)) == pytest.approx((1.0715160204418617, 2.613084491952597), rel=1e-13)


def test_l8_run_and_reset() -> None:
    """Five runs of an epoch are one of five; the sheet's rmse is the root of a sum; reset is the
    state one has kept.
    """
    mine, start = SGD
    state, sums = start, list[float]()
    for _ in range(5):
        state = fit(mine, state, 1, [QUIRK])
        sums.append(math.sqrt(sum(losses(state)[-29:])))
    five = fit(mine, start, 5, [QUIRK])
    assert_same((state.params, state.opt_state), (five.params, five.opt_state))
    assert losses(state) == losses(five)
    sheet = [
        150.75521153771854,
        104.74921026693299,
        104.55969980561993,
        104.37053295106034,
        104.18170833255277,
    ]
    assert sums == pytest.approx(sheet, rel=1e-12)
    assert sums[0] / math.sqrt(29) == pytest.approx(27.994539988449635, rel=1e-12)
    assert line(start) == (1, 1)


def test_l9_the_intercept_is_slow() -> None:
    assert line(fit(*SGD, 50, [QUIRK])) == pytest.approx((3.523300, 2.525391), rel=1e-6)


def test_l10_momentum_is_carried_over_rows_and_epochs() -> None:
    mine, start = workbook(
        momentum(lr=1e-4), grad_avg={"bias": -18.333926690207889, "weight": 98.245830392128539}
    )
    first = next(state for event, state in trace(mine, start) if event == "after_step")
    averages = first.opt_state["grad_avg"]
    found = averages["bias"].item(), averages["weight"].item()
    assert found == pytest.approx((-25.100534021187098, -31.978752647084292), rel=1e-13)
    assert line(first) == pytest.approx((1.0025100534021187, 1.0031978752647084), rel=1e-13)
    for epochs, expected in [
        (1, (1.063227727408411, 2.1338400353101528)),
        (10, (1.504140799962384, 2.355060902365052)),
    ]:
        assert line(fit(mine, start, epochs, [QUIRK])) == pytest.approx(expected, rel=1e-12)


@elementwise(sqr_avg=torch.ones_like)
def scale_by_the_last_average(
    grad: Tensor, sqr_avg: Tensor, *, sqr_mom: float
) -> dict[str, Tensor]:
    """The sheet divides by the average of before this row."""
    return dict(
        update=grad / sqr_avg.sqrt(), sqr_avg=sqr_mom * sqr_avg + (1 - sqr_mom) * grad.square()
    )


def test_l12_rmsprop() -> None:
    opt = chain(scale_by_the_last_average, sgd_step, lr=0.02, sqr_mom=0.9)
    mine, start = workbook(opt, sqr_avg={"bias": 9309.63147497951, "weight": 38847505.04948409})
    assert line(fit(mine, start, 5, [QUIRK])) == pytest.approx(
        (3.1890676512613103, 2.4036203537069443), rel=1e-12
    )
    assert line(fit(mine, start, 100, [QUIRK])) == pytest.approx((30.096744, 1.990809), rel=1e-6)


ADAM = workbook(
    chain(
        average_grad,
        average_sqr_grad,
        scale_by_rms,
        sgd_step,
        lr=1.0,
        mom=0.9,
        sqr_mom=0.9,
        eps=0.0,
    ),
    grad_avg={"bias": -11.530434582454214, "weight": 568.2632536601652},
    sqr_avg={"bias": 2222.044423391361, "weight": 8436962.873860385},
)


def test_l13_l16_adam_gets_there_in_ten_epochs_and_jumps() -> None:
    """(29.26, 2.31) after two sets of five; later the slope is above and below 2 in turns, and so
    is momentum 0.
    """
    ten = fit(*ADAM, 10, [QUIRK])
    assert line(ten) == pytest.approx((29.259298504595098, 2.308277463909453), rel=1e-9)
    ends = [ADAM[1]]
    for _ in range(60):
        ends.append(fit(ADAM[0], ends[-1], 1, [QUIRK]))
    assert [line(state)[1] for state in ends[57:61]] == pytest.approx(
        [1.6932, 2.3068] * 2, abs=2e-4
    )
    signs = [
        math.copysign(1, state.opt_state["grad_avg"]["weight"].item()) for state in ends[57:61]
    ]
    assert signs[0::2] == [-signs[1]] * 2
    assert signs[1::2] == [signs[1]] * 2


def test_l14_a_smaller_lr_by_hand_ends_the_jumps() -> None:
    """Ten epochs each at 1, .1, .01 and .001."""
    state, ends = ADAM[1], list[tuple[float, float]]()
    for lr in (1.0, 0.1, 0.01, 0.001):
        state = fit(ADAM[0], state, 10, [QUIRK], lr=lr)
        ends.append(line(state))
    assert ends[1:] == [
        pytest.approx(pair, rel=1e-6)
        for pair in ((29.828775, 1.942322), (29.996535, 2.003075), (29.999881, 2.000572))
    ]  # fmt: skip


def test_l15_averages_are_carried_on_by_value_and_by_file(tmp_path: Path) -> None:
    mine, start = ADAM
    half = fit(mine, start, 2)
    save(half, tmp_path / "half")
    assert_same_run(fit(mine, load(tmp_path / "half", like=mine.init()), 2), fit(mine, half, 2))


def test_l20_a_callback_multiplies_the_lr_of_a_group() -> None:
    """g['lr'] *= mult, for the weights only."""
    mine = learner(opt=sgd())
    start = mine.init()

    def raise_lr(state: State) -> State:
        lr = state.hyper["lr"]
        return state.replace(hyper={**state.hyper, "lr": {**lr, "weight": lr["weight"] * 1.3}})

    end = fit(mine, start, 1, [on(after_batch=lambda s: raise_lr(s) if s.training else None)],
              lr=by_path(start.params, {"weight": 0.1, "*": 0.5}))  # fmt: skip
    lrs = list(end.history.hypers["lr"])
    assert [lr["weight"] for lr in lrs] == pytest.approx([0.1, 0.13, 0.169])
    assert [lr["bias"] for lr in lrs] == [0.5] * 3


def test_l23_l24_l40_after_a_single_batch_the_optimizer_can_be_looked_at() -> None:
    """One batch; the chain prints as the call that makes it; state is looked up by slot and by
    parameter's name.
    """
    mine = learner(opt=momentum(lr=0.1))
    end = fit(mine, mine.init(), 3, [SingleBatch()])
    assert (end.train_iter, len(losses(end))) == (1, 1)
    assert set(end.opt_state["step"].tolist()) == {1}
    assert repr(mine.opt) == "chain(average_grad, sgd_step, lr=0.1, mom=0.9)"
    assert list(end.opt_state) == ["step", "grad_avg"]
    assert list(end.opt_state["grad_avg"]) == list(end.params) == ["weight", "bias"]
    moved = mine.init().params["weight"] - 0.1 * end.opt_state["grad_avg"]["weight"]
    torch.testing.assert_close(end.params["weight"], moved)


def test_l25_two_optimizers_on_the_same_parameters_share_nothing() -> None:
    params = learner().init().params
    one, other = momentum(), momentum()
    state, untouched = one.init(params), other.init(params)
    _, after = one(params, params, state)
    assert float(after["grad_avg"]["weight"].sum()) > 0
    assert_same(untouched, other.init(params))


@pytest.mark.parametrize(
    ("opt", "slots"),
    [(sgd(), []), (sgd(mom=0.9), ["velocity"]), (adamw(), ["grad_avg", "sqr_avg"])],
)
def test_l26_before_the_first_step_all_slots_are_zero(opt: Optimizer, slots: list[str]) -> None:
    state = learner(opt=opt).init().opt_state
    assert set(state.pop("step").tolist()) == {0}
    assert list(state) == slots
    assert all(not value.any() for slot in slots for value in state[slot].values())


@pytest.mark.parametrize(("schedule", "survives"), [(Constant(0.3), False), (one_cycle(0.3), True)])
def test_l34_a_warm_up_saves_a_badly_initialised_net(schedule: Any, survives: bool) -> None:
    """Two weights of 4 whose product should be 1: the loss is 16 times as steep there, and lr = 0.3
    leaps out of it.
    """
    model = nn.Sequential(one_weight(4.0), one_weight(4.0))
    mine = Learner(model, DataLoaders([(torch.ones(1, 1), torch.ones(1, 1))] * 50), mse_loss, sgd())
    last = losses(fit(mine, mine.init(), 1, [ParamScheduler({"lr": schedule})]))[-1]
    assert last < 1e-6 if survives else math.isnan(last)


def test_l39_reset_is_the_first_state() -> None:
    """Nothing has to be restored: what a run begins with is not touched by it."""
    mine = learner(opt=adamw(lr=0.1))
    start = mine.init()
    once = fit(mine, start, 3)
    assert_same_run(fit(mine, start, 3), once)
    assert_same(start.params, mine.init().params)
