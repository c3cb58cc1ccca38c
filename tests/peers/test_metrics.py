"""The same numbers as scikit-learn's and fastai's metrics, on random data in uneven batches."""

import importlib
import warnings
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from loop.metrics import (
    F1,
    R2,
    RMSE,
    CohenKappa,
    ConfusionMatrix,
    Dice,
    ExplainedVariance,
    JaccardCoeff,
    Matthews,
    Pearson,
    Perplexity,
    Precision,
    Recall,
    Spearman,
    accuracy,
    accuracy_multi,
    confusion_matrix,
    error_rate,
    mae,
    mse,
    msle,
    top_k_accuracy,
)
from loop.metrics.table import add_batch, means
from loop.state import State

sk = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")

SIZES = (1, 13, 40, 7, 2, 64)
COUNT = sum(SIZES)


def draw(*shape: int, seed: int) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_classes(*shape: int, kinds: int, seed: int) -> Tensor:
    """Classes; the last one of four or more is never drawn."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(kinds - (kinds > 3), shape, generator=generator)


def scores(kinds: int) -> tuple[Tensor, Tensor]:
    """Scores that know something of the classes."""
    target = draw_classes(COUNT, kinds=kinds, seed=1)
    return draw(COUNT, kinds, seed=2) + torch.nn.functional.one_hot(target, kinds), target


NUMBERS = (draw(COUNT, seed=3) + draw(COUNT, seed=4), draw(COUNT, seed=4))
POSITIVE = (NUMBERS[0].abs(), NUMBERS[1].abs())
TWO, FOUR = scores(2), scores(4)
MULTI = (draw(COUNT, 5, seed=5), draw_classes(COUNT, 5, kinds=2, seed=6))
PIXELS = (draw(COUNT, 3, 4, 4, seed=7), draw_classes(COUNT, 4, 4, kinds=3, seed=8))
TWO_PIXELS = (draw(COUNT, 2, 4, 4, seed=9), draw_classes(COUNT, 4, 4, kinds=2, seed=10))
TOKENS = (draw(COUNT, 6, 11, seed=11), draw_classes(COUNT, 6, kinds=11, seed=12))


def ours(metric: Any, pred: Tensor, target: Tensor) -> float:
    """As the Recorder computes it, in uneven batches."""
    sums: Any = {}
    for part_pred, part_target in zip(pred.split(SIZES), target.split(SIZES), strict=True):
        state = State({}, {}, {}, {}).replace(pred=part_pred, yb=(part_target,))
        sums = add_batch(sums, state, [metric], "loss")
    (value,) = means(sums, [metric]).values()
    return value


def given(data: tuple[Tensor, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """(target, class given), as scikit-learn wants them."""
    return data[1].numpy(), data[0].argmax(dim=1).numpy()


def answered(data: tuple[Tensor, Tensor], threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """(target, answer) of yes-or-no questions."""
    return data[1].numpy(), (data[0].sigmoid() > threshold).int().numpy()


def flat_pixels(data: tuple[Tensor, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """(target, class given) of all pixels."""
    return data[1].flatten().numpy(), data[0].argmax(dim=1).flatten().numpy()


def kappa(weights: str | None) -> float:
    """scikit-learn's, of all four classes, one of which no target has."""
    return float(sk.cohen_kappa_score(*given(FOUR), weights=weights, labels=range(4)))


