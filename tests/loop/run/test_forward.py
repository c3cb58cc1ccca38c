"""Models that write to their tensors, to their inputs, or to attributes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from loop import Batches, DataLoaders, fit, predict, refresh_buffers, validate
from tests.comparing import Untouched, assert_close
from tests.loop.helpers import Kept, batches, by_hand, linear, loaders, net, on, plain


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
    mine = plain(Writing(), data=words())
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
