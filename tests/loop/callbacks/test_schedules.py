"""Hypers that follow schedules, and the share of the run that is done."""

from typing import Any

import pytest
import torch

from functional_sgd import adamw, sgd
from functional_sgd.schedules import Constant, Exponential, Linear, one_cycle, step_decay
from loop import CancelFit, CancelTrain, ParamScheduler, State, fit, fit_one_cycle, trace, validate
from tests.comparing import assert_same
from tests.loop.helpers import learned, learner, linear, loaders, on, raise_once, raiser

FIVE = learner(data=loaders(train=5, valid=None))
LRS = [
    0.004, 0.03716718512, 0.09083281679, 0.09890739036, 0.09045094494,
    0.07500024865, 0.05522686593, 0.03454981013, 0.01654430239, 0.004323687191,
]  # fmt: skip
MOMS = [
    0.95, 0.9154508488, 0.8595491492, 0.8510926206, 0.8595491506,
    0.8750000014, 0.8947735818, 0.9154508444, 0.9334565322, 0.9456772696,
]  # fmt: skip


def shares(event: str, epochs: int = 2, *callbacks: Any) -> list[float]:
    """pct_train at an event in training."""
    mine = learner()
    running = trace(mine, mine.init(), epochs, callbacks)
    return [state.pct_train for name, state in running if name == event and state.training]


def test_the_share_of_the_run_before_each_batch() -> None:
    assert shares("before_batch") == pytest.approx(
        [0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6], abs=1e-15
    )


def test_the_share_of_the_run_after_each_batch() -> None:
    assert shares("after_batch") == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1], abs=1e-15)


def test_an_epoch_cut_short_does_not_shift_the_share() -> None:
    cut = on(after_batch=raise_once(CancelTrain))
    assert shares("before_batch", 2, cut) == pytest.approx([0, 3 / 6, 4 / 6, 5 / 6], abs=1e-15)


def test_a_finished_run_is_all_done() -> None:
    assert fit(FIVE, FIVE.init(), 3).pct_train == 1.0


def test_the_share_is_that_of_the_run_at_hand() -> None:
    first = fit(FIVE, FIVE.init(), 1)
    running = trace(FIVE, first, 1)
    assert next(state.pct_train for event, state in running if event == "before_batch") == 0
    running.close()


def test_one_cycle_as_fastai_records_it() -> None:
    """2 epochs of 5 batches, at most 0.1; the numbers were got by running fastai, whose own error
    is 1e-7.
    """
    end = fit_one_cycle(FIVE, FIVE.init(), 2, lr=0.1)
    assert list(end.history.hypers["lr"]) == pytest.approx(LRS, rel=1e-6)
    assert list(end.history.hypers["mom"]) == pytest.approx(MOMS, rel=1e-6)


def test_one_cycle_is_a_schedule_like_any_other() -> None:
    schedules = {"lr": one_cycle(0.1, 10.0, 100.0, 0.5)}
    expected = fit(FIVE, FIVE.init(), 2, [ParamScheduler(schedules)])
    found = fit_one_cycle(
        FIVE, FIVE.init(), 2, 0.1, moms=None, div=10.0, div_final=100.0, pct_start=0.5
    )
    assert_same(learned(found), learned(expected))


def test_one_cycle_of_an_optimizer_without_momentum() -> None:
    mine = learner(data=loaders(train=5, valid=None), opt=sgd(lr=0.1))
    end = fit_one_cycle(mine, mine.init(), 2, lr=0.1)
    assert list(end.history.hypers) == ["lr"]


def test_one_cycle_that_leaves_momentum_alone() -> None:
    end = fit_one_cycle(FIVE, FIVE.init(), 2, lr=0.1, moms=None)
    assert set(end.history.hypers["mom"]) == {0.9}


def test_one_cycle_with_no_momentum_is_plain_sgd() -> None:
    plain = learner(data=loaders(train=5, valid=None), opt=sgd(lr=0.1))
    expected = fit_one_cycle(plain, plain.init(), 2, lr=0.1)
    assert_same(
        fit_one_cycle(FIVE, FIVE.init(), 2, lr=0.1, moms=(0.0, 0.0, 0.0)).params, expected.params
    )


def test_the_hypers_are_put_back_after_the_run() -> None:
    start = FIVE.init()
    assert fit_one_cycle(FIVE, start, 1, lr=0.5).hyper == start.hyper


def test_the_hypers_are_put_back_after_a_signal() -> None:
    start = FIVE.init()
    assert (
        fit_one_cycle(FIVE, start, 1, lr=0.5, callbacks=[on(after_step=raiser(CancelFit))]).hyper
        == start.hyper
    )


def test_a_hyper_given_to_fit_stays() -> None:
    end = fit(FIVE, FIVE.init(), 1, lr=0.02)
    assert end.hyper["lr"] == 0.02
    assert list(fit(FIVE, end, 1).history.hypers["lr"]) == [0.02] * 10


def test_a_hyper_that_nobody_had_given_is_gone_after_the_run() -> None:
    start = FIVE.init()
    bare = start.replace(hyper={"lr": 0.1})
    assert fit(FIVE, bare, 1, [ParamScheduler({"mom": Linear(0, 1)})]).hyper == {"lr": 0.1}


@pytest.mark.parametrize("order", [0, 100])
def test_a_run_cancelled_at_its_beginning_leaves_the_hypers_alone(order: int) -> None:
    start = FIVE.init()
    end = fit_one_cycle(
        FIVE, start, 1, lr=0.5, callbacks=[on(before_fit=raiser(CancelFit), order=order)]
    )
    assert end.hyper == start.hyper


