"""FR3: which learning rate a curve suggests, on curves that fastai answered, and its picture."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise, takewhile
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from loop import LRFind, plot_lr_find
from loop.tools.lr_suggestions import minimum, slide, steep, valley


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def oracle() -> LRFind:
    """A curve of 91 batches; the fourfold best is passed at the last."""
    lrs = tuple(1e-7 * 1e8 ** (i / 100) for i in range(91))
    logs = [math.log10(lr) for lr in lrs]
    return LRFind(
        lrs, tuple(2.3 - 1.6 * sigmoid(2.5 * (x + 3)) + math.exp(4 * x) for x in logs), 100
    )


def second() -> tuple[list[float], list[float]]:
    """Another curve, cut already."""
    lrs = [1e-7 * 1e8 ** (i / 100) for i in range(10, 95)]
    logs = [math.log10(lr) for lr in lrs]
    return lrs, [2 - 1.5 * sigmoid(2 * (x + 3)) + math.exp(3 * x) for x in logs]


SIX = [10.0**n for n in range(-5, 1)], [2.0, 1.9, 1.5, 0.9, 1.2, 4.0]
Rules = Callable[[Sequence[float], Sequence[float]], float]


def test_the_part_of_the_curve_that_is_used() -> None:
    lrs, losses = oracle().curve
    assert len(lrs) == len(losses) == 76
    assert (lrs[0], lrs[-1]) == (
        pytest.approx(6.3096e-7, rel=1e-4),
        pytest.approx(0.63096, rel=1e-4),
    )
    assert losses.index(min(losses)) == 63


def test_fr3_the_suggestions_are_those_of_fastai() -> None:
    found = oracle().suggestions
    assert found.valley == pytest.approx(1.584893e-4, rel=1e-6)
    assert found.slide == pytest.approx(1.584893e-6, rel=1e-6)
    assert found.minimum == pytest.approx(6.918310e-3, rel=1e-6)
    assert found.steep == pytest.approx(8.317638e-4, rel=1e-6)


def test_slide_with_another_threshold() -> None:
    assert slide(*oracle().curve, threshold=0.001) == pytest.approx(6.309573e-7, rel=1e-6)


def test_fr3_another_curve() -> None:
    assert valley(*second()) == pytest.approx(1.584893e-4, rel=1e-6)
    assert slide(*second()) == pytest.approx(3.311311e-4, rel=1e-6)
    assert minimum(*second()) == pytest.approx(5.754399e-3, rel=1e-6)
    assert steep(*second()) == pytest.approx(8.317638e-4, rel=1e-6)


def test_six_points() -> None:
    assert valley(*SIX) == 1e-5
    assert minimum(*SIX) == pytest.approx(1e-3)
    assert steep(*SIX) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("losses", "index"),
    [
        (range(10, 0, -1), 3),
        ([5, 4, 3, 2, 1], 0),
        ([1, 2, 3], 0),
        ([7, 7, 7], 0),
        ([2, 1], 0),  # fastai takes the index -1, which is the largest lr
        ([2, 1, 3], 0),
        ([9, 9, 9, 9, 9, 9, 6, 5, 4, 3, 2, 1], 7),  # seven points that end at 11: 11 - 7 + 2 + 1
    ],
)
def test_the_place_in_the_valley(losses: Sequence[float], index: int) -> None:
    assert valley([float(n) for n in range(len(losses))], losses) == index


def test_the_valley_need_not_be_contiguous() -> None:
    """9, 7, 6, 5, 3 are decreasing: five points, which end at 8; 8 - 5 + 1 + 0."""
    assert valley([float(n) for n in range(9)], [9, 10, 7, 8, 6, 11, 5, 12, 3]) == 4


def test_slide_of_a_curve_that_is_settled_takes_the_first_window() -> None:
    lrs = [float(n) for n in range(1, 21)]
    assert slide(lrs, [1.0] * 20) == 5


@pytest.mark.parametrize(("rule", "least"), [(valley, 1), (slide, 16), (minimum, 1), (steep, 2)])
def test_too_few_points(rule: Rules, least: int) -> None:
    points = [float(n) for n in range(1, least + 1)]
    assert rule(points, points[::-1]) in (points[0], points[-1] / 10)
    with pytest.raises(
        ValueError, match=f"{rule.__name__}: needs {least} points of the curve, got {least - 1}"
    ):
        rule(points[1:], points[1:])


def test_too_few_points_on_a_curve() -> None:
    few = LRFind((1e-3, 1e-2), (1.0, 0.5), 20)
    for name in ("valley", "slide", "minimum", "steep", "suggestions"):
        with pytest.raises(ValueError, match="Run lr_find with more iterations"):
            getattr(few, name)


def marks(figure: Figure) -> dict[str, tuple[float, float]]:
    """Label of a mark -> (lr, loss)."""
    lines = figure.axes[0].lines[1:]
    return {
        str(line.get_label()).split()[0]: (line.get_xdata()[0], line.get_ydata()[0])
        for line in lines
    }  # type: ignore[index]


def test_the_picture_has_the_curve_without_its_last_five_batches() -> None:
    figure = oracle().plot()
    line = figure.axes[0].lines[0]
    assert list(np.asarray(line.get_xdata())) == list(oracle().lrs[:-5])
    assert list(np.asarray(line.get_ydata())) == list(oracle().losses[:-5])
    assert figure.axes[0].get_xscale() == "log"
    assert plt.get_fignums() == []


def test_every_suggestion_is_marked_on_the_curve() -> None:
    found = oracle()
    shown = marks(plot_lr_find(found))
    assert {name: lr for name, (lr, _) in shown.items()} == pytest.approx(
        found.suggestions._asdict()
    )
    at = found.lrs.index(found.steep)
    assert shown["steep"][1] == pytest.approx(found.losses[at])
    assert shown["minimum"][1] > shown["steep"][1] - 0.8


def test_a_picture_of_few_points_marks_what_it_can() -> None:
    few = LRFind(
        tuple(10.0**n for n in range(-9, 2)),
        (3.0, 2.9, 2.8, 2.0, 1.5, 1.0, 0.9, 1.2, 2.0, 3.0, 4.0),
        11,
    )
    assert list(marks(few.plot())) == ["valley", "minimum", "steep"]


@pytest.mark.parametrize("losses", [(), (1.0,), (math.nan, 1.0), (2.0, math.inf)])
def test_a_picture_of_next_to_nothing(losses: tuple[float, ...], tmp_path: Any) -> None:
    LRFind((0.1, 0.2)[: len(losses)], losses, 100).plot().savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_an_explosion_does_not_flatten_the_picture() -> None:
    curve = oracle()
    wild = LRFind(curve.lrs, (*curve.losses[:80], *[1e6] * 11), 100)
    low, high = wild.plot().axes[0].get_ylim()
    assert 0.3 < low < 0.8
    assert 5 < high < 6


def test_the_oracle_is_the_one_that_was_asked() -> None:
    """It stops at the fourfold best, falls before its minimum and rises after it."""
    losses = list(oracle().losses)
    best = [min(losses[: index + 1]) for index in range(91)]
    assert len(list(takewhile(lambda index: losses[index] <= 4 * best[index], range(91)))) == 90
    assert all(later < earlier for earlier, later in pairwise(losses[:74]))
    assert torch.tensor(losses).argmin() == 73