SKLEARN: dict[str, tuple[Any, tuple[Tensor, Tensor], Callable[[], float]]] = {
    "accuracy": (accuracy, FOUR, lambda: sk.accuracy_score(*given(FOUR))),
    "error rate": (error_rate, FOUR, lambda: sk.zero_one_loss(*given(FOUR))),
    "top 2": (
        top_k_accuracy(2),
        FOUR,
        lambda: sk.top_k_accuracy_score(FOUR[1], FOUR[0], k=2, labels=range(4)),
    ),
    "matrix": (ConfusionMatrix(), FOUR, lambda: sk.accuracy_score(*given(FOUR))),
    "kappa": (CohenKappa(), FOUR, lambda: kappa(None)),
    "kappa linear": (CohenKappa("linear"), FOUR, lambda: kappa("linear")),
    "kappa quadratic": (CohenKappa("quadratic"), FOUR, lambda: kappa("quadratic")),
    "matthews 2": (Matthews(), TWO, lambda: sk.matthews_corrcoef(*given(TWO))),
    "matthews 4": (Matthews(), FOUR, lambda: sk.matthews_corrcoef(*given(FOUR))),
    "mse": (mse, NUMBERS, lambda: sk.mean_squared_error(NUMBERS[1], NUMBERS[0])),
    "rmse": (RMSE(), NUMBERS, lambda: sk.root_mean_squared_error(NUMBERS[1], NUMBERS[0])),
    "mae": (mae, NUMBERS, lambda: sk.mean_absolute_error(NUMBERS[1], NUMBERS[0])),
    "msle": (msle, POSITIVE, lambda: sk.mean_squared_log_error(POSITIVE[1], POSITIVE[0])),
    "r2": (R2(), NUMBERS, lambda: sk.r2_score(NUMBERS[1], NUMBERS[0])),
    "explained": (
        ExplainedVariance(),
        NUMBERS,
        lambda: sk.explained_variance_score(NUMBERS[1], NUMBERS[0]),
    ),
    "pearson": (Pearson(), NUMBERS, lambda: stats.pearsonr(*NUMBERS).statistic),
    "spearman": (Spearman(), NUMBERS, lambda: stats.spearmanr(*NUMBERS).statistic),
    "perplexity": (
        Perplexity(),
        TOKENS,
        lambda: np.exp(
            sk.log_loss(TOKENS[1].flatten(), TOKENS[0].softmax(-1).flatten(0, 1), labels=range(11))
        ),
    ),
    "dice": (Dice(), TWO_PIXELS, lambda: sk.f1_score(*flat_pixels(TWO_PIXELS))),
    "jaccard": (
        JaccardCoeff("macro"),
        PIXELS,
        lambda: sk.jaccard_score(*flat_pixels(PIXELS), average="macro"),
    ),
}
KINDS: dict[str, tuple[Any, Any]] = {
    "f1": (F1, sk.f1_score),
    "precision": (Precision, sk.precision_score),
    "recall": (Recall, sk.recall_score),
    "jaccard": (JaccardCoeff, sk.jaccard_score),
}


@pytest.mark.parametrize("name", SKLEARN)
def test_sklearn(name: str) -> None:
    metric, data, theirs = SKLEARN[name]
    assert ours(metric, *data) == pytest.approx(theirs(), abs=1e-6)


@pytest.mark.parametrize("average", ["binary", "macro", "micro", "weighted"])
@pytest.mark.parametrize("kind", KINDS)
def test_sklearn_averages(kind: str, average: Any) -> None:
    """Of two classes, or of four of which one is in no target."""
    make, theirs = KINDS[kind]
    data = TWO if average == "binary" else FOUR
    expected = theirs(*given(data), average=average, zero_division=0)
    assert ours(make(average, axis=-1), *data) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("average", ["macro", "micro", "weighted"])
@pytest.mark.parametrize("kind", KINDS)
def test_sklearn_averages_of_labels(kind: str, average: Any) -> None:
    make, theirs = KINDS[kind]
    expected = theirs(*answered(MULTI, 0.9), average=average, zero_division=0)
    assert ours(make(average, axis=-1, threshold=0.9), *MULTI) == pytest.approx(expected, abs=1e-12)


def test_sklearn_confusion_matrix() -> None:
    assert (
        confusion_matrix(*FOUR).tolist()
        == sk.confusion_matrix(*given(FOUR), labels=range(4)).tolist()
    )


