"""torch's schedulers in runs that are stopped, resumed, cancelled or sent back; and what is no
scheduler.
"""

from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as schedulers

from functional_sgd.schedules import Constant
from loop import (
    CancelEpoch,
    CancelFit,
    CancelTrain,
    CancelValidate,
    ParamScheduler,
    RecordValues,
    State,
    TorchScheduler,
    fit,
    validate,
)
from loop.callbacks.torch_schedule import Taken
from tests.comparing import assert_same
from tests.loop.callbacks.test_torch_scheduler import (
    BATCHES,
    BY_BATCH,
    EPOCHS,
    LR,
    MOM,
    SCHEDULERS,
    in_torch,
)
from tests.loop.helpers import (
    Kept,
    assert_same_run,
    everywhere,
    learned,
    learner,
    loaders,
    on,
    raise_once,
    raiser,
)

MINE = learner(data=loaders(train=BATCHES, valid=2))
ONE_CYCLE = SCHEDULERS["OneCycleLR"]


@pytest.mark.parametrize(
    ("event", "at"), [("after_loss", 13), ("before_validate", 2), ("before_epoch", 1)]
)
@pytest.mark.parametrize(
    ("name", "every"),
    [*((name, "batch") for name in BY_BATCH), *((name, "epoch") for name in SCHEDULERS)],
)
def test_a_run_can_be_stopped_and_resumed(name: str, every: str, event: str, at: int) -> None:
    callbacks = [TorchScheduler(SCHEDULERS[name], every)]
    failing = on("failing", 99, **{event: raise_once(KeyError(), at)})
    with pytest.raises(KeyError) as caught:
        fit(MINE, MINE.init(), EPOCHS, [*callbacks, failing])
    found = fit(MINE, caught.value.state, EPOCHS, callbacks, resume=True)  # type: ignore[attr-defined]
    assert_same_run(found, fit(MINE, MINE.init(), EPOCHS, callbacks))


def test_a_run_can_go_back_to_an_earlier_state() -> None:
    """The schedule is where the state is, whatever it was a moment ago."""
    states: list[State] = []

    def note(state: State) -> State | None:
        if state.training:
            states.append(state)
        return state.back_to(states[1]) if len(states) == 4 else None

    end = fit(MINE, MINE.init(), 2, [TorchScheduler(ONE_CYCLE), on("note", 99, after_batch=note)])
    plain = in_torch(ONE_CYCLE, "batch")
    used = [(state.history.hypers["lr"][-1], state.history.hypers["mom"][-1]) for state in states]
    assert used == [plain[step] for step in (0, 1, 2, 3, 2, 3, 4, 5, 6, 7)]
    assert end.hyper == {"lr": LR, "mom": MOM}


def test_a_run_can_go_back_to_a_state_from_before_it() -> None:
    """The schedule begins anew there."""
    start, seen = MINE.init(), list[float]()

    def undo(state: State) -> State | None:
        return state.back_to(start) if state.train_iter == 2 and len(seen) == 2 else None

    back = on("back", 99, after_batch=undo)
    note = on(
        "note",
        98,
        after_loss=lambda state: seen.append(state.hyper["lr"]) if state.training else None,
    )
    step = partial(schedulers.ExponentialLR, gamma=0.5)
    end = fit(MINE, start, 1, [TorchScheduler(step), back, note])
    assert seen == [0.1, 0.05, 0.1, 0.05, 0.025]
    assert end.hyper == {"lr": LR, "mom": MOM}
    assert "torch_scheduler" not in end.memory


@pytest.mark.parametrize("signal", [CancelTrain, CancelEpoch])
def test_a_batch_that_an_outer_signal_ends_counts(signal: type[Exception]) -> None:
    """Two batches are trained in every epoch, the second of which has no after_batch."""

    def stop(state: State) -> None:
        if state.iter == 1:
            raise signal

    halve = TorchScheduler(partial(schedulers.ExponentialLR, gamma=0.5))
    end = fit(MINE, MINE.init(), 3, [halve, on(after_step=stop)])
    lrs = [0.1, 0.05, 0.025, 0.0125, 0.00625, 0.003125]
    assert list(end.history.hypers["lr"]) == pytest.approx(lrs, rel=1e-12)


@pytest.mark.parametrize("order", [0, 100])
@pytest.mark.parametrize("event", ["before_fit", "before_batch", "after_step", "after_epoch"])
def test_the_hypers_are_put_back_after_a_signal(event: str, order: int) -> None:
    cancel = on("cancel", order, **{event: raiser(CancelFit)})
    end = fit(MINE, MINE.init(), 2, [TorchScheduler(ONE_CYCLE), cancel])
    assert end.hyper == {"lr": LR, "mom": MOM}
    assert "torch_scheduler" not in end.memory


def test_a_hyper_that_nobody_had_given_is_gone_after_the_run() -> None:
    bare = MINE.init().replace(hyper={"lr": LR})
    end = fit(MINE, bare, 1, [TorchScheduler(ONE_CYCLE)])
    assert end.history.hypers["mom"][0] == 0.95
    assert end.hyper == {"lr": LR}


