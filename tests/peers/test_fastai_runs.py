"""B42: whole runs with fastai's Learner and with ours: the same events, weights, losses, rows,
hypers and order.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from loop import Learner, State, fit, fit_one_cycle, lr_find, trace, validate
from loop.callback import in_order
from tests.loop.helpers import on
from tests.peers.fastai_runs import Result, callbacks, fit_both, ours, theirs

BATCH = ["before_batch", "after_pred", "after_loss", "after_batch"]
VALIDATION = ["before_validate", *BATCH, *BATCH, "after_validate"]


def assert_equal_runs(found: Result, expected: Result) -> None:
    """The same events, and numbers that are equal but for float32's rounding."""
    assert (found.events, found.end) == (expected.events, expected.end)
    torch.testing.assert_close(found.params, expected.params, rtol=1e-5, atol=1e-6)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)


@pytest.mark.parametrize("epochs", [1, 2, 3])
@pytest.mark.parametrize(("train", "valid", "last"), [(1, 1, 4), (3, 2, 1), (2, 3, 3)])
def test_fit(epochs: int, train: int, valid: int, last: int) -> None:
    """Events, weights, smoothed losses, and rows: a mean over samples, however small the last
    batch.
    """
    ends: list[State] = []

    def run(mine: Learner, state: State) -> State:
        ends.append(fit(mine, state, epochs))
        return ends[0]

    expected, fast = theirs({}, lambda fast: fast.fit(epochs), train, valid, last)
    assert_equal_runs(ours({}, run, train, valid, last), expected)
    rows = [[row["train_loss"], row["valid_loss"]] for row in ends[0].history.rows]
    assert rows == [
        pytest.approx([float(value) for value in row], rel=1e-5) for row in fast.recorder.values
    ]


def test_fit_no_epochs() -> None:
    expected, mine = fit_both({}, epochs=0)
    assert_equal_runs(mine, expected)
    assert mine.events == ["before_fit", "after_fit"]


def test_two_runs_after_each_other_go_on_with_momentum() -> None:
    expected, _ = theirs({}, lambda fast: (fast.fit(1), fast.fit(2, lr=0.05)))
    found = ours({}, lambda mine, state: fit(mine, fit(mine, state, 1), 2, lr=0.05))
    assert found.events == expected.events
    torch.testing.assert_close(found.params, expected.params, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("last", [4, 1])
def test_validate(last: int) -> None:
    """The same loss. It is no run and no epoch, so its events are those of the validation; in
    fastai it is both.
    """
    values: list[Any] = []
    expected, _ = theirs({}, lambda fast: values.append(fast.validate()[0]), last=last)
    found = ours(
        {}, lambda mine, state: values.append(validate(mine, state)["valid_loss"]), last=last
    )
    assert found.events == VALIDATION
    assert expected.events == [
        "before_fit",
        "before_epoch",
        *VALIDATION,
        "after_epoch",
        "after_fit",
    ]
    assert values[1] == pytest.approx(values[0], rel=1e-6)


def test_lr_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no validation in ours; in fastai there is one that is cancelled at once."""
    monkeypatch.chdir(tmp_path)  # where fastai saves the weights
    cancelled = "before_validate after_cancel_validate after_validate "
    expected, _ = theirs({}, lambda fast: fast.lr_find(num_it=7, show_plot=False, suggest_funcs=()))
    found = ours({}, lambda mine, state: lr_find(mine, state, iterations=7))
    assert " ".join(expected.events).count(cancelled) == 3
    assert " ".join(found.events) == " ".join(expected.events).replace(cancelled, "")


@pytest.mark.parametrize("seed", range(12))
def test_one_cycle(seed: int) -> None:
    """lr and momentum of every batch, which fastai computes in float32, and where they lead."""
    dice = random.Random(seed)
    epochs, train, lr = dice.randint(1, 4), dice.randint(1, 6), dice.choice([0.01, 0.1, 0.3])
    moms = dice.choice([(0.95, 0.85, 0.95), (0.9, 0.5, 0.7), (0.0, 0.0, 0.0)])
    same: dict[str, Any] = dict(
        div=dice.uniform(2, 50), div_final=dice.choice([10, 1e5]), pct_start=dice.random()
    )
    hypers: dict[str, list[float]] = {"lr": [], "mom": []}

    class Keep(callbacks.Callback):  # type: ignore[misc,name-defined]
        order = 1000

        def before_backward(self) -> None:
            for name, values in hypers.items():
                values.append(float(self.opt.hypers[-1][name]))

    ends: list[State] = []

    def run(mine: Learner, state: State) -> State:
        ends.append(fit_one_cycle(mine, state, epochs, lr, moms, **same))
        return ends[0]

    expected, _ = theirs(
        {},
        lambda fast: fast.fit_one_cycle(epochs, lr, moms=moms, wd=0.0, cbs=[Keep()], **same),
        train,
    )
    assert_equal_runs(ours({}, run, train), expected)
    for name, values in hypers.items():
        assert len(values) == epochs * train
        assert list(ends[0].history.hypers[name]) == pytest.approx(values, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_callbacks(seed: int) -> None:
    """By `order`, and by the list where that is equal."""
    dice = random.Random(seed)
    orders = [dice.randint(-5, 5) for _ in range(8)]
    called: list[int] = []

    def make(index: int) -> Any:
        class One(callbacks.Callback):  # type: ignore[misc,name-defined]
            order, name = orders[index], f"one_{index}"

            def before_fit(self) -> None:
                called.append(index)

        return One()

    theirs({}, lambda fast: fast.fit(0, cbs=[make(index) for index in range(8)]))
    mine = in_order(
        [on(f"one_{index}", order, before_fit=print) for index, order in enumerate(orders)]
    )
    assert [one.name for one in mine] == [f"one_{index}" for index in called]
    assert len(called) == 8


def test_trace_is_the_same_run() -> None:
    expected, _ = theirs({}, lambda fast: fast.fit(2))
    seen: list[str] = []
    ours({}, lambda mine, state: seen.extend(event for event, _ in trace(mine, state, 2)))
    assert seen == expected.events
