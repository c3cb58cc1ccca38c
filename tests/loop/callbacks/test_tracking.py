"""EarlyStopping and ReduceLROnPlateau: what they count, when they act, and what is left
afterwards.
"""

import math
from collections.abc import Sequence
from typing import Any

import pytest
from torch import Tensor

from functional_sgd import adamw, sgd
from functional_sgd.schedules import Constant
from loop import (
    CancelEpoch,
    CancelFit,
    DataLoaders,
    EarlyStopping,
    Learner,
    ParamScheduler,
    Progress,
    ReduceLROnPlateau,
    State,
    fit,
    fit_one_cycle,
    validate,
)
from loop.callbacks.tracking import Tracked, better, lower_lr, mode_of
from tests.loop.helpers import (
    Kept,
    assert_at_rest,
    assert_same_run,
    batches,
    everywhere,
    learner,
    loaders,
    on,
    raiser,
)

NAN, INF = float("nan"), float("inf")


def mean(pred: Tensor, *_: Tensor) -> Tensor:
    """The loss, and a metric of this name."""
    return pred.mean()


def measuring(values: Sequence[float], **rest: Any) -> tuple[Learner, Any]:
    """A learner, and a callback by which the validation gives these values, as valid_loss and as
    mean.
    """

    def give(state: State) -> State | None:
        return None if state.training else state.replace(pred=state.pred * 0 + values[state.epoch])

    return learner(data=loaders(1, 1), loss=mean, metrics=[mean], **rest), on(
        "give", after_pred=give
    )


def epochs_until_stopped(values: Sequence[float], *callbacks: Any) -> int:
    """How many epochs were run."""
    mine, give = measuring(values)
    return len(fit(mine, mine.init(), len(values), [give, *callbacks]).history.rows)


@pytest.mark.parametrize(
    ("values", "options", "why"),
    [
        (
            [5, 4, 4, 4],
            dict(patience=2),
            "3: valid_loss has not got better than 4.000000 (patience=2)",
        ),
        ([NAN, 1], {}, "0: valid_loss has not been a number (patience=1)"),
        (
            [1, 1.05, 2],
            dict(monitor="mean", min_delta=0.1),
            "1: mean has not got better than 1.000000 (patience=1, min_delta=0.1)",
        ),
    ],
)
def test_the_state_says_why_the_run_was_stopped(
    values: list[float], options: dict[str, Any], why: str
) -> None:
    mine, give = measuring(values)
    end = fit(mine, mine.init(), len(values), [give, EarlyStopping(**options)])
    assert end.memory["ended"] == f"EarlyStopping after epoch {why}"


def lrs(values: Sequence[float], *callbacks: Any) -> list[float]:
    """lr in every epoch, and after the run."""
    mine, give = measuring(values, opt=sgd(lr=1.0))
    end = fit(mine, mine.init(), len(values), [give, *callbacks])
    return [*end.history.hypers["lr"], end.hyper["lr"]]


@pytest.mark.parametrize(
    ("values", "options", "epochs"),
    [
        ([5, 4, 4.05, 3.95, 3], dict(min_delta=0.1, patience=2), 4),  # fastai's example
        ([5, 4, 4.05, 3.95, 3], dict(patience=2), 5),
        ([5, 4, 4.05, 3.95, 3], {}, 3),
        ([5, 4, 3, 2, 1], {}, 5),
        ([1, 1, 1], {}, 2),
        ([1, 2, 0, 1, 2, 3], dict(patience=3), 6),
        ([1, 2, 0, 1, 2, 3, 9], dict(patience=3), 6),
        ([1, 2, 3, 3, 4], dict(mode="max"), 4),
        ([1, 2, 3, 3, 4], dict(monitor="mean"), 4),
        ([3, 2, 2, 1], dict(monitor="mean", mode="min"), 3),
        ([1, 1.05, 2, 3], dict(monitor="mean", min_delta=0.1), 2),
        ([NAN, 1, 0], {}, 1),
        ([NAN, 1, 0], dict(patience=2), 3),
        ([INF, 1], {}, 1),
        ([2, NAN, 1], dict(patience=2), 3),
    ],
)
def test_fr4_the_run_ends_when_nothing_gets_better(
    values: list[float], options: dict[str, Any], epochs: int
) -> None:
    assert epochs_until_stopped(values, EarlyStopping(**options)) == epochs


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        ([3, 2, 1], {}, [1, 1, 1, 1]),
        ([1, 1, 1, 1], {}, [1, 1, 0.1, 0.01, 0.001]),
        ([1, 1, 1, 1], dict(patience=2), [1, 1, 1, 0.1, 0.1]),
        (
            [1, 1, 1, 1, 1],
            dict(patience=2),
            [1, 1, 1, 0.1, 0.1, 0.01],
        ),  # counted anew after each cut
        ([1, 1, 0, 1], dict(patience=2), [1, 1, 1, 1, 1]),
        ([1, 1, 1], dict(factor=2.0), [1, 1, 0.5, 0.25]),
        ([1, 1, 1, 1], dict(min_lr=0.05), [1, 1, 0.1, 0.05, 0.05]),
        ([1, 1, 1], dict(min_lr=5.0), [1, 1, 1, 1]),  # never raised
        ([1, 0.95, 0.8], dict(min_delta=0.1), [1, 1, 0.1, 0.1]),
    ],
)
def test_fr4_lr_is_lowered_when_nothing_gets_better(
    values: list[float], options: dict[str, Any], expected: list[float]
) -> None:
    assert lrs(values, ReduceLROnPlateau(**options)) == pytest.approx(expected, rel=1e-15)


