"""Metrics: numbers worked by hand, names and mistakes, and what the Recorder does with them."""

from dataclasses import replace
from math import exp, isnan, nan, sqrt
from typing import Any

import pytest
import torch

from functional_sgd import sgd
from loop import DataLoaders, Learner, Recorder, accuracy, fit, validate
from loop.metrics import (
    F1,
    R2,
    RMSE,
    CohenKappa,
    ConfusionMatrix,
    ExplainedVariance,
    JaccardCoeff,
    Matthews,
    Pearson,
    Perplexity,
    Precision,
    Recall,
    Spearman,
    Weighted,
    accuracy_multi,
    confusion_matrix,
    mae,
    metric_name,
    metrics_by_name,
    mse,
    msle,
    top_k_accuracy,
)
from tests.loop.helpers import on, one_weight
from tests.loop.metrics.test_metrics import fold, right_tokens, tokens

SCORES = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
TRUTH = torch.tensor([1, 1, 1, 0, 0])  # tp 2, fn 1, fp 1, tn 1


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        (F1(), 4 / 6),
        (Precision(), 2 / 3),
        (Recall(), 2 / 3),
        (F1("macro"), (4 / 6 + 2 / 4) / 2),
        (F1("micro"), 3 / 5),
        (F1("weighted"), (3 * 4 / 6 + 2 * 2 / 4) / 5),
        (JaccardCoeff(axis=-1), 2 / 4),
        (ConfusionMatrix(), 3 / 5),
        (CohenKappa(), (3 / 5 - (3 * 3 + 2 * 2) / 25) / (1 - (3 * 3 + 2 * 2) / 25)),
        (Matthews(), (2 * 1 - 1 * 1) / sqrt(3 * 3 * 2 * 2)),
    ],
    ids=str,
)
def test_two_classes_by_hand(metric: Any, value: float) -> None:
    assert metric(SCORES, TRUTH) == pytest.approx(value, rel=1e-15)


def test_rows_of_the_confusion_matrix_are_targets() -> None:
    assert confusion_matrix(SCORES, TRUTH).tolist() == [[1, 1], [1, 2]]
    assert confusion_matrix(SCORES, TRUTH.to(torch.uint8), ignore_index=0).tolist() == [
        [0, 0],
        [1, 2],
    ]


def test_classes_that_nobody_has_or_gives_do_not_count_but_labels_do() -> None:
    scores, truth = torch.eye(3)[[0, 1]], torch.tensor([0, 1])
    assert F1("macro")(scores, truth) == 1.0
    assert F1("macro", threshold=0.6)(scores, torch.eye(3)[[0, 1]]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("metric", [F1(), Precision(), Recall(), JaccardCoeff(axis=-1)], ids=str)
def test_nothing_given_and_nothing_wanted_is_0(metric: Any) -> None:
    assert metric(torch.tensor([[1.0, 0.0]]), torch.tensor([0])) == 0.0


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        (mse, 5 / 3),
        (mae, 1.0),
        (RMSE(), sqrt(5 / 3)),
        (R2(), 1 - 5 / 2),
        (ExplainedVariance(), 1 - (14 / 3) / 2),
    ],
    ids=metric_name,
)
def test_numbers_by_hand(metric: Any, value: float) -> None:
    """Errors -1, 0, 2: squares 5; of mean 1/3, so 5 - 3 / 9 around it; targets deviate by
    1, 0, 1.
    """
    assert float(
        metric(torch.tensor([0.0, 2.0, 5.0]), torch.tensor([1.0, 2.0, 3.0]))
    ) == pytest.approx(value, rel=1e-6)


