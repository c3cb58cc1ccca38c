"""The same epochs stopped at, and the same learning rates, as with fastai's callbacks: random
columns of a history.
"""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from loop import EarlyStopping, History, Learner, ReduceLROnPlateau, State
from loop.callback import Callback
from loop.run.signals import CancelFit
from tests.loop.helpers import learner
from tests.peers.peers import fastai_module

tracker = fastai_module("fastai.callback.tracker")
core = fastai_module("fastai.callback.core")

MINE = learner()


def theirs(callback: Any, runs: list[list[float]]) -> list[list[float]]:
    """lr after every epoch that is run; fastai's callback, given no more of a learner than it looks
    at.
    """
    hypers = [{"lr": 1.0}]
    recorder = SimpleNamespace(metric_names=["epoch", callback.monitor], values=[])
    callback.learn = SimpleNamespace(
        recorder=recorder, opt=SimpleNamespace(hypers=hypers), epoch=0, logger=print
    )
    found: list[list[float]] = []
    for values in runs:
        recorder.values, lrs = [], []
        callback.before_fit()
        for value in values:
            recorder.values.append([value])
            try:
                callback.after_epoch()
            except core.CancelFitException:
                lrs.append(hypers[0]["lr"])
                break
            lrs.append(hypers[0]["lr"])
        found.append(lrs)
    return found


def ours(callback: Any, runs: list[list[float]]) -> list[list[float]]:
    """The same from our callback's handlers."""
    state: State = MINE.init().replace(learner=MINE, hyper={"lr": 1.0})
    found: list[list[float]] = []
    for values in runs:
        state, lrs = callback.before_fit(state), []
        for value in values:
            state = state.replace(history=History(rows=({callback.monitor: value},)))
            try:
                state = callback.after_epoch(state)
            except CancelFit as signal:
                state = signal.state or state
                lrs.append(state.hyper["lr"])
                break
            lrs.append(state.hyper["lr"])
        found.append(lrs)
    return found


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("kind", ["stop", "reduce"])
def test_random_columns(kind: str, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    dice = random.Random(seed)
    monitor = dice.choice(["valid_loss", "error_rate", "accuracy"])
    mode = dice.choice([None, "min", "max"])
    same: dict[str, Any] = dict(
        monitor=monitor,
        patience=dice.randint(1, 4),
        min_delta=dice.choice([0.0, 0.1]),
        reset_on_fit=dice.choice([True, False]),
    )
    comp = {None: None, "min": np.less, "max": np.greater}[mode]
    runs = [
        [dice.choice([0.0, 0.3, 0.7, 0.8, 1.0, float("nan"), float("inf")]) for _ in range(12)]
        for _ in range(3)
    ]
    reference: Any
    mine: Callback
    if kind == "stop":
        reference, mine = (
            tracker.EarlyStoppingCallback(**same, comp=comp),
            EarlyStopping(**same, mode=mode),
        )
    else:
        more = dict(factor=dice.choice([2.0, 10.0]), min_lr=dice.choice([0.0, 0.02]))
        reference = tracker.ReduceLROnPlateau(**same, **more, comp=comp)
        mine = ReduceLROnPlateau(**same, **more, mode=mode)
    assert ours(mine, runs) == theirs(reference, runs)


def test_the_learner_of_these_tests_has_validation_data() -> None:
    assert isinstance(MINE, Learner)
    assert MINE.data.valid is not None
