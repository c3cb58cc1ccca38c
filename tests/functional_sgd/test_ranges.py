"""Ranges of hypers: what is a number, and which numbers a hyper may be."""

from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import functional_sgd as fs
from functional_sgd import chain, elementwise, partition, rename, scheduled, sgd, sgd_step
from functional_sgd.ranges import (
    AboveOne,
    Count,
    Decay,
    Fraction,
    NonNegative,
    Positive,
    Range,
    Share,
    check_number,
    range_of,
)
from tests.comparing import Untouched, assert_close, assert_same

INF, NAN = float("inf"), float("nan")
PARAMS = {"a": torch.ones(1), "b": torch.ones(1)}


@pytest.mark.parametrize(
    ("kind", "inside", "outside"),
    [
        (Share, (0, 0.0, 0.5, 1, 1.0), (-1e-9, 1.1, INF, -INF)),
        (Decay, (0.0, 0.999), (1.0, 1, -0.1)),
        (NonNegative, (0, 1e9, INF), (-1e-30, -INF)),
        (Positive, (1e-30, INF), (0, 0.0, -1.0)),
        (Fraction, (1e-30, 0.999), (0, 0.0, 1.0)),
        (AboveOne, (1.001, INF), (1, 1.0, 0.5)),
        (Count, (1, 2.0, 10**9), (0, 1.5, -3, INF)),
    ],
    ids=["Share", "Decay", "NonNegative", "Positive", "Fraction", "AboveOne", "Count"],
)
def test_what_lies_in_a_range(kind: Any, inside: Any, outside: Any) -> None:
    allowed = range_of(kind)
    assert allowed is not None
    assert all(value in allowed for value in inside)
    assert not any(value in allowed for value in outside)


@pytest.mark.parametrize(
    ("allowed", "words"),
    [
        (Range(0, 1), "in [0, 1]"),
        (Range(0, 1, open_high=True), "in [0, 1)"),
        (Range(0, 1, open_low=True), "in (0, 1]"),
        (Range(0), "at least 0"),
        (Range(0, open_low=True), "above 0"),
        (Range(1, whole=True), "a whole number, at least 1"),
    ],
    ids=str,
)
def test_a_range_in_words(allowed: Range, words: str) -> None:
    assert repr(allowed) == words


@pytest.mark.parametrize("annotation", [float, Any, None, "Share", Tensor], ids=str)
def test_other_annotations_have_no_range(annotation: Any) -> None:
    assert range_of(annotation) is None


@pytest.mark.parametrize("value", [True, False, "0.1", ""])
def test_text_and_booleans_are_no_numbers(value: Any) -> None:
    with pytest.raises(TypeError, match=r"who: hyper 'lr' must be a number, got"):
        check_number("who", "lr", value)


def test_nan_is_no_number() -> None:
    with pytest.raises(ValueError, match=r"who: hyper 'lr' is NaN\. Where was it computed\?"):
        check_number("who", "lr", NAN)


@pytest.mark.parametrize("value", [torch.tensor(-1.0), torch.tensor(NAN), None, object()])
def test_what_cannot_be_looked_at_is_let_through(value: Any) -> None:
    """Tensors may be on a device, and not be known yet."""
    check_number("who", "lr", value, Range(0))


def step(opt: Any, hyper: Any = None, **extras: Any) -> Any:
    return opt(PARAMS, PARAMS, opt.init(PARAMS), hyper, **extras)[0]


WRONG: list[tuple[str, Any, Any, str]] = [
    ("text", "fast", TypeError, r"hyper 'lr' must be a number, got 'fast' \(str\).*lr=0\.1"),
    ("boolean", True, TypeError, r"hyper 'lr' must be a number, got True \(bool\)"),
    ("NaN", NAN, ValueError, r"hyper 'lr' is NaN"),
    ("negative", -0.1, ValueError, r"hyper 'lr' must be at least 0, got -0\.1"),
]


wrong = pytest.mark.parametrize(
    ("value", "error", "message"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG]
)


@wrong
def test_a_wrong_lr_is_found_when_a_chain_is_built(value: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=f"^chain: {message}"):
        chain(sgd_step, lr=value)