def test_correlations_by_hand() -> None:
    """Ranks 1, 2.5, 2.5, 4 with 1, 2, 3, 4: products 4.5, squares 4.5 and 5."""
    pred, target = torch.tensor([1.0, 2.0, 2.0, 10.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert Spearman()(pred, target) == pytest.approx(4.5 / sqrt(4.5 * 5), rel=1e-14)
    assert Pearson()(pred, target) == pytest.approx(13.5 / sqrt(52.75 * 5), rel=1e-14)


@pytest.mark.parametrize(("pred", "value"), [([2.0, 2.0], 1.0), ([2.0, 3.0], 0.0), ([2.0], nan)])
def test_r2_where_targets_do_not_vary(pred: list[float], value: float) -> None:
    assert R2()(torch.tensor(pred), torch.full((len(pred),), 2.0)) == pytest.approx(
        value, nan_ok=True
    )


def test_moments_do_not_cancel() -> None:
    """Sums of squares in float64 would leave nothing of a variance of 1 beside a mean of 1e9."""
    x = torch.tensor([1e9, 1e9 + 1, 1e9 + 2, 1e9 + 3], dtype=torch.float64)
    batches = [(x[:3] + torch.tensor([0.5, 0.0, -0.5]), x[:3]), (x[3:], x[3:])]
    metric = Pearson()
    assert metric.value(fold(metric, batches)) == pytest.approx(4.0 / sqrt(3.5 * 5), rel=1e-9)


def test_functions_of_one_batch_by_hand() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    assert [top_k_accuracy(k)(scores, torch.tensor([1, 0])).item() for k in (1, 2, 3)] == [
        0.0,
        0.5,
        1.0,
    ]
    shares = torch.tensor([[0.6, 0.4]])
    assert accuracy_multi(0.5, sigmoid=False)(shares, torch.tensor([[1, 1]])).item() == 0.5
    assert accuracy_multi(0.5)(shares, torch.tensor([[1, 1]])).item() == 1.0
    assert msle(torch.tensor([exp(2) - 1]), torch.tensor([0.0])).item() == pytest.approx(4.0)


def test_perplexity_counts_tokens_not_samples() -> None:
    """Three tokens, of which the model is sure of one and torn between two for two: exp(2 ln 2 /
    3).
    """
    sure, torn = [0.0, -1e9], [0.0, 0.0]
    pred = torch.tensor([[sure, torn], [torn, sure]], dtype=torch.float64)
    target = torch.tensor([[0, 1], [0, -100]])
    metric = Perplexity()
    uneven = fold(metric, [(pred[:1], target[:1]), (pred[1:], target[1:])])
    assert metric.value(uneven) == pytest.approx(2 ** (2 / 3), rel=1e-12)


def test_weights_of_zero_count_nothing_whatever_the_measure() -> None:
    metric = Weighted(right_tokens, tokens)
    padding = torch.zeros(1, 2, 2), torch.full((1, 2), -1)
    assert isnan(float(right_tokens(*padding)))
    assert (
        metric.value(fold(metric, [padding, (torch.eye(2)[None], torch.tensor([[0, 0]]))])) == 0.5
    )


@pytest.mark.parametrize("metric", [F1(), F1, 3])
def test_weighted_takes_functions(metric: Any) -> None:
    with pytest.raises(TypeError, match="Weighted: metric must be a function"):
        Weighted(metric, tokens)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="F1: average must be one of"):
        F1("mean")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="average='binary' needs scores of 2 classes along axis -1"
    ):
        F1()(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"RMSE: pred and target .* \(2, 3\) and \(2,\)"):
        RMSE()(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match="CohenKappa: weights"):
        CohenKappa("cubic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="top_k_accuracy: k"):
        top_k_accuracy(0)


def test_fewer_classes_than_k_are_refused() -> None:
    message = "top_5_accuracy: expected scores of 5 classes or more, got 3. Use top_k_accuracy"
    with pytest.raises(ValueError, match=message):
        top_k_accuracy(5)(torch.zeros(2, 3), torch.tensor([1, 0]))


def test_names_of_columns() -> None:
    metrics = [
        accuracy,
        F1(),
        F1("macro"),
        Precision("micro"),
        R2(),
        RMSE(),
        top_k_accuracy(5),
        Weighted(mae, tokens),
    ]
    names = ["accuracy", "f1", "f1_macro", "precision_micro", "r2", "rmse", "top_5_accuracy", "mae"]
    assert list(metrics_by_name(metrics)) == names


X = torch.tensor([[1.0], [2.0], [4.0], [8.0], [0.0], [3.0]])
Y = torch.tensor([[1.0], [1.0], [5.0], [5.0], [1.0], [3.0]])


def plays(*metrics: Any, **rest: Any) -> Learner:
    """pred = x, measured on batches of 3, 1 and 2."""
    batches = [(X[part], Y[part]) for part in (slice(0, 3), slice(3, 4), slice(4, 6))]
    return Learner(one_weight(), DataLoaders(batches, batches), mse, sgd(lr=0.0), metrics, **rest)


def test_the_recorder_records_both_kinds() -> None:
    mine = plays(mae, R2(), RMSE())
    expected = {"valid_loss": 2.0, "mae": 1.0, "r2": R2()(X, Y), "rmse": sqrt(2.0)}
    assert validate(mine, mine.init()) == pytest.approx(expected)
    (row,) = fit(mine, mine.init(), 1).history.rows
    assert {name: row[name] for name in expected} == pytest.approx(expected)


def test_the_recorder_records_both_kinds_in_training() -> None:
    mine = plays(mae, R2(), callbacks=[Recorder(train_metrics=True)])
    for row in fit(mine, mine.init(), 2).history.rows:
        assert (row["train_mae"], row["train_r2"]) == pytest.approx((1.0, R2()(X, Y)))


def test_what_the_learner_no_longer_measures_is_no_column() -> None:
    """A callback may lend the validation's batches other metrics."""
    mine = plays(mae)
    lend = on(
        before_batch=lambda state: state.replace(learner=replace(state.learner, metrics=(R2(),)))
    )
    (row,) = fit(mine, mine.init(), 1, [lend]).history.rows
    assert (row["mae"], row["valid_loss"]) == (None, pytest.approx(2.0))


@pytest.mark.parametrize(
    "run", [lambda mine: fit(mine, mine.init(), 1), lambda mine: validate(mine, mine.init())]
)
def test_metrics_that_cannot_be_columns_are_errors(run: Any) -> None:
    with pytest.raises(TypeError, match="got the class R2"):
        run(plays(R2))
    with pytest.raises(ValueError, match="two metrics are called 'r2'"):
        run(plays(R2(), R2()))


def test_they_are_errors_before_anything_is_trained() -> None:
    with pytest.raises(TypeError) as caught:
        fit(plays(R2), plays().init(), 1)
    assert "in before_fit" in caught.value.__notes__[0]


@pytest.mark.parametrize("metric", [accuracy, top_k_accuracy(1)])
def test_targets_may_have_an_axis_of_one(metric: Any) -> None:
    """(N, 1) against (N,) is no table of N x N comparisons."""
    assert metric(torch.eye(3), torch.tensor([[0], [1], [2]])) == 1.0
    with pytest.raises(
        ValueError, match="accuracy: pred and target must have equally many elements"
    ):
        metric(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4))


