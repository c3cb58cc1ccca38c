"""Models that run code again in their backward pass, write to their tensors, or to their inputs."""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

from functional_sgd import sgd
from loop import (
    Batches,
    CancelBackward,
    CancelFit,
    DataLoaders,
    Freeze,
    Learner,
    fit,
    predict,
    refresh_buffers,
    trace,
    validate,
)
from tests.comparing import Untouched, assert_close, assert_same
from tests.loop.helpers import Kept, batches, learned, learner, linear, loaders, net, on


@pytest.fixture
def _quiet(recwarn: Any) -> Iterator[None]:
    """What the compiler has to say about itself is no concern of these tests."""
    yield
    recwarn.clear()


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


def by_hand(model: nn.Module, data: Any, epochs: int, lr: float = 0.1) -> dict[str, Tensor]:
    """The parameters after plain PyTorch's loop."""
    model = copy.deepcopy(model).train()
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(epochs):
        for x, y in data:
            opt.zero_grad()
            mse_loss(model(x), y).backward()
            opt.step()
    return {name: value.detach() for name, value in model.named_parameters()}


def plain(model: nn.Module, **rest: Any) -> Learner:
    return learner(model, opt=sgd(lr=0.1), **rest)


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


@pytest.mark.usefixtures("_quiet")
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


class Writing(nn.Module):
    """Writes to its weights, to frozen ones and to a buffer, in training and in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embedding = nn.Embedding(5, 2, max_norm=0.5)
        self.scale = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.calls.add_(1)
            self.scale.mul_(1.5)
        found: Tensor = self.embedding(x) * self.scale
        return found


def words() -> DataLoaders:
    batch = torch.tensor([0, 1, 2, 1]), torch.ones(4, 2)
    return DataLoaders([batch, batch], [batch])


def test_what_a_model_writes_to_is_trained_as_by_hand() -> None:
    mine = plain(Writing(), data=words())
    end = fit(mine, mine.init(), 3)
    expected = by_hand(Writing(), mine.data.train, 3)
    assert_close({**end.params, "scale": end.buffers["scale"]}, expected, rtol=1e-5)
    assert float(end.buffers["calls"]) == 6


@pytest.mark.parametrize("act", [validate, predict, lambda mine, state: fit(mine, state, 2)])
def test_what_a_model_writes_to_is_not_the_state_that_was_given(act: Any) -> None:
    mine = plain(Writing(), data=words())
    start = mine.init()
    kept = Kept(start)
    act(mine, start)
    kept.check()


def test_frozen_params_may_be_written_to() -> None:
    mine = plain(Writing(), data=words(), callbacks=[Freeze("nothing*")][:0])
    start = mine.init()
    kept = Kept(start)
    freeze = on(before_fit=lambda state: state.replace(frozen=("embedding.weight",)))
    with pytest.raises(ValueError, match="does not depend on any parameter"):
        fit(mine, start, 1, [freeze])
    kept.check()


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_writes_to_its_params_cannot_be_compiled() -> None:
    mine = plain(Writing(), data=words())
    with pytest.raises(ValueError, match=r"writes to \['embedding.weight'\] in place"):
        fit(mine, mine.init(), 1, compile=True)


def in_place() -> nn.Module:
    return nn.Sequential(nn.Dropout(0.5, inplace=True), linear())


@pytest.mark.parametrize("train", ["list", "Batches"])
def test_a_layer_that_works_in_place_leaves_the_data_alone(train: str) -> None:
    parts = batches(3, seed=1)
    x, y = (torch.cat(each) for each in zip(*parts, strict=True))
    data = DataLoaders(parts if train == "list" else Batches((x, y), 4), [(x, y)])
    mine = plain(nn.Sequential(nn.ReLU(inplace=True), in_place()), data=data)
    untouched = Untouched([x, y, *parts])
    state = fit(mine, mine.init(), 3)
    predict(mine, state)
    untouched.check()


def test_refreshing_buffers_leaves_the_data_alone() -> None:
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    mine = plain(nn.Sequential(nn.ReLU(inplace=True), net()), data=DataLoaders([(x, x)]))
    untouched = Untouched([x])
    refresh_buffers(mine, mine.init())
    untouched.check()


def test_a_loss_that_works_in_place_leaves_the_data_alone() -> None:
    def loss(pred: Tensor, y: Tensor) -> Tensor:
        return mse_loss(pred, y.mul_(2))

    data = loaders()
    untouched = Untouched([*data.train, *(data.valid or ())])
    mine = plain(linear(), data=data, loss=loss)
    fit(mine, mine.init(), 3)
    untouched.check()


def test_a_model_that_writes_to_its_inputs_later_is_an_error() -> None:
    class Late(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2) if self.late else x)

    model = Late(2, 2)
    model.late = False  # type: ignore[assignment]
    mine = plain(model)
    switch = on(before_batch=lambda state: setattr(model, "late", state.train_iter == 2))
    with pytest.raises(RuntimeError, match="the model has written to a batch in place"):
        fit(mine, mine.init(), 1, [switch])


def test_two_threads_cannot_run_one_model_at_once() -> None:
    model = net()
    own = dict(model.named_parameters())
    mine = plain(model)
    errors: list[BaseException] = []

    def elsewhere() -> None:
        try:
            fit(mine, mine.init(), 1)
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

    fit(mine, mine.init(), 1, [on(before_fit=start_thread)])
    assert_same(ends[0].params, fit(mine, mine.init(), 1).params)


class Counting(nn.Module):
    """Keeps a number where no state sees it."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.inner, self.calls, self.first = nn.Linear(2, 2), 0, first

    def forward(self, x: Tensor) -> Tensor:
        self.calls = min(self.calls + 1, self.first)
        found: Tensor = self.inner(x)
        return found


def test_an_attribute_that_every_batch_changes_is_a_warning() -> None:
    mine = plain(Counting(first=10))
    with pytest.warns(UserWarning, match=r"every batch changes calls of the Counting.*buffers"):
        fit(mine, mine.init(), 1)


def test_an_attribute_that_only_the_first_batch_changes_is_none() -> None:
    mine = plain(Counting(first=1))
    fit(mine, mine.init(), 1)


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_changes_its_attributes_cannot_be_compiled() -> None:
    mine = plain(Counting(first=10))
    with pytest.raises(ValueError, match=r"every forward pass of the Counting changes \['calls'\]"):
        fit(mine, mine.init(), 1, compile=True)


@pytest.mark.filterwarnings("ignore")
def test_an_lstm_can_be_compiled() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.lstm = nn.LSTM(2, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.lstm(x[:, None])[0][:, -1]
            return found

    mine = plain(Recurrent())
    found, expected = fit(mine, mine.init(), 2, compile=True), fit(mine, mine.init(), 2)
    assert_close(found.params, expected.params, atol=1e-5)
    assert torch.backends.mkldnn.enabled == torch._C._get_mkldnn_enabled()


def test_a_batch_without_a_gradient_is_an_error_that_says_so() -> None:
    outside = nn.Linear(2, 2)
    mine = plain(linear(), loss=lambda pred, y: mse_loss(outside(y), y))
    with pytest.raises(ValueError, match="does not depend on any parameter.*another module"):
        fit(mine, mine.init(), 1)