def test_options_by_place() -> None:
    assert EarlyStopping("mean", 3) == EarlyStopping(monitor="mean", patience=3)
    assert ReduceLROnPlateau("mean", 3, 2.0, 0.1) == ReduceLROnPlateau(
        "mean", 3, factor=2.0, min_lr=0.1
    )


def test_both_at_once_in_either_order() -> None:
    """lr is lowered before the run is ended, as in fastai."""
    both: list[Any] = [EarlyStopping(patience=2), ReduceLROnPlateau(patience=2)]
    assert lrs([1, 1, 1, 1], *both) == lrs([1, 1, 1, 1], *reversed(both)) == [1, 1, 1, 0.1]


def test_the_lr_of_an_epoch_that_was_not_better_is_lowered_for_the_next_run_too() -> None:
    mine, give = measuring([1, 1, 1], opt=sgd(lr=1.0))
    first = fit(mine, mine.init(), 2, [give, ReduceLROnPlateau()])
    assert list(fit(mine, first, 1).history.hypers["lr"]) == [1, 1, 0.1]
    assert list(fit(mine, first, 1, lr=1.0).history.hypers["lr"]) == [1, 1, 1]


def test_a_tree_of_lrs_is_lowered_leaf_by_leaf() -> None:
    mine, give = measuring([1, 1])
    start = mine.init().replace(hyper={"lr": {"weight": 1.0, "bias": 0.5}, "mom": 0.9})
    end = fit(mine, start, 2, [give, ReduceLROnPlateau(factor=4.0, min_lr=0.2)])
    assert end.hyper == {"lr": {"weight": 0.25, "bias": 0.2}, "mom": 0.9}
    assert start.hyper["lr"] == {"weight": 1.0, "bias": 0.5}


def test_what_is_remembered() -> None:
    mine, give = measuring([3, 2, 2.5, 2.5])
    end = fit(
        mine, mine.init(), 4, [give, EarlyStopping(patience=5), ReduceLROnPlateau(patience=2)]
    )
    assert end.memory["early_stopping"] == Tracked(2.0, 2)
    assert end.memory["reduce_lr_on_plateau"] == Tracked(2.0, 0)


def test_every_run_starts_anew() -> None:
    mine, give = measuring([1, 2])
    stopper = EarlyStopping(patience=2)
    middle = fit(mine, mine.init(), 2, [give, stopper])
    end = fit(
        mine, middle, 2, [on("give", after_pred=lambda s: s.replace(pred=s.pred * 0 + 5)), stopper]
    )
    assert end.memory["early_stopping"] == Tracked(5.0, 1)


def test_a_run_can_go_on_from_the_best_of_those_before_it() -> None:
    mine, give = measuring([1, 2])
    stopper = EarlyStopping(patience=2, reset_on_fit=False)
    middle = fit(mine, mine.init(), 2, [give, stopper])
    end = fit(
        mine, middle, 1, [on("give", after_pred=lambda s: s.replace(pred=s.pred * 0 + 5)), stopper]
    )
    assert (middle.memory["early_stopping"], end.memory["early_stopping"]) == (Tracked(1, 1),) * 2


def test_an_epoch_without_a_measurement_does_not_count() -> None:
    def skip(state: State) -> None:
        if state.epoch in (1, 2):
            raise CancelEpoch(state)

    skipped = on("skip", before_train=skip)
    assert epochs_until_stopped([1, 9, 9, 9, 9], skipped, EarlyStopping()) == 4
    assert lrs([1, 9, 9, 9], skipped, ReduceLROnPlateau()) == [1, 1, 0.1]


def test_the_last_row_is_shown_before_the_run_ends(capsys: pytest.CaptureFixture[str]) -> None:
    epochs_until_stopped([1, 1, 1], EarlyStopping(), Progress())
    *shown, why = capsys.readouterr().out.splitlines()
    assert len(shown) == 1 + 2
    assert why.startswith("stopped by EarlyStopping after epoch 1:")


def test_the_events_of_a_run_that_is_stopped() -> None:
    seen: list[str] = []
    epochs_until_stopped(
        [1, 1, 1], EarlyStopping(), everywhere(lambda event, state: seen.append(event), "all", 99)
    )
    assert seen[-3:] == ["after_validate", "after_cancel_fit", "after_fit"]


def test_a_monitor_that_is_no_column() -> None:
    mine = learner(metrics=[mean])
    with pytest.raises(
        ValueError, match="EarlyStopping: the history has no column 'men'. Did you mean 'mean'"
    ):
        fit(mine, mine.init(), 1, [EarlyStopping("men")])


