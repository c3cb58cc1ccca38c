"""Laws of all metrics: the same value for any batches, nothing touched, no device waited for before
the end.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import isnan
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loop.disk.encoding import decode, encode
from loop.metrics import (
    F1,
    R2,
    RMSE,
    CohenKappa,
    Collected,
    ConfusionMatrix,
    Dice,
    ExplainedVariance,
    JaccardCoeff,
    Matthews,
    Mergeable,
    Pearson,
    Perplexity,
    Precision,
    Recall,
    Spearman,
    Weighted,
)
from tests.comparing import Untouched


def tokens(pred: Tensor, target: Tensor) -> Tensor:
    """How many targets are no padding."""
    return (target >= 0).sum()


def right_tokens(pred: Tensor, target: Tensor) -> Tensor:
    """The share of them that is right."""
    return (pred.argmax(dim=-1) == target)[target >= 0].double().mean()


def median_error(pred: Tensor, target: Tensor) -> float:
    """No mean of anything."""
    return float((pred - target).abs().median())


def numbers(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Predictions of numbers, with ties."""
    target = torch.randn(count, generator=generator).round(decimals=1)
    return (target + torch.randn(count, generator=generator)).round(decimals=1), target


def classes(count: int, generator: torch.Generator, kinds: int = 3) -> tuple[Tensor, Tensor]:
    """Scores of classes."""
    return torch.randn(count, kinds, generator=generator), torch.randint(
        kinds, (count,), generator=generator
    )


def two_classes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scores of two classes."""
    return classes(count, generator, 2)


def labels(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Four questions about each sample."""
    return torch.randn(count, 4, generator=generator), torch.randint(
        2, (count, 4), generator=generator
    )


def images(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scores of two classes for every pixel; some pixels do not count."""
    target = torch.randint(2, (count, 3, 3), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255
    return torch.randn(count, 2, 3, 3, generator=generator), target


def texts(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scores of five tokens at six places; padding is -100."""
    target = torch.randint(5, (count, 6), generator=generator)
    target[torch.arange(6) >= torch.randint(7, (count, 1), generator=generator)] = -100
    return torch.randn(count, 6, 5, generator=generator), target


CASES: list[tuple[Any, Any]] = [
    (F1(), two_classes),
    (F1("macro"), classes),
    (F1("micro"), classes),
    (F1("weighted", ignore_index=1), classes),
    (F1("macro", threshold=0.3), labels),
    (Precision("macro"), classes),
    (Recall(threshold=0.5), labels),
    (Dice(ignore_index=255), images),
    (JaccardCoeff("macro", ignore_index=255), images),
    (ConfusionMatrix(), classes),
    (CohenKappa(), classes),
    (CohenKappa("quadratic"), classes),
    (Matthews(), classes),
    (RMSE(), numbers),
    (R2(), numbers),
    (ExplainedVariance(), numbers),
    (Pearson(), numbers),
    (Spearman(), numbers),
    (Perplexity(), texts),
    (Weighted(right_tokens, tokens), texts),
    (Collected(median_error), numbers),
]
IDS = [f"{metric.name}-{index}" for index, (metric, _) in enumerate(CASES)]


def batches_of(
    make: Any, seed: int, cuts: Sequence[int], count: int = 30
) -> list[tuple[Tensor, Tensor]]:
    """The data, cut there; pieces may be empty."""
    pred, target = make(count, torch.Generator().manual_seed(seed))
    edges = [0, *sorted(cuts), count]
    return [(pred[a:b], target[a:b]) for a, b in pairwise(edges)]


def fold(metric: Mergeable, batches: Sequence[tuple[Tensor, Tensor]]) -> Mapping[str, Any]:
    """All of them counted, one after the other."""
    counted = metric.start()
    for pred, target in batches:
        counted = metric.add(counted, pred, target)
    return counted


@pytest.mark.parametrize(("metric", "make"), CASES, ids=IDS)
@settings(max_examples=12, derandomize=True, database=None, deadline=None)
@given(
    seed=st.integers(0, 10**6), cuts=st.lists(st.integers(0, 30), max_size=6), order=st.randoms()
)
def test_the_value_is_the_same_for_any_cuts_and_any_order_of_merging(
    metric: Any, make: Any, seed: int, cuts: list[int], order: Any
) -> None:
    batches = batches_of(make, seed, cuts)
    whole = metric.value(fold(metric, batches_of(make, seed, [])))
    assert metric.value(fold(metric, batches)) == pytest.approx(
        whole, rel=1e-10, abs=1e-12, nan_ok=True
    )
    parts = [fold(metric, [batch]) for batch in batches] + [metric.start()]
    while len(parts) > 1:
        order.shuffle(parts)
        parts.append(metric.merge(parts.pop(), parts.pop()))
    assert metric.value(parts[0]) == pytest.approx(whole, rel=1e-10, abs=1e-12, nan_ok=True)


READING = ("_local_scalar_dense", "bincount", "nonzero", "masked_select", "unique", "equal.default")


class NoReading(TorchDispatchMode):
    """Fails where an operation would have to wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in READING), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("metric", "make"), CASES[:-2], ids=IDS[:-2])
def test_nothing_waits_for_a_device_before_the_value(metric: Any, make: Any) -> None:
    """The last two are functions of the user, which may."""
    with NoReading():
        counted = fold(metric, batches_of(make, 0, [7, 19]))
    assert not isnan(metric.value(counted))


def test_reading_is_noticed() -> None:
    with NoReading(), pytest.raises(AssertionError):
        float(torch.ones(()))


@pytest.mark.parametrize(("metric", "make"), CASES, ids=IDS)
def test_adding_and_merging_touch_nothing_and_keep_no_graph(metric: Any, make: Any) -> None:
    one, two = (fold(metric, [batch]) for batch in batches_of(make, 0, [15]))
    kept = Untouched([one, two])
    pred, target = make(4, torch.Generator().manual_seed(1))
    after = metric.add(one, pred.requires_grad_(), target)
    assert metric.value(metric.merge(one, two)) == metric.value(metric.merge(one, two))
    assert not any(leaf.requires_grad for leaf in torch.utils._pytree.tree_leaves(after))
    kept.check()


@pytest.mark.parametrize(("metric", "make"), CASES, ids=IDS)
def test_accumulators_can_be_saved(metric: Any, make: Any) -> None:
    """A run may be stopped in the middle of a validation, and go on."""
    counted = fold(metric, batches_of(make, 0, [7, 19])[:2])
    rest = batches_of(make, 0, [7, 19])[2]
    assert metric.value(metric.add(decode(*encode(counted, "sums")), *rest)) == metric.value(
        metric.add(counted, *rest)
    )


def test_what_is_collected_is_kept_in_few_pieces() -> None:
    """At most one for each power of two, however many batches there were."""
    counted = fold(Spearman(), [(torch.ones(1), torch.zeros(1))] * 1000)
    assert [len(piece) for piece in counted["0"]] == [512, 256, 128, 64, 32, 8]


@pytest.mark.parametrize(("metric", "make"), CASES, ids=IDS)
def test_the_value_of_nothing_is_nan_and_a_metric_is_a_function_of_one_batch(
    metric: Any, make: Any
) -> None:
    assert isnan(metric.value(metric.start()))
    ((pred, target),) = batches_of(make, 3, [])
    assert metric(pred, target) == metric.value(fold(metric, [(pred, target)]))
