"""to_torch: what is saved, loaded, copied and pickled goes on as if never stopped."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import functional_sgd as fs
from functional_sgd import adamw, fuse, to_torch
from tests.comparing import Untouched, assert_same
from tests.functional_sgd.bridge.helpers import network, train

O = torch.optim  # noqa: E741


@pytest.mark.parametrize("named", [False, True], ids=["plain", "named"])
def test_saved_and_loaded_is_never_stopped(named: bool) -> None:
    """Through a file, with weights_only, into a fresh model and optimizer: the same bits."""

    def fresh(model: nn.Module) -> Any:
        groups: Any = model.named_parameters() if named else model.parameters()
        return to_torch(fs.average_params(adamw(lr=0.1)), groups)

    model = network()
    optimizer = fresh(model)
    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    expected = train(model, optimizer, 3, start=3)
    file.seek(0)
    weights, saved = torch.load(file, weights_only=True)
    other = network(seed=1)
    other.load_state_dict(weights)
    resumed = fresh(other)
    resumed.load_state_dict(saved)
    assert_same(train(other, resumed, 3, start=3), expected)


def test_what_was_loaded_is_not_written_to() -> None:
    """Also not by an optimizer that overwrites its own state."""
    model = network()
    optimizer = to_torch(adamw(), model.parameters())
    train(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    snapshot = Untouched(saved["state"])
    donating = to_torch(fuse(adamw(), donate=True), model.parameters())
    donating.load_state_dict(saved)
    train(model, donating, 2)
    snapshot.check()


def test_loading_restores_the_hypers_of_groups() -> None:
    first, second = (to_torch(adamw(), network().parameters(), lr=lr) for lr in (0.5, 0.25))
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("other", ["another chain", "another model", "torch"])
def test_loading_what_does_not_fit_is_an_error_and_changes_nothing(other: str) -> None:
    model = network()
    optimizer = to_torch(adamw(), model.parameters())
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    wrong_model = (
        nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
        if "model" in other
        else network()
    )
    make = {"another chain": fs.lion(), "another model": adamw()}.get(other)
    wrong = (
        O.AdamW(wrong_model.parameters())
        if make is None
        else to_torch(make, wrong_model.parameters())
    )
    for param in wrong_model.parameters():
        param.grad = torch.ones_like(param)
    wrong.step()
    with pytest.raises(ValueError, match="to_torch: the state does not fit: '.*' of '0'"):
        optimizer.load_state_dict({**wrong.state_dict(), "param_groups": before["param_groups"]})
    assert_same(optimizer.state_dict()["state"], before["state"])


def test_copies_and_pickles_go_on_by_themselves() -> None:
    for clone in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        model = network()
        optimizer = to_torch(adamw(lr=0.1), model.parameters())
        train(model, optimizer, 2)
        other, other_optimizer = clone((model, optimizer))
        expected = train(model, optimizer, 2, start=2)
        assert_same(train(other, other_optimizer, 2, start=2), expected)


def test_a_momentum_that_was_written_and_saved_is_loaded() -> None:
    """Without a step in between, into an optimizer that was made with another."""
    first, second = (to_torch(adamw(), network().parameters(), mom=mom) for mom in (0.9, 0.7))
    first.param_groups[0]["mom"] = 0.5
    second.load_state_dict(first.state_dict())
    assert second.hyper()["mom"] == 0.5


def test_betas_that_were_written_and_saved_are_loaded() -> None:
    first, second = (to_torch(adamw(), network().parameters(), mom=mom) for mom in (0.9, 0.7))
    first.param_groups[0]["betas"] = (0.5, 0.999)
    second.load_state_dict(first.state_dict())
    assert second.hyper()["mom"] == 0.5