@pytest.mark.parametrize("first", [True, False])
def test_others_see_a_batch_with_the_lr_that_it_was_trained_with(first: bool) -> None:
    """Wherever the scheduler is in the list."""
    halve = TorchScheduler(partial(schedulers.ExponentialLR, gamma=0.5))
    record = RecordValues(lr=lambda state: state.hyper["lr"])
    end = fit(MINE, MINE.init(), 1, [halve, record] if first else [record, halve])
    assert list(end.memory["record_values"]["lr"])[:3] == [0.1, 0.05, 0.025]
    assert list(end.memory["record_values"]["lr"]) == list(end.history.hypers["lr"])


def test_what_is_remembered_is_plain() -> None:
    """So that it can be saved."""
    kept: list[Any] = []
    note = everywhere(
        lambda event, state: kept.append(state.memory.get("torch_scheduler")), "note", 100
    )
    end = fit(
        MINE, MINE.init(), 1, [TorchScheduler(SCHEDULERS["ReduceLROnPlateau"], "epoch"), note]
    )
    start = {"lr": LR, "mom": MOM}
    assert kept[0] == Taken(start, ("lr",))
    assert kept[-2] == Taken(start, ("lr",), 1, (end.history.rows[-1]["valid_loss"],))


def test_an_epoch_that_was_not_measured_is_no_plateau() -> None:
    plateau = partial(schedulers.ReduceLROnPlateau, patience=0, mode="max", threshold=1e9)
    skip = on("skip", before_validate=raise_once(CancelValidate, at=1))
    end = fit(MINE, MINE.init(), 4, [TorchScheduler(plateau, "epoch"), skip])
    assert list(end.history.hypers["lr"])[::BATCHES] == pytest.approx([0.1, 0.1, 0.1, 0.01])


def test_another_column_can_be_watched() -> None:
    plateau = partial(schedulers.ReduceLROnPlateau, patience=0, mode="max", threshold=1e9)
    mine = learner(data=loaders(1, None))
    end = fit(mine, mine.init(), 3, [TorchScheduler(plateau, "epoch", monitor="train_loss")])
    assert list(end.history.hypers["lr"]) == pytest.approx([0.1, 0.1, 0.01])
    with pytest.raises(
        ValueError, match="TorchScheduler: there is no 'valid_loss' without validation data"
    ):
        fit(mine, mine.init(), 1, [TorchScheduler(plateau, "epoch")])


def test_the_state_given_is_not_touched() -> None:
    kept = Kept(MINE.init())
    fit(MINE, kept.state, 1, [TorchScheduler(ONE_CYCLE)])
    kept.check()


def test_validate_with_a_scheduler_at_hand() -> None:
    mine = learner(callbacks=[TorchScheduler(SCHEDULERS["StepLR"])])
    assert validate(mine, mine.init()) == validate(learner(), mine.init())


def test_a_constant_scheduler_changes_nothing() -> None:
    same = TorchScheduler(partial(schedulers.LambdaLR, lr_lambda=lambda step: 1.0))
    assert_same(learned(fit(MINE, MINE.init(), 2, [same])), learned(fit(MINE, MINE.init(), 2)))


OTHER = torch.optim.SGD([torch.zeros(1)], lr=1.0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            dict(make=schedulers.StepLR(OTHER, 3)),
            TypeError,
            "make must be a function from an optimizer to a scheduler",
        ),
        (
            dict(make=SCHEDULERS["StepLR"], every="step"),
            ValueError,
            "every must be 'batch' or 'epoch', got 'step'",
        ),
        (dict(make=lambda optimizer: None), TypeError, "make returned no scheduler, but None"),
        (
            dict(make=lambda optimizer: schedulers.StepLR(OTHER, 3)),
            ValueError,
            "a scheduler of another optimizer",
        ),
        (
            dict(make=SCHEDULERS["ReduceLROnPlateau"]),
            ValueError,
            "looks at epochs. Pass every='epoch'",
        ),
    ],
)
def test_what_cannot_be_scheduled(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"TorchScheduler: .*{message}"):
        fit(MINE, MINE.init(), 1, [TorchScheduler(**options)])


def test_two_schedulers_of_momentum() -> None:
    """What a scheduler of torch sets is known once it is made."""
    second = ParamScheduler({"mom": Constant(0.9)})
    with pytest.raises(ValueError, match="TorchScheduler: 'mom' is scheduled by 'param_scheduler'"):
        fit(MINE, MINE.init(), 1, [TorchScheduler(ONE_CYCLE), second])


def test_momentum_can_be_scheduled_beside_a_scheduler_that_leaves_it_alone() -> None:
    halve = TorchScheduler(partial(schedulers.ExponentialLR, gamma=0.5))
    end = fit(MINE, MINE.init(), 1, [halve, ParamScheduler({"mom": Constant(0.5)})])
    assert set(end.history.hypers["mom"]) == {0.5}


def test_two_schedulers_of_lr() -> None:
    with pytest.raises(
        ValueError, match="ParamScheduler: 'lr' is scheduled by 'torch_scheduler' in this run"
    ):
        fit(
            MINE, MINE.init(), 1, [TorchScheduler(ONE_CYCLE), ParamScheduler({"lr": Constant(0.1)})]
        )