@wrong
def test_a_wrong_lr_is_found_when_a_recipe_is_called(value: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        fs.adamw(lr=value)


@wrong
def test_a_wrong_lr_is_found_at_a_call(value: Any, error: Any, message: str) -> None:
    """Before anything is computed."""
    snapshot = Untouched(PARAMS)
    with pytest.raises(error, match=rf"^chain\(sgd_step, lr=0\.1\): {message}"):
        step(sgd(lr=0.1), {"lr": value})
    snapshot.check()


@wrong
def test_a_wrong_lr_is_found_among_the_keywords(value: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        step(sgd(lr=0.1), lr=value)


@wrong
def test_a_wrong_lr_is_found_for_one_leaf(value: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        step(sgd(lr=0.1), {"lr": {"a": 0.1, "b": value}})


@wrong
def test_a_wrong_lr_is_found_under_another_name(value: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message.replace("lr", "rate")):
        chain(rename(sgd_step, lr="rate"), rate=value)


@wrong
def test_a_wrong_lr_is_found_in_a_part_of_a_partition(value: Any, error: Any, message: str) -> None:
    opt = partition({"x": sgd(lr=0.1), "y": sgd(lr=0.2)}, {"a": "x", "b": "y"})
    with pytest.raises(error, match=message):
        step(opt, {"y.lr": value})


@wrong
def test_a_wrong_lr_is_found_when_a_schedule_returns_it(
    value: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        step(scheduled(sgd(), lr=lambda calls: value))


@pytest.mark.parametrize("value", [True, NAN, -0.1])
def test_a_wrong_lr_is_found_for_one_leaf_by_default(value: Any) -> None:
    opt: Any = sgd(lr={"a": 0.1, "b": value})  # type: ignore[arg-type]
    with pytest.raises((TypeError, ValueError), match="hyper 'lr'"):
        step(opt)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (np.float32("nan"), ValueError, "hyper 'lr' is NaN"),
        (np.float32(-1.0), ValueError, r"hyper 'lr' must be at least 0, got -1\.0"),
        (np.array(-1.0), ValueError, r"hyper 'lr' must be at least 0, got -1\.0"),
        (np.bool_(True), TypeError, r"hyper 'lr' must be a number, got True \(bool\)"),
        (np.str_("fast"), TypeError, "hyper 'lr' must be a number, got"),
        (np.array([0.1, 0.2]), TypeError, "hyper 'lr' must be a number, .* got ndarray"),
        (Decimal("-1"), ValueError, r"hyper 'lr' must be at least 0, got -1\.0"),
    ],
    ids=["NaN", "negative", "0-d", "boolean", "text", "array", "Decimal"],
)
def test_numbers_of_other_kinds_are_checked_too(value: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        step(sgd(lr=0.1), {"lr": value})


def test_a_tensor_is_not_looked_at() -> None:
    assert_same(step(sgd(), {"lr": torch.tensor(-1.0)})["a"], torch.tensor([2.0]))


@pytest.mark.parametrize("value", [0, 0.0, 1, 2.5, INF])
def test_what_is_in_the_range_is_taken(value: float) -> None:
    assert sgd(lr=value).hyper == {"lr": value}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fs.momentum(mom=1.0), r"'mom' must be in \[0, 1\), got 1\.0"),
        (lambda: fs.sgd(mom=-0.1), r"'mom' must be in \[0, 1\), got -0\.1"),
        (lambda: fs.adam(sqr_mom=1.0), r"'sqr_mom' must be in \[0, 1\), got 1\.0"),
        (lambda: fs.adam(eps=-1e-8), r"'eps' must be at least 0, got -1e-08"),
        (lambda: fs.adamw(wd=-0.1), r"'wd' must be at least 0, got -0\.1"),
        (lambda: fs.adam(wd=-0.1), r"'wd' must be at least 0, got -0\.1"),
        (lambda: fs.sgd(mom=0.9, dampening=1.5), r"'dampening' must be in \[0, 1\], got 1\.5"),
        (lambda: fs.qhadam(nu_1=1.1), r"'nu_1' must be in \[0, 1\], got 1\.1"),
        (lambda: fs.lamb(max_trust=0.0), r"'max_trust' must be above 0, got 0\.0"),
        (lambda: fs.larc(trust_coeff=-1.0), r"'trust_coeff' must be above 0, got -1\.0"),
        (lambda: fs.lion(slow_mom=1.0), r"'slow_mom' must be in \[0, 1\), got 1\.0"),
        (
            lambda: fs.ranger(sync_every=2.5),  # type: ignore[arg-type]
            r"'sync_every' must be a whole number, at least 1, got 2\.5",
        ),
        (lambda: fs.ranger(slow_step=2.0), r"'slow_step' must be in \[0, 1\], got 2\.0"),
        (
            lambda: chain(fs.clip_norm, sgd_step, max_norm=0.0),
            r"'max_norm' must be above 0, got 0\.0",
        ),
        (
            lambda: chain(fs.clip_value, sgd_step, max_value=-1),
            r"'max_value' must be at least 0, got -1",
        ),
        (lambda: fs.average_params(sgd(), 1.1), r"'decay' must be in \[0, 1\], got 1\.1"),
        (lambda: fs.accumulate(sgd(), 0), r"'every' must be a whole number, at least 1, got 0"),
        (lambda: fs.sam(sgd(), rho=NAN), r"'rho' is NaN"),
        (lambda: fs.spam(patience=0), r"'patience' must be a whole number, at least 1, got 0"),
        (lambda: fs.prodigy(growth_rate=0.9), r"'growth_rate' must be at least 1, got 0\.9"),
        (lambda: fs.rprop(shrink=1.0), r"'shrink' must be in \(0, 1\), got 1\.0"),
        (lambda: fs.rprop(grow=1.0), r"'grow' must be above 1, got 1\.0"),
        (lambda: fs.accsgd(caution=1.0), r"'caution' must be in \(0, 1\), got 1\.0"),
    ],
    ids=range(23),
)
def test_recipes_and_wrappers_refuse_what_makes_no_sense(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("opt", "hyper", "message"),
    [
        (fs.average_params(sgd()), {"decay": -0.5}, r"average_params: hyper 'decay' must be in"),
        (fs.accumulate(sgd(), 2), {"every": 1.5}, r"accumulate: hyper 'every' must be a whole"),
        (fs.accumulate(sgd(), 2), {"every": True}, r"accumulate: hyper 'every' must be a number"),
        (fs.average_params(sgd()), {"decay": {"a": 0.5, "b": 0.1}}, r"must be one number for all"),
    ],
    ids=["decay", "every", "boolean", "tree"],
)
def test_wrappers_check_their_own_hypers_at_a_call(opt: Any, hyper: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        step(opt, hyper)


def test_a_rule_of_ones_own_declares_a_range() -> None:
    @elementwise
    def soften(grad: Tensor, *, power: Share = 0.5) -> dict[str, Tensor]:
        return dict(grad=grad.sign() * grad.abs() ** power)

    opt = chain(soften, sgd_step, lr=1.0)
    with pytest.raises(ValueError, match=r"'power' must be in \[0, 1\], got 2\.0"):
        step(opt, {"power": 2.0})
    assert_close(step(opt, {"power": 0.0})["a"], torch.zeros(1))


def test_all_rules_that_read_a_hyper_have_a_say() -> None:
    """One wants it above 0, the other at most 1."""

    @elementwise
    def one(grad: Tensor, *, scale: Positive) -> dict[str, Tensor]:
        return dict(grad=grad / scale)

    @elementwise
    def other(grad: Tensor, *, scale: Share) -> dict[str, Tensor]:
        return dict(grad=grad * scale)

    opt = chain(one, other, sgd_step, lr=1.0)
    for value, words in ((0.0, "above 0"), (1.5, r"in \[0, 1\]")):
        with pytest.raises(ValueError, match=f"'scale' must be {words}"):
            step(opt, {"scale": value})
    assert_same(step(opt, {"scale": 0.5})["a"], torch.zeros(1))


def test_a_hyper_without_a_range_takes_any_number() -> None:
    @elementwise
    def scale(grad: Tensor, *, factor: float) -> dict[str, Tensor]:
        return dict(grad=factor * grad)

    assert_same(step(chain(scale, sgd_step, lr=1.0), {"factor": -1})["a"], torch.tensor([2.0]))


@elementwise
def divide(grad: Tensor, *, scale: "Positive", other: "Unheard" = 1.0) -> dict[str, Tensor]:  # type: ignore[name-defined]  # noqa: F821
    return dict(grad=other * grad / scale)


def test_a_range_may_be_a_text() -> None:
    """As all annotations are after `from __future__ import annotations`."""
    with pytest.raises(ValueError, match="'scale' must be above 0"):
        step(chain(divide, sgd_step, lr=1.0), {"scale": 0.0})