def test_a_run_cancelled_at_its_beginning_does_not_bring_back_the_hypers_of_another() -> None:
    start = fit_one_cycle(FIVE, FIVE.init(), 1, lr=0.5)
    schedule = ParamScheduler({"lr": Constant(0.3)})
    end = fit(FIVE, start, 1, [schedule, on(before_fit=raiser(CancelFit))], lr=0.07)
    assert end.hyper["lr"] == 0.07


def test_a_scheduled_run_can_go_back_to_a_state_from_before_it() -> None:
    start = FIVE.init()

    def undo(state: State) -> None:
        raise CancelFit(state.back_to(start))

    end = fit_one_cycle(FIVE, start, 1, lr=0.5, callbacks=[on(after_step=undo)])
    assert_same(end.params, start.params)
    assert end.hyper == start.hyper


def test_validation_batches_do_not_move_a_schedule() -> None:
    mine = learner(data=loaders(train=4, valid=3))
    running = trace(mine, mine.init(), 1, [ParamScheduler({"lr": Linear(0.0, 1.0)})])
    assert [state.hyper["lr"] for event, state in running if event == "before_batch"] == [
        0,
        0.25,
        0.5,
    ] + [0.75] * 4


def test_validate_with_a_scheduler_at_hand() -> None:
    mine = learner(callbacks=[ParamScheduler({"lr": Linear(0.0, 1.0)})])
    assert validate(mine, mine.init()) == validate(learner(), mine.init())


def test_the_scheduled_lr_is_the_one_that_is_used() -> None:
    mine = learner(data=loaders(train=2, valid=None), opt=sgd(lr=0.5))
    start = mine.init()
    end = fit(mine, start, 1, [ParamScheduler({"lr": lambda position: 0.0})])
    assert_same(end.params, start.params)


def test_several_hypers_at_once() -> None:
    mine = learner(data=loaders(train=2, valid=None), opt=adamw())
    end = fit(
        mine, mine.init(), 1, [ParamScheduler({"lr": Exponential(1.0, 0.01), "wd": Constant(0.5)})]
    )
    assert list(end.history.hypers["lr"]) == pytest.approx([1.0, 0.1])
    assert list(end.history.hypers["wd"]) == [0.5, 0.5]


def test_a_schedule_for_each_layer() -> None:
    mine = learner(linear(), loaders(train=2, valid=None), opt=sgd(lr=0.1))
    start = mine.init()
    end = fit(
        mine,
        start,
        1,
        [ParamScheduler({"lr": {"weight": Constant(0.0), "bias": Linear(0.1, 0.0)}})],
    )
    assert torch.equal(end.params["weight"], start.params["weight"])
    assert not torch.equal(end.params["bias"], start.params["bias"])
    assert list(end.history.hypers["lr"]) == [
        {"weight": 0.0, "bias": 0.1},
        {"weight": 0.0, "bias": 0.05},
    ]


def test_one_cycle_for_each_layer() -> None:
    mine = learner(linear(), loaders(train=2, valid=None))
    end = fit_one_cycle(mine, mine.init(), 1, lr={"weight": 0.1, "bias": 1.0})
    assert [value["bias"] / value["weight"] for value in end.history.hypers["lr"]] == pytest.approx(
        [10, 10]
    )


def test_two_schedulers_in_turn_for_one_state() -> None:
    """Run after run, each from the beginning of its schedule."""
    end = fit_one_cycle(FIVE, fit_one_cycle(FIVE, FIVE.init(), 1, lr=0.1), 1, lr=0.2)
    assert list(end.history.hypers["lr"]) == pytest.approx(
        [*LRS[::2], *(2 * lr for lr in LRS[::2])], rel=1e-6
    )


def test_a_callback_can_be_a_scheduler() -> None:
    def set_lr(state: State) -> State:
        return state.replace(hyper={**state.hyper, "lr": one_cycle(0.1)(state.pct_train)})

    end = fit(FIVE, FIVE.init(), 2, [on(before_batch=set_lr)])
    assert list(end.history.hypers["lr"]) == pytest.approx(LRS, rel=1e-6)


def test_a_schedule_that_counts_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="the schedule of 'lr' counts steps, but gets the share"):
        ParamScheduler({"lr": {"bias": step_decay(0.1, every=10), "weight": Linear(0.1, 0)}})
    ParamScheduler({"lr": step_decay(0.1, every=0.1)})


def test_what_is_no_schedule_is_refused_before_the_run() -> None:
    with pytest.raises(TypeError, match="expected a dict of schedules, got Linear"):
        ParamScheduler(Linear(0.1, 0))  # type: ignore[arg-type]
    for schedule in (0.1, {"bias": Linear(0.1, 0), "weight": 0.1}):
        with pytest.raises(TypeError, match="of 'lr' must be a function of the share .*, got 0.1"):
            ParamScheduler({"lr": schedule})
    with pytest.raises(TypeError, match="fit_one_cycle: hyper 'lr' must be a number, got a funct"):
        fit_one_cycle(FIVE, FIVE.init(), 1, lr=Linear(0.1, 0))


class Second(ParamScheduler):
    """One more, under a name of its own."""

    name = "second"


def test_two_schedulers_of_one_hyper_are_refused() -> None:
    both = [ParamScheduler({"lr": Constant(0.1)}), Second({"lr": Constant(0.2)})]
    with pytest.raises(ValueError, match="ParamScheduler: 'lr' is scheduled by 'second' in this"):
        fit(FIVE, FIVE.init(), 1, both)


def test_two_schedulers_of_two_hypers_are_none_of_each_others_business() -> None:
    both = [ParamScheduler({"lr": Constant(0.1)}), Second({"mom": Constant(0.2)})]
    end = fit(FIVE, FIVE.init(), 1, both)
    assert (set(end.history.hypers["lr"]), set(end.history.hypers["mom"])) == ({0.1}, {0.2})
