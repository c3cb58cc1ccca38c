"""Arguments of the wrong kind are told apart before anything runs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from loop import Progress, fit, predict, trace, validate
from tests.loop.helpers import learner

MINE = learner()
START = MINE.init()


def test_one_callback_instead_of_a_list() -> None:
    with pytest.raises(
        TypeError, match=r"fit: callbacks must be a list, got Progress\(.*Put it in"
    ):
        fit(MINE, START, 1, Progress())  # type: ignore[arg-type]


@pytest.mark.parametrize("call", [fit, trace, validate, predict])
def test_no_state(call: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"second argument must be a State, got NoneType\. Begin"):
        call(MINE, None) if call in (validate, predict) else call(MINE, None, 1)


@pytest.mark.parametrize("call", [fit, trace])
def test_the_arguments_in_the_wrong_order(call: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"fit: the first argument must be a Learner, got State"):
        call(START, MINE, 1)


def test_an_lr_in_the_place_of_callbacks() -> None:
    with pytest.raises(TypeError, match=r"must be a list, got 0\.001\. Pass hypers .*: lr=0\.001"):
        fit(MINE, START, 1, 1e-3)  # type: ignore[arg-type]


@pytest.mark.parametrize("call", [validate, predict])
def test_tensors_in_the_place_of_a_loader(call: Callable[..., Any]) -> None:
    name = call.__name__
    with pytest.raises(TypeError, match=f"{name}: data must be a loader.*got Tensor.*rows"):
        call(MINE, START, torch.zeros(3, 2))
    with pytest.raises(TypeError, match=f"{name}: data must be a loader.*got a tuple of 2 tensors"):
        call(MINE, START, (torch.zeros(3, 2), torch.zeros(3, 2)))


@pytest.mark.parametrize(
    ("name", "ours"),
    [("lr_max", "lr"), ("max_lr", "lr"), ("cbs", "callbacks"), ("n_epochs", "epochs")],
)
def test_what_others_call_an_argument_is_answered_with_ours(name: str, ours: str) -> None:
    with pytest.raises(ValueError, match=f"{name!r} is called {ours} here"):
        fit(MINE, START, 1, **{name: 1})
