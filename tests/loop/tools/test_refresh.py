"""BatchNorm statistics measured anew: torch's numbers, and nothing is touched."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim.swa_utils import update_bn

from functional_sgd import sgd
from loop import Batches, DataLoaders, Learner, State, fit
from loop.tools.refresh import refresh_buffers
from tests.comparing import assert_close, assert_same
from tests.loop.helpers import Kept, batches, learner, linear, net, raiser

MINE = learner(net(dropout=0.0))
STATE = fit(MINE, MINE.init(), 2)


def loaded(model: nn.Module, state: State) -> nn.Module:
    """A copy of the module with a state's tensors."""
    twin = copy.deepcopy(model)
    twin.load_state_dict({**state.params, **state.buffers})
    return twin


def test_torchs_numbers() -> None:
    model = nn.Sequential(
        nn.Linear(2, 3),
        nn.BatchNorm1d(3),
        nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, 0.1, 0.3)),
    )
    data = [tuple(part.double() for part in batch) for batch in batches(5, seed=4, size=6)]
    mine = Learner(model.double(), DataLoaders(data), mse_loss, sgd(lr=0.1))
    state = mine.init()
    theirs = loaded(model, state)
    update_bn(data, theirs)
    found = refresh_buffers(mine, state)
    assert_close(
        found.buffers,
        {name: theirs.get_buffer(name) for name in state.buffers},
        rtol=1e-12,
        atol=1e-12,
    )
    assert found.buffers["1.num_batches_tracked"] == 5
    assert not torch.equal(found.buffers["1.running_mean"], state.buffers["1.running_mean"])


def test_what_was_measured_before_does_not_matter() -> None:
    """Not even if it is not a number."""
    broken = {
        name: value * torch.nan if "running" in name else value
        for name, value in STATE.buffers.items()
    }
    assert_same(
        refresh_buffers(MINE, STATE.replace(buffers=broken)).buffers,
        refresh_buffers(MINE, STATE).buffers,
    )


def test_a_model_in_evaluation_mode_is_refreshed_and_stays_in_it() -> None:
    expected = refresh_buffers(MINE, STATE).buffers
    MINE.model.eval()
    try:
        assert_same(refresh_buffers(MINE, STATE).buffers, expected)
        assert not any(layer.training for layer in MINE.model.modules())
    finally:
        MINE.model.train()


def test_a_module_that_is_one_layer() -> None:
    x = torch.tensor([[1.0], [3.0]])
    mine = learner(nn.BatchNorm1d(1), DataLoaders([(x, x), (x + 2, x)]))
    assert refresh_buffers(mine, mine.init()).buffers["running_mean"].item() == (2 + 4) / 2


def test_other_data() -> None:
    data = batches(4, seed=7)
    theirs = loaded(MINE.model, STATE)
    update_bn(data, theirs)
    found = refresh_buffers(MINE, STATE, data)
    assert_close(found.buffers["1.running_var"], theirs.get_buffer("1.running_var"), rtol=1e-5)


def test_only_buffers_change_and_the_state_and_the_model_are_untouched() -> None:
    kept, norm = Kept(STATE), MINE.model[1]
    before, flags = (
        copy.deepcopy(MINE.model.state_dict()),
        [layer.training for layer in MINE.model.modules()],
    )
    found = refresh_buffers(MINE, STATE)
    kept.check()
    assert found.replace(buffers=STATE.buffers).__dict__ == STATE.__dict__
    assert_same(dict(MINE.model.state_dict()), dict(before))
    assert norm.momentum == 0.1
    assert [layer.training for layer in MINE.model.modules()] == flags


def test_chance_is_as_before_and_the_numbers_are_a_function_of_the_state() -> None:
    mine = learner(
        nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(2)),
        DataLoaders(Batches(batches(1, 1, 12)[0], 4, True)),
    )
    state = mine.init()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = refresh_buffers(mine, state)
    assert torch.equal(torch.rand(1), expected)
    torch.manual_seed(6)
    assert_same(refresh_buffers(mine, state).buffers, first.buffers)


def test_a_model_without_statistics_keeps_its_state() -> None:
    mine = learner(nn.Sequential(linear(), nn.BatchNorm1d(2, track_running_stats=False)))
    state = mine.init()
    assert refresh_buffers(mine, state) is state


def test_an_error_leaves_the_momenta_as_they_were(monkeypatch: Any) -> None:
    monkeypatch.setattr(MINE.model[4], "forward", raiser(ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        refresh_buffers(MINE, STATE)
    assert MINE.model[1].momentum == 0.1


def test_no_data_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"data\.train is empty"):
        refresh_buffers(MINE, STATE, [])