def test_constants_do_not_vary_even_if_their_mean_is_rounded() -> None:
    """The mean of three times 0.1 is not 0.1."""
    constant, other = (
        torch.full((3,), 0.1, dtype=torch.float64),
        torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64),
    )
    assert isnan(Pearson()(other, constant))
    assert R2()(other, constant) == ExplainedVariance()(other, constant) == 0.0
    assert R2()(constant, constant) == 1.0


def test_a_nan_has_no_rank() -> None:
    assert isnan(Spearman()(torch.tensor([1.0, 2.0, nan]), torch.tensor([1.0, 2.0, 3.0])))


def test_empty_batches_count_nothing() -> None:
    """For means and correlations, of some batches or of all."""
    none = torch.zeros(0)
    assert isnan(Spearman()(none, none))
    full, empty = (torch.ones(2, 1), torch.zeros(2, 1)), (torch.zeros(0, 1), torch.zeros(0, 1))
    learner = Learner(
        one_weight(2.0), DataLoaders([full]), torch.nn.functional.mse_loss, sgd(), metrics=[mse]
    )
    assert validate(learner, learner.init(), [full, empty]) == {"valid_loss": 4.0, "mse": 4.0}
    assert all(isnan(value) for value in validate(learner, learner.init(), [empty]).values())


def test_averages_over_labels_need_an_axis_of_them() -> None:
    scores, answers = torch.tensor([3.0, -2.0, 1.0]), torch.tensor([1, 1, 0])
    with pytest.raises(
        ValueError, match=r"F1: average='micro' with a threshold .* got shape \(3,\)"
    ):
        F1("micro", threshold=0.5)(scores, answers)
    assert (
        F1("micro", threshold=0.5)(scores[:, None], answers[:, None])
        == F1(threshold=0.5)(scores, answers)
        == 0.5
    )


def test_functions_of_half_precision_are_computed_in_single() -> None:
    """300 squared is no float16, and 257 no bfloat16."""
    half, brain = (
        torch.tensor([300.0], dtype=torch.float16),
        torch.tensor([256.0, 258.0], dtype=torch.bfloat16),
    )
    assert mse(half, torch.zeros_like(half)) == 90_000.0
    assert mae(brain, torch.zeros_like(brain)) == 257.0
    assert mse(half.double(), torch.zeros(1)).dtype == torch.float64
