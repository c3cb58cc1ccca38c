"""Metrics, means over samples, the smooth loss, and the table of a run: numbers worked by hand."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from functional_sgd import sgd
from loop import (
    CancelBatch,
    CancelEpoch,
    CancelTrain,
    CancelValidate,
    DataLoaders,
    History,
    Learner,
    Recorder,
    State,
    accuracy,
    error_rate,
    fit,
    predict,
    trace,
    validate,
)
from loop.callbacks.recorder import recorded
from loop.metrics import add_batch, means, sample_count
from tests.comparing import assert_same
from tests.loop.helpers import (
    batches,
    learner,
    linear,
    loaders,
    losses,
    on,
    one_weight,
    raise_once,
    raiser,
)

BLANK = State({}, {}, {}, {})
MEASURED = [(0.7728, 4), (0.3670, 4), (0.5338, 2)]


def batch_of(value: float, count: int) -> tuple[Tensor, Tensor]:
    """A batch whose every input and target is this."""
    return torch.full((count, 1), value), torch.full((count, 1), value)


def plays(
    train: Sequence[tuple[float, int]],
    valid: Sequence[tuple[float, int]] | None = None,
    **rest: Any,
) -> Learner:
    """A learner whose batches have these losses: (loss, number of samples)."""
    data = DataLoaders(
        [batch_of(*item) for item in train], valid and [batch_of(*item) for item in valid]
    )
    return Learner(
        one_weight(), data, lambda pred, y: pred.sum() * 0 + y.mean(), sgd(lr=0.1), **rest
    )


def largest(pred: Tensor, y: Tensor) -> Tensor:
    """A metric."""
    return y.max()


def halved(pred: Tensor, y: Tensor) -> Tensor:
    """Another."""
    return y.mean() / 2


TWO = plays([(1.0, 1)], [(2.0, 1)], metrics=[halved])
TRAINED = plays([(1.0, 1)], [(2.0, 1)], metrics=[halved], callbacks=[Recorder(train_metrics=True)])


def test_accuracy_and_error_rate() -> None:
    pred, target = (
        torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6]]),
        torch.tensor([1, 0, 1, 1]),
    )
    assert (accuracy(pred, target).item(), error_rate(pred, target).item()) == (0.75, 0.25)


def test_accuracy_of_sequences() -> None:
    pred = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    assert accuracy(pred, torch.tensor([[1, 1]])).item() == 0.5


def test_means_are_weighted_by_samples() -> None:
    sums: Any = {}
    for value, count in MEASURED:
        state = BLANK.replace(
            loss=torch.tensor(value, dtype=torch.float64), yb=(torch.zeros(count),)
        )
        sums = add_batch(sums, state, (), "valid_loss")
    assert means(sums) == pytest.approx(
        {"valid_loss": (0.7728 * 4 + 0.3670 * 4 + 0.5338 * 2) / 10}, rel=1e-12
    )


def test_adding_a_batch_does_not_touch_the_sums() -> None:
    sums: Any = {}
    add_batch(sums, BLANK.replace(loss=torch.tensor(1.0), yb=(torch.zeros(2),)), (), "valid_loss")
    assert sums == {}


BOXES = [{"boxes": torch.ones(7, 4)}, {"boxes": torch.ones(1, 4)}]


@pytest.mark.parametrize(
    ("xb", "yb", "count"),
    [
        ((torch.ones(3, 2),), (torch.ones(3),), 3),
        ((torch.ones(3, 2),), (), 3),
        (({"a": torch.ones(5)},), (torch.tensor(1.0),), 5),
        ((1.0,), (), 1),
        ((torch.ones(2, 3, 8, 8),), (BOXES,), 2),  # the boxes of each image
        (([torch.ones(3, 8, 8), torch.ones(3, 4, 4)],), (BOXES,), 2),  # images of other sizes
        ((torch.ones(5, 2),), (BOXES,), 7),  # two targets of a batch, not of its samples
        ((torch.ones(5, 2),), ([torch.ones(5), torch.ones(5)],), 5),
    ],
)
def test_the_number_of_samples(xb: Any, yb: Any, count: int) -> None:
    assert sample_count(BLANK.replace(xb=xb, yb=yb)) == count


def test_validation_is_a_mean_over_samples() -> None:
    """Batches of .7728 (4 samples), .3670 (4) and .5338 (2): .56268, where the mean of means would
    be .55787.
    """
    mine = plays([(1.0, 1)], MEASURED, metrics=[halved])
    assert validate(mine, mine.init()) == pytest.approx(
        {"valid_loss": 0.56268, "halved": 0.28134}, rel=1e-6
    )


def test_the_row_of_a_run_has_the_same_means() -> None:
    mine = plays([(1.0, 1)], MEASURED)
    assert fit(mine, mine.init(), 1).history.column("valid_loss") == pytest.approx(
        [0.56268], rel=1e-6
    )


def test_batch_sizes_make_no_difference() -> None:
    x, y = (torch.cat(parts) for parts in zip(*batches(2, seed=2), strict=True))
    mine = learner()
    start = mine.init()
    one, uneven = (
        validate(mine, start, [(x, y)]),
        validate(mine, start, [(x[:7], y[:7]), (x[7:], y[7:])]),
    )
    assert one == pytest.approx(uneven, rel=1e-6)


SMOOTH = [0.99999905, 1.50504911, 2.01346564, 2.52524829]


def test_the_smooth_loss_while_the_run_lasts() -> None:
    mine = plays([(loss, 1) for loss in (1.0, 2.0, 3.0, 4.0)])
    seen = [
        float(recorded(state).smooth_loss)
        for event, state in trace(mine, mine.init())
        if event == "after_batch"
    ]
    assert seen == pytest.approx(SMOOTH, rel=2e-6)


def test_the_smooth_losses_of_the_history() -> None:
    mine = plays([(loss, 1) for loss in (1.0, 2.0, 3.0, 4.0)])
    end = fit(mine, mine.init(), 1)
    assert end.history.smooth_losses() == pytest.approx(SMOOTH, rel=2e-6)
    assert end.history.column("train_loss") == pytest.approx(SMOOTH[-1:], rel=2e-6)


def test_the_smooth_loss_by_definition() -> None:
    history = History(losses=History().losses.append(5.0).append(1.0))
    assert history.smooth_losses(beta=0.5) == pytest.approx([5.0, (0.5 * 2.5 + 0.5) / 0.75])


def test_the_smooth_loss_goes_on_over_epochs_and_starts_anew_with_a_run() -> None:
    mine = plays([(1.0, 1), (2.0, 1)])
    two = fit(mine, mine.init(), 2)
    assert two.history.column("train_loss") == pytest.approx(
        [SMOOTH[1], smooth([1, 2, 1, 2])], rel=2e-6
    )
    assert fit(mine, two, 1).history.column("train_loss")[2] == pytest.approx(SMOOTH[1], rel=2e-6)


def smooth(values: Sequence[float], beta: float = 0.98) -> float:
    """The last smooth loss, as a weighted mean."""
    weights = [beta ** (len(values) - 1 - index) for index in range(len(values))]
    return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)


def test_another_beta() -> None:
    mine = plays([(1.0, 1), (2.0, 1)])
    end = fit(mine, mine.init(), 1, [Recorder(beta=0.5)])
    assert end.history.column("train_loss") == pytest.approx([smooth([1, 2], 0.5)])


@pytest.mark.parametrize("beta", [-0.1, 1.0])
def test_a_beta_that_averages_nothing(beta: float) -> None:
    with pytest.raises(ValueError, match="Recorder: beta"):
        Recorder(beta=beta)


def test_every_training_loss_is_in_the_history() -> None:
    mine = plays([(1.0, 1), (2.0, 1)], [(9.0, 1)])
    assert losses(fit(mine, mine.init(), 2)) == [1.0, 2.0, 1.0, 2.0]


def test_the_columns_of_a_row() -> None:
    mine = plays([(1.0, 1)], [(2.0, 1)], metrics=[largest, halved])
    (row,) = fit(mine, mine.init(), 1).history.rows
    assert list(row) == ["epoch", "train_iter", "train_loss", "valid_loss", "largest", "halved"]
    assert row == pytest.approx(
        {
            "epoch": 0,
            "train_iter": 1,
            "train_loss": 1.0,
            "valid_loss": 2.0,
            "largest": 2.0,
            "halved": 1.0,
        }
    )


def test_the_columns_without_validation_data() -> None:
    mine = plays([(1.0, 1)], metrics=[largest])
    assert list(fit(mine, mine.init(), 1).history.rows[0]) == ["epoch", "train_iter", "train_loss"]


def test_metrics_of_training_are_means_over_the_epochs_samples() -> None:
    mine = plays(
        [(1.0, 1), (3.0, 3)], [(8.0, 1)], metrics=[halved], callbacks=[Recorder(train_metrics=True)]
    )
    rows = fit(mine, mine.init(), 2).history.rows
    names = [
        "epoch",
        "train_iter",
        "train_loss",
        "train_mean_loss",
        "train_halved",
        "valid_loss",
        "halved",
    ]
    assert list(rows[1]) == names
    assert [rows[1][name] for name in names[3:]] == pytest.approx([2.5, 1.25, 8.0, 4.0])


def test_there_is_one_recorder() -> None:
    mine = plays([(1.0, 1)], callbacks=[Recorder(beta=0.5)])
    assert len(fit(mine, mine.init(), 3).history.rows) == 3


def test_a_recorder_of_another_name_records_the_same() -> None:
    class Mine(Recorder):
        pass

    end = fit(TRAINED, TRAINED.init(), 2)
    mine = plays([(1.0, 1)], [(2.0, 1)], metrics=[halved], callbacks=[Mine(train_metrics=True)])
    assert fit(mine, mine.init(), 2).history == end.history


def test_a_column_that_was_not_measured_is_none() -> None:
    mine = plays([(1.0, 1)], [(2.0, 1)], metrics=[largest])
    (row,) = fit(mine, mine.init(), 1, [on(before_validate=raiser(CancelValidate))]).history.rows
    assert (row["train_loss"], row["valid_loss"], row["largest"]) == (1.0, None, None)


@pytest.mark.parametrize("order", [0, 100])
def test_an_epoch_cancelled_at_its_beginning_has_an_empty_row(order: int) -> None:
    """Not that of the epoch before."""
    rows = fit(
        TWO, TWO.init(), 2, [on(before_epoch=raise_once(CancelEpoch, at=1), order=order)]
    ).history.rows
    assert rows[1] == {
        "epoch": 1,
        "train_iter": 1,
        "train_loss": None,
        "valid_loss": None,
        "halved": None,
    }


@pytest.mark.parametrize("order", [0, 100])
def test_a_training_phase_cancelled_at_its_beginning_has_no_metrics(order: int) -> None:
    """Not those of the validation before."""
    rows = fit(
        TRAINED, TRAINED.init(), 2, [on(before_train=raise_once(CancelTrain, at=1), order=order)]
    ).history.rows
    assert (rows[1]["train_halved"], rows[1]["train_mean_loss"], rows[1]["valid_loss"]) == (
        None,
        None,
        2.0,
    )


@pytest.mark.parametrize("order", [0, 100])
def test_a_validation_cancelled_at_its_beginning_has_no_metrics(order: int) -> None:
    """Not those of the training, nor of the validation before."""
    spy = on(before_validate=raise_once(CancelValidate, at=1), order=order)
    rows = fit(TRAINED, TRAINED.init(), 2, [spy]).history.rows
    assert (rows[1]["valid_loss"], rows[1]["halved"], rows[1]["train_halved"]) == (None, None, 0.5)


def test_a_cancelled_batch_is_not_in_the_means() -> None:
    mine = plays([(1.0, 1)], [(2.0, 1), (4.0, 1)])
    spy = on(after_pred=raise_once(CancelBatch, at=2))
    assert fit(mine, mine.init(), 1, [spy]).history.column("valid_loss") == [2.0]


def test_the_hypers_of_every_batch_are_recorded() -> None:
    mine = plays([(1.0, 1), (1.0, 1)])
    halve = on(
        before_batch=lambda state: state.replace(hyper={**state.hyper, "lr": state.hyper["lr"] / 2})
    )
    end = fit(mine, mine.init(), 2, [halve], lr=0.8)
    assert list(end.history.hypers["lr"]) == [0.4, 0.2, 0.1, 0.05]


def test_the_history_goes_on_from_run_to_run() -> None:
    first = fit(TWO, TWO.init(), 2)
    assert fit(TWO, first, 1).history.column("train_iter") == [1, 2, 3]
    assert len(first.history.rows) == 2


@pytest.mark.parametrize("look", [validate, predict])
def test_looking_does_not_touch_the_history(look: Any) -> None:
    end = fit(TWO, TWO.init(), 1)
    look(TWO, end)
    assert (len(end.history.rows), len(end.history.losses)) == (1, 1)
    assert fit(TWO, end, 1).history.column("valid_loss") == [2.0, 2.0]


def test_predictions_of_uneven_batches_are_joined() -> None:
    mine = learner(linear())
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    assert_same(
        predict(mine, mine.init(), [(x[:3],), (x[3:],)]), (x @ mine.model.weight.T).detach()
    )


def test_predictions_without_a_tuple() -> None:
    mine = learner(linear())
    assert predict(mine, mine.init(), [torch.ones(3, 2)]).shape == (3, 2)


def test_several_inputs_and_targets() -> None:
    class Add(torch.nn.Linear):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(a + b)

    data = DataLoaders([(torch.ones(3, 2), torch.ones(3, 2), torch.zeros(3, 2), torch.zeros(3, 2))])
    mine = learner(Add(2, 2), data, lambda pred, y, z: mse_loss(pred, y + z), n_inputs=2)
    assert fit(mine, mine.init(), 1).train_iter == 1


def test_x_and_y_without_the_tuples() -> None:
    running = trace(learner(data=loaders()), learner().init())
    state = next(state for event, state in running if event == "before_batch")
    running.close()
    assert state.x is state.xb[0]
    assert state.y is state.yb[0]
    assert state.replace(xb=(1, 2)).x == (1, 2)