@pytest.mark.parametrize("make", [EarlyStopping, ReduceLROnPlateau])
def test_a_validation_loss_without_validation(make: Any) -> None:
    """Known before anything is trained."""
    mine = learner(data=loaders(valid=None))
    trained = on("train", 99, before_train=raiser(AssertionError))
    with pytest.raises(
        ValueError, match=f"{make.__name__}: there is no 'valid_loss' without validation data"
    ):
        fit(mine, mine.init(), 1, [make(), trained])


def test_the_training_loss_can_be_watched() -> None:
    mine = learner(data=loaders(valid=None))
    end = fit(mine, mine.init(), 2, [EarlyStopping("train_loss")])
    assert end.memory["early_stopping"].best == min(end.history.column("train_loss"))


def test_lr_that_is_scheduled_cannot_be_lowered() -> None:
    """fastai lets the schedule win in silence."""
    mine = learner(callbacks=[ReduceLROnPlateau()])
    with pytest.raises(
        ValueError, match="ReduceLROnPlateau: 'lr' is scheduled by 'param_scheduler' in this run"
    ):
        fit_one_cycle(mine, mine.init(), 1, 0.1)


def test_mom_may_be_scheduled_where_lr_is_lowered() -> None:
    assert lrs([1, 1], ReduceLROnPlateau()) == [1, 1, 0.1]
    mine, give = measuring([1, 1])
    end = fit(
        mine, mine.init(), 2, [give, ReduceLROnPlateau(), ParamScheduler({"mom": Constant(0.5)})]
    )
    assert end.hyper == {"lr": pytest.approx(0.01), "mom": 0.9}


def test_an_optimizer_that_has_no_lr_yet() -> None:
    mine = learner()
    with pytest.raises(ValueError, match="ReduceLROnPlateau: state.hyper has no 'lr' to change"):
        fit(mine, mine.init().replace(hyper={}), 1, [ReduceLROnPlateau()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mode="minimum"), "mode must be 'min', 'max' or None"),
        (dict(patience=0), "patience must be a whole number of epochs, at least 1, got 0"),
        (dict(patience=1.5), "patience must be a whole number of epochs, at least 1, got 1.5"),
        (dict(min_delta=-1.0), "min_delta must be 0 or more, got -1.0"),
        (dict(factor=1.0), "factor divides lr, so it must be above 1, got 1.0"),
        (dict(min_lr=-1.0), "min_lr must be 0 or more, got -1.0"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"ReduceLROnPlateau: {message}"):
        ReduceLROnPlateau(**options)


def test_validate_with_trackers_at_hand() -> None:
    """fastai fails here."""
    plain, mine = learner(), learner(callbacks=[EarlyStopping(), ReduceLROnPlateau()])
    assert validate(mine, mine.init()) == validate(plain, plain.init())


def test_a_run_that_is_cancelled_leaves_the_counters_as_they_were() -> None:
    mine, give = measuring([3, 2, 9])

    def cancel(state: State) -> None:
        if state.epoch == 2 and not state.training:
            raise CancelFit(state)

    end = fit(mine, mine.init(), 3, [give, EarlyStopping(), on("cancel", after_loss=cancel)])
    assert end.memory["early_stopping"] == Tracked(2.0, 0)
    assert_at_rest(end)


def test_a_resumed_run_counts_on() -> None:
    mine, give = measuring([1, 2, 3, 4, 5], opt=adamw())
    callbacks = [give, EarlyStopping(patience=3), ReduceLROnPlateau(patience=2)]

    def fail(state: State) -> None:
        if state.epoch == 2:
            raise KeyError

    with pytest.raises(KeyError) as caught:
        fit(mine, mine.init(), 5, [*callbacks, on("fail", after_step=fail)])
    found = fit(mine, caught.value.state, 5, callbacks, resume=True)  # type: ignore[attr-defined]
    assert_same_run(found, fit(mine, mine.init(), 5, callbacks))
    assert len(found.history.rows) == 4


def test_the_state_given_is_not_touched() -> None:
    mine, give = measuring([1, 1, 1])
    kept = Kept(mine.init())
    fit(mine, kept.state, 3, [give, ReduceLROnPlateau(), EarlyStopping(patience=2)])
    kept.check()


def test_better_by_more_than_min_delta() -> None:
    assert not better(1.0, 1.0, "min")
    assert not better(0.75, 1.0, "min", 0.25)
    assert better(0.5, 1.0, "min", 0.25)
    assert not better(1.25, 1.0, "max", 0.25)
    assert better(1.5, 1.0, "max", 0.25)
    assert not better(math.nan, None, "min")
    assert [mode_of(name) for name in ("train_loss", "error_rate", "accuracy")] == [
        "min",
        "min",
        "max",
    ]


def test_lowering_lr_leaves_the_other_hypers() -> None:
    before = learner(data=DataLoaders(batches(1, 1))).init()
    assert lower_lr(before, 2.0).hyper == {"lr": 0.05, "mom": 0.9}