def test_a_mean_of_means_would_be_noticed() -> None:
    """F1 of each batch, weighted by samples, is another number."""
    of_each_batch = ours(lambda pred, target: torch.tensor(F1()(pred, target)), *TWO)
    assert of_each_batch != pytest.approx(sk.f1_score(*given(TWO)), abs=1e-3)


def import_fastai() -> ModuleType | None:
    """None if it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what fastai imports
        try:
            return importlib.import_module("fastai.metrics")
        except ImportError:
            return None


fastai: Any = import_fastai()


def theirs(metric: Any, pred: Tensor, target: Tensor) -> float:
    """As fastai's Recorder computes it, in the same batches."""
    learner_module = importlib.import_module("fastai.learner")
    metric = learner_module.mk_metric(metric)
    metric.reset()
    for part_pred, part_target in zip(pred.split(SIZES), target.split(SIZES), strict=True):
        learn = SimpleNamespace(pred=part_pred, y=part_target, yb=(part_target,), loss_func=None)
        if metric.name == "perplexity":
            learn.loss = torch.nn.functional.cross_entropy(
                part_pred.flatten(0, 1), part_target.flatten()
            )
        learn.to_detach = lambda value: value
        metric.accumulate(learn)
    return float(metric.value)


FASTAI: dict[str, tuple[Any, str, dict[str, Any], tuple[Tensor, Tensor]]] = {
    "accuracy": (accuracy, "accuracy", {}, FOUR),
    "error rate": (error_rate, "error_rate", {}, FOUR),
    "f1": (F1(), "F1Score", {}, TWO),
    "f1 macro": (F1("macro"), "F1Score", {"average": "macro"}, FOUR),
    "f1 multi": (F1("macro", threshold=0.5), "F1ScoreMulti", {}, MULTI),
    "precision": (Precision(), "Precision", {}, TWO),
    "recall multi": (
        Recall("micro", threshold=0.3),
        "RecallMulti",
        {"average": "micro", "thresh": 0.3},
        MULTI,
    ),
    "kappa": (CohenKappa(), "CohenKappa", {}, TWO),
    "matthews": (Matthews(), "MatthewsCorrCoef", {}, TWO),
    "accuracy multi": (accuracy_multi(), "accuracy_multi", {}, MULTI),
    "top k": (top_k_accuracy(3), "top_k_accuracy", {"k": 3}, FOUR),
    "mse": (mse, "mse", {}, NUMBERS),
    "mae": (mae, "mae", {}, NUMBERS),
    "msle": (msle, "msle", {}, POSITIVE),
    "rmse": (RMSE(), "rmse", {}, NUMBERS),
    "r2": (R2(), "R2Score", {}, NUMBERS),
    "explained": (ExplainedVariance(), "ExplainedVariance", {}, NUMBERS),
    "pearson": (Pearson(), "PearsonCorrCoef", {}, NUMBERS),
    "spearman": (Spearman(), "SpearmanCorrCoef", {}, NUMBERS),
    "dice": (Dice(), "Dice", {}, TWO_PIXELS),
    "dice multi": (Dice("macro"), "DiceMulti", {}, PIXELS),
    "jaccard": (JaccardCoeff(), "JaccardCoeff", {}, TWO_PIXELS),
    "jaccard multi": (JaccardCoeff("macro"), "JaccardCoeffMulti", {}, PIXELS),
    "perplexity": (Perplexity(), "perplexity", {}, TOKENS),
}


@pytest.mark.skipif(fastai is None, reason="fastai is not installed")
@pytest.mark.parametrize("name", FASTAI)
def test_fastai(name: str) -> None:
    metric, their_name, options, data = FASTAI[name]
    found = getattr(fastai, their_name)
    if isinstance(found, type) or their_name[0].isupper():
        found = found(**options)
    elif options:
        plain = found
        found = lambda pred, target: plain(pred, target, **options)  # noqa: E731
    assert ours(metric, *data) == pytest.approx(theirs(found, *data), abs=1e-6)
