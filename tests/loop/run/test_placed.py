"""The model has the tensors of a batch until its gradients are taken: checkpoints, hooks, turns."""

import copy
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

from loop import (
    CancelBackward,
    CancelFit,
    fit,
    trace,
    validate,
)
from tests.comparing import assert_close, assert_same
from tests.loop.helpers import by_hand, learned, linear, net, on, plain


class Checkpointed(nn.Module):
    """A network whose middle is computed again for the gradient."""

    def __init__(self, dropout: float = 0.0, reentrant: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.middle, self.last = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.dropout, self.reentrant = nn.Dropout(dropout), reentrant

    def inner(self, x: Tensor) -> Tensor:
        found: Tensor = self.dropout(self.middle(x).tanh())
        return found

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        found: Tensor = self.last(checkpoint(self.inner, hidden, use_reentrant=self.reentrant))
        return found


def test_a_checkpointed_model_trains_as_by_hand() -> None:
    mine = plain(Checkpointed())
    end = fit(mine, mine.init(), 3)
    assert_close(end.params, by_hand(Checkpointed(), mine.data.train, 3), atol=1e-6)


def test_checkpointing_with_dropout_trains_as_without_checkpointing() -> None:
    class Ordinary(Checkpointed):
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.last(self.inner(self.first(x).tanh()))
            return found

    one, other = plain(Checkpointed(dropout=0.5)), plain(Ordinary(dropout=0.5))
    assert_close(fit(one, one.init(), 2).params, fit(other, other.init(), 2).params, atol=1e-6)


def test_reentrant_checkpointing_is_an_error_that_names_the_cure() -> None:
    mine = plain(Checkpointed(reentrant=True))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        fit(mine, mine.init(), 1)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_checkpointed_model_trains_as_by_hand() -> None:
    mine = plain(Checkpointed())
    end = fit(mine, mine.init(), 3, compile=True)
    assert_close(end.params, by_hand(Checkpointed(), mine.data.train, 3), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_checkpointing_with_dropout_cannot_be_compiled() -> None:
    mine = plain(Checkpointed(dropout=0.5))
    with pytest.raises(RuntimeError, match="the gradient draws random numbers"):
        fit(mine, mine.init(), 1, compile=True)


def test_a_hook_on_a_parameter_is_called_with_its_gradient() -> None:
    model = linear()
    model.bias.register_hook(lambda grad: 0 * grad)
    mine = plain(model)
    end = fit(mine, mine.init(), 2)
    assert_same(end.params["bias"], torch.zeros(2))
    assert not torch.equal(end.params["weight"], model.weight)
    assert model.bias.grad is None


def test_a_hook_for_accumulated_gradients_is_an_error() -> None:
    model = linear()
    model.bias.register_post_accumulate_grad_hook(lambda parameter: None)
    mine = plain(model)
    with pytest.raises(ValueError, match="'bias' of the model has a hook.*after_backward"):
        fit(mine, mine.init(), 1)


def test_a_loss_that_looks_at_the_model_sees_the_params_of_the_batch() -> None:
    model = linear()

    def loss(pred: Tensor, y: Tensor) -> Tensor:
        return mse_loss(pred, y) + model.weight.square().sum()

    found, by_callback = plain(model, loss=loss), plain(linear())

    def penalty(state: Any) -> Any:
        return state.replace(loss=state.loss + state.params["weight"].square().sum())

    expected = fit(by_callback, by_callback.init(), 2, [on(before_backward=penalty)])
    end = fit(found, found.init(), 2)
    assert_close(end.params, expected.params, atol=1e-6)
    with torch.no_grad():
        pred = end.params["weight"].square().sum() + validate(by_callback, end)["valid_loss"]
    assert validate(found, end)["valid_loss"] == pytest.approx(float(pred), rel=1e-5)


EARLY: dict[str, Callable[..., Any]] = {
    "a signal before the gradient": lambda _: (_ for _ in ()).throw(CancelBackward),
    "a signal of the run": lambda _: (_ for _ in ()).throw(CancelFit),
    "an error": lambda _: 1 / 0,
}


@pytest.mark.parametrize("name", EARLY)
def test_the_model_has_its_own_tensors_whatever_way_a_batch_ends(name: str) -> None:
    model = net()
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    mine = plain(model)
    with suppress(ZeroDivisionError):
        fit(mine, mine.init(), 1, [on(before_backward=EARLY[name])])
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(now[name] is own[name] for name in own)


def test_a_trace_that_is_closed_within_a_batch_gives_the_model_back() -> None:
    model = linear()
    own = model.weight
    mine = plain(model)
    with closing(trace(mine, mine.init())) as running:
        for event, state in running:
            if event == "after_pred" and state.iter == 1:  # the first batch works on copies
                assert model.weight is state.params["weight"]
                break
    assert model.weight is own


def test_runs_of_one_model_may_take_turns_within_a_batch() -> None:
    model = Checkpointed()
    own = dict(model.named_parameters())
    mine = plain(model)
    starts = [mine.init(), fit(mine, mine.init(), 1)]
    expected = [fit(mine, start, 2).params for start in starts]
    runs = [trace(mine, start, 2) for start in starts]
    seen: list[Any] = [None, None]
    for both in zip(*runs, strict=True):
        seen = [state for _, state in both]
    for state, params in zip(seen, expected, strict=True):
        assert_close(state.params, params, atol=1e-6)
    assert all(value is own[name] for name, value in model.named_parameters())


def test_a_callback_may_evaluate_the_model_within_a_batch() -> None:
    mine = plain(Checkpointed())
    start = mine.init()
    inside = on(after_pred=lambda state: validate(mine, start) and None)
    assert_same(fit(mine, start, 2, [inside]).params, fit(mine, start, 2).params)


@pytest.mark.parametrize("event", ["after_pred", "after_loss", "after_batch"])
def test_a_callback_may_train_the_model_within_a_batch(event: str) -> None:
    mine = plain(net())
    start = mine.init()
    inner = fit(mine, start, 1)
    ends = []

    def train(state: Any) -> None:
        if state.train_iter < 5:
            ends.append(fit(mine, start, 1))

    outer = fit(mine, start, 2, [on(**{event: train})])
    assert_same(outer.params, fit(mine, start, 2).params)
    assert ends
    for end in ends:
        assert_same(end.params, inner.params)


def test_two_threads_cannot_run_one_model_at_once() -> None:
    model = net()
    own = dict(model.named_parameters())
    mine = plain(model)
    start = mine.init()
    errors: list[BaseException] = []

    def elsewhere() -> None:
        try:
            fit(mine, start, 1)
        except RuntimeError as error:
            errors.append(error)

    def start_thread(_: Any) -> None:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    expected = fit(mine, mine.init(), 1)
    found = fit(mine, mine.init(), 1, [on(after_pred=start_thread)])
    assert "another thread is running its Sequential" in str(errors[0])
    assert_same(learned(found), learned(expected))
    assert all(value is own[name] for name, value in model.named_parameters())


def test_two_threads_may_run_copies() -> None:
    mine = plain(linear())
    other = replace(mine, model=copy.deepcopy(mine.model))
    ends: list[Any] = []

    def start_thread(_: Any) -> None:
        thread = threading.Thread(target=lambda: ends.append(fit(other, other.init(), 1)))
        thread.start()
        thread.join()

    with pytest.warns(UserWarning, match="while one of another thread is open"):
        fit(mine, mine.init(), 1, [on(before_fit=start_thread)])
    assert_same(ends[0].params, fit(mine, mine.init(), 1).params)
