"""Where compiled batches are kept: with a model as it looks, and with what is no tensor in them."""

import gc
import weakref
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from functional_sgd import sgd
from loop import Callback, DataLoaders, Learner, State, fit
from loop.run.graph_cache import graphs_of
from tests.loop.helpers import on
from tests.loop.run.compiled_runs import assert_close, classes, traced

pytestmark = pytest.mark.usefixtures("quiet")


class Changing(nn.Module):
    """What it computes is chosen by an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.act, self.scale = nn.Linear(6, 3), torch.relu, [1.0]
        self.config = SimpleNamespace(factor=1.0)

    def forward(self, x: Tensor) -> Tensor:
        act: Any = self.act
        out: Tensor = self.scale[0] * self.config.factor * act(self.layer(x))
        return out


CHANGES: dict[str, Any] = {
    "function": lambda model: setattr(model, "act", torch.tanh),
    "object": lambda model: setattr(model.config, "factor", 3.0),
    "list": lambda model: model.scale.__setitem__(0, 0.5),
    "hook": lambda model: model.layer.register_forward_hook(lambda layer, xb, out: 2 * out),
    "forward": lambda model: setattr(model.layer, "forward", lambda x: x[:, :3]),
}


@traced
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_was_changed_between_runs_is_compiled_again(change: str) -> None:
    made = Changing()
    if change == "forward":
        made.extra = nn.Linear(1, 1)  # whose params have no gradient
    mine = classes(made)
    start = mine.init()
    fit(mine, start, 1, compile=True)
    CHANGES[change](made)
    if change == "forward":  # nothing is left to train
        made.act = lambda x: made.extra(x[:, :1]) + x
    assert_close(fit(mine, start, 1, compile=True), fit(mine, start, 1))
    assert len(graphs_of(made)) == 2  # of the model as it is now: training and validation


@traced
@pytest.mark.parametrize("change", ["number", "tensor"])
def test_a_loss_that_was_changed_is_compiled_again(change: str) -> None:
    """Between two runs, and between two phases of one."""
    loss = nn.CrossEntropyLoss(weight=torch.ones(3))
    mine = classes(Changing(), loss=loss)
    start = mine.init()
    fit(mine, start, 1, compile=True)
    if change == "number":
        loss.label_smoothing = 0.5
    else:
        loss.weight = torch.tensor([1.0, 1.0, 9.0])
    assert_close(fit(mine, start, 1, compile=True), fit(mine, start, 1))

    def anneal(state: State) -> None:
        loss.label_smoothing = 0.2 * state.epoch

    annealing = on("annealing", before_epoch=anneal)
    found = fit(mine, start, 3, [annealing], compile=True)
    assert_close(found, fit(mine, start, 3, [annealing]))


@traced
def test_a_loss_that_closes_over_a_number_is_compiled_for_that() -> None:
    scale = 1.0

    def loss(pred: Tensor, y: Tensor) -> Tensor:
        return scale * nn.functional.cross_entropy(pred, y)

    mine = classes(Changing(), loss=loss)
    start = mine.init()
    fit(mine, start, 1, compile=True)
    scale = 2.0
    assert_close(fit(mine, start, 1, compile=True), fit(mine, start, 1))


@traced
def test_an_unchanged_model_is_not() -> None:
    made = Changing()
    made.layer.register_forward_hook(lambda layer, xb, out: 2 * out)
    mine = classes(made)
    start = mine.init()
    fit(mine, start, 1, compile=True)
    graphs = list(graphs_of(made))
    fit(mine, start, 1, compile=True)
    assert graphs_of(made) == graphs


def test_graphs_do_not_keep_a_model_alive() -> None:
    """Though a hook is a method of it."""
    made = Changing()
    made.layer.register_forward_hook(made.register_forward_hook)
    graphs_of(made)
    gone = weakref.ref(made)
    del made
    gc.collect()
    assert gone() is None


@traced
def test_a_model_that_a_callback_puts_in_place_has_graphs_of_its_own() -> None:
    """And the learner's own model keeps its own."""
    own, other = Changing(), Changing()
    other.act = torch.tanh

    @dataclass(frozen=True)
    class Swap(Callback):
        def before_fit(self, state: State) -> State:
            assert state.learner is not None
            return state.replace(learner=replace(state.learner, model=other))

    mine = classes(own)
    start = mine.init()
    fit(mine, start, 1, [Swap()], compile=True)
    assert_close(fit(mine, start, 1, compile=True), fit(mine, start, 1))


@traced
@pytest.mark.parametrize("event", ["before_fit", "before_epoch"])
def test_a_callback_may_change_the_model_between_phases(event: str) -> None:
    """And a run without it has what is there then."""
    made = Changing()
    mine = classes(made)
    start = mine.init()

    def change(state: State) -> None:
        made.act = torch.tanh if state.epoch else torch.relu

    changing = on("changing", **{event: change})
    found = fit(mine, start, 2, [changing], compile=True)
    assert_close(found, fit(mine, start, 2, [changing]))
    made.act = torch.sigmoid
    assert_close(fit(mine, start, 1, compile=True), fit(mine, start, 1))


@traced
def test_numbers_in_a_batch_are_told_apart_by_their_type_and_many_of_them_warn() -> None:
    def loss(pred: Tensor, target: Tensor, number: Any) -> Tensor:
        return mse_loss(pred[:, 0], target) * (2 if isinstance(number, float) else 1)

    xs, ys = torch.randn(2, 4, 2), torch.randn(2, 4)
    batches = [(xs[0], ys[0], 1), (xs[1], ys[1], 1.0)]
    mine = Learner(nn.Linear(2, 1), DataLoaders(batches), loss, sgd(lr=0.1))
    assert_same_numbers(fit(mine, mine.init(), 1, compile=True), fit(mine, mine.init(), 1))
    many = [(xs[0], ys[0], number) for number in range(12)]
    mine = Learner(nn.Linear(2, 1), DataLoaders(many), loss, sgd(lr=0.1))
    with pytest.warns(UserWarning, match=r"every batch is compiled by itself, .*\[8\] now") as said:
        fit(mine, mine.init(), 1, compile=True)
    assert len(said) == 1


def test_an_array_in_a_batch_is_refused() -> None:
    """As ids often are: of another array, another graph would have to be made."""
    xs, ys = torch.randn(4, 2), torch.randn(4)
    batches = [(xs, {"y": ys, "ids": np.arange(4)})] * 2

    def loss(pred: Tensor, target: Any) -> Tensor:
        return mse_loss(pred[:, 0], target["y"])

    mine = Learner(nn.Linear(2, 1), DataLoaders(batches), loss, sgd(lr=0.1))
    said = r"fit\(compile=True\): expected tensors, .* got ndarray, .*from_numpy\(array\), and"
    with pytest.raises(TypeError, match=said):
        fit(mine, mine.init(), 1, compile=True)


def assert_same_numbers(found: State, expected: State) -> None:
    torch.testing.assert_close(dict(found.params), dict(expected.params))
