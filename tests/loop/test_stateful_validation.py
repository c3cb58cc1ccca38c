"""Models that keep a hidden state in a buffer: a validation goes through it batch by batch."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from functional_sgd import sgd
from loop import (
    Callback,
    CancelValidate,
    DataLoaders,
    Learner,
    ModelResetter,
    State,
    differences,
    fit,
    validate,
)


class Recurrent(nn.Module):
    hidden: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(5, 4), nn.Linear(6, 5)
        self.rnn = nn.GRU(4, 6, batch_first=True)
        self.register_buffer("hidden", torch.zeros(1, 2, 6), persistent=False)

    def reset(self) -> None:
        self.hidden = torch.zeros_like(self.hidden)

    def forward(self, x: Tensor) -> Tensor:
        found, hidden = self.rnn(self.embed(x), self.hidden)
        self.hidden = hidden.detach()
        out: Tensor = self.out(found).transpose(1, 2)
        return out


TEXT = torch.randint(0, 5, (2, 25), generator=torch.Generator().manual_seed(0))
PIECES = [(TEXT[:, i : i + 4], TEXT[:, i + 1 : i + 5]) for i in range(0, 24, 4)]


def learner() -> Learner:
    torch.manual_seed(1)
    data = DataLoaders(PIECES, PIECES)
    return Learner(Recurrent(), data, F.cross_entropy, sgd(lr=0.5), callbacks=[ModelResetter()])


def by_hand(model: Any, epochs: int) -> list[float]:
    """The losses of validations in plain PyTorch."""
    model = copy.deepcopy(model)
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    found = []
    for _ in range(epochs):
        model.train()
        model.reset()
        for x, y in PIECES:
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
        model.eval()
        model.reset()
        with torch.no_grad():
            found.append(sum(F.cross_entropy(model(x), y).item() for x, y in PIECES) / len(PIECES))
    return found


@pytest.mark.filterwarnings("ignore::UserWarning")  # the validation is not compiled
@pytest.mark.parametrize("compile", [False, True])
def test_the_losses_are_those_of_a_plain_loop(compile: bool) -> None:
    mine = learner()
    end = fit(mine, mine.init(), 2, compile=compile)
    assert end.history.column("valid_loss") == pytest.approx(by_hand(mine.model, 2), rel=1e-5)


def test_the_training_goes_on_with_its_own() -> None:
    mine = learner()
    state = fit(mine, mine.init(), 1)
    seen: list[Tensor] = []

    class Look(Callback):
        def after_train(self, state: State) -> None:
            seen.append(state.buffers["hidden"])

    end = fit(mine, state, 1, [Look()])
    # ModelResetter resets before the validation, which is part of the training's own buffers.
    assert torch.equal(end.buffers["hidden"], torch.zeros(1, 2, 6))
    assert not torch.equal(seen[0], end.buffers["hidden"])
    before = end.buffers["hidden"].clone()
    validate(mine, end)
    assert torch.equal(end.buffers["hidden"], before)


class Stop(Callback):
    reports = True

    def __init__(self, how: Any, at: int) -> None:
        self.how, self.at, self.count = how, at, 0

    def after_loss(self, state: State) -> None:
        if not state.training:
            self.count += 1
            if self.count == self.at:
                raise self.how


def test_a_run_that_was_stopped_in_a_validation_goes_on_with_its_hidden_state() -> None:
    mine = learner()
    whole = fit(mine, mine.init(), 2)
    with pytest.raises(RuntimeError) as caught:
        fit(mine, mine.init(), 2, [Stop(RuntimeError("stop"), 3)])
    error: Any = caught.value
    again = fit(mine, error.state, 2, resume=True)
    assert not differences(whole, again)


def test_a_cancelled_validation_leaves_nothing() -> None:
    mine = learner()
    end = fit(mine, mine.init(), 1, [Stop(CancelValidate(), 3)])
    assert torch.equal(end.buffers["hidden"], torch.zeros(1, 2, 6))
    assert "before_validation" not in end.memory
