"""What a forward pass, or the loss, does to the tensors of a model but for computing."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from functional_sgd import sgd
from loop import (
    Batches,
    Callback,
    DataLoaders,
    Learner,
    MixedPrecision,
    differences,
    fit,
    validate,
)
from tests.comparing import assert_same

LR = 0.05


def drawn(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(24, 4, generator=generator) + 2
    return x, torch.randint(0, 3, (24,), generator=generator)


class ActNorm(nn.Module):
    """Begins with what makes its first batch standard normal, as in Glow."""

    def __init__(self) -> None:
        super().__init__()
        self.loc, self.scale = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.ones(4))
        self.last = nn.Linear(4, 3)
        self.register_buffer("begun", torch.tensor(0, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Any:
        if self.training and not self.begun.item():
            self.loc.data.copy_(-x.mean(0))
            self.scale.data.copy_(1 / x.std(0))
            self.begun.fill_(1)
        return self.last(self.scale * (x + self.loc))


class Clipped(nn.Linear):
    """Clips its weights before it uses them, as a Wasserstein critic does."""

    def forward(self, input: Tensor) -> Tensor:
        self.weight.data.clamp_(-0.1, 0.1)
        return super().forward(input)


class Renormed(nn.Linear):
    """Puts other weights into the place of its own."""

    def forward(self, input: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.3)
        return super().forward(input)


class Taught(nn.Module):
    """Follows its own student, in a frozen copy."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Linear(4, 3)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        if self.training:
            pairs = zip(self.student.parameters(), self.teacher.parameters(), strict=True)
            for mine, average in pairs:
                average.data.mul_(0.9).add_(mine.data, alpha=0.1)
        return self.student(x) + self.teacher(x)


class Following(nn.Linear):
    """Has a running mean, which it replaces at every call."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * input.mean(0)
        return super().forward(input - self.mean)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return make()


def by_hand(model: nn.Module, loss: Callable[..., Tensor], data: tuple[Tensor, ...]) -> nn.Module:
    """The model after three epochs of torch alone."""
    opt = torch.optim.SGD(model.parameters(), lr=LR)
    for _ in range(3):
        for batch in Batches(data, 8):
            opt.zero_grad()
            loss(model(batch[0]), *batch[1:]).backward()
            opt.step()
    return model


def assert_trained_alike(end: Any, model: nn.Module) -> None:
    found = {**end.params, **end.buffers}
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)


def all_of(state: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in {**state.params, **state.buffers}.items()}


WRITERS: dict[str, Callable[[], nn.Module]] = {
    "first batch": ActNorm,
    "every batch": lambda: Clipped(4, 3),
    "other memory": lambda: Renormed(4, 3),
    "frozen": Taught,
}


@pytest.mark.parametrize("donate", [False, True, "grads"], ids=str)
@pytest.mark.parametrize("make", WRITERS.values(), ids=WRITERS)
def test_what_a_forward_pass_writes_through_data_counts(
    make: Callable[[], nn.Module], donate: Any
) -> None:
    data = drawn()
    model = seeded(make)
    expected = by_hand(copy.deepcopy(model), cross_entropy, data)
    learner = Learner(model, DataLoaders(Batches(data, 8)), cross_entropy, sgd(lr=LR))
    assert_trained_alike(fit(learner, learner.init(), 3, donate=donate), expected)


@pytest.mark.parametrize("make", WRITERS.values(), ids=WRITERS)
def test_the_state_given_stays_as_it_was(make: Callable[[], nn.Module]) -> None:
    data = DataLoaders(Batches(drawn(), 8), Batches(drawn(), 8))
    learner = Learner(seeded(make), data, cross_entropy, sgd(lr=LR))
    start = learner.init()
    before = all_of(start)
    validate(learner, start)
    fit(learner, start, 1)
    assert_same(all_of(start), before)


@pytest.mark.parametrize("name", ["every batch", "other memory"])
def test_a_graph_cannot_write_through_data(name: str) -> None:
    learner = Learner(seeded(WRITERS[name]), DataLoaders(Batches(drawn(), 8)), cross_entropy, sgd())
    with pytest.raises(ValueError, match=r"writes to \['weight'\] in place"):
        fit(learner, learner.init(), 1, compile=True, lr=LR)


def test_what_the_loss_makes_the_model_replace_counts() -> None:
    x, y = drawn()
    model = seeded(Following)
    other = copy.deepcopy(model)

    def loss_of(model: nn.Module) -> Callable[..., Tensor]:
        def loss(pred: Tensor, y: Tensor, x: Tensor) -> Tensor:
            return cross_entropy(pred, y) + (pred - model(2 * x)).square().mean()

        return loss

    expected = by_hand(other, loss_of(other), (x, y, x))
    learner = Learner(model, DataLoaders(Batches((x, y, x), 8)), loss_of(model), sgd(lr=LR))
    assert_trained_alike(fit(learner, learner.init(), 3), expected)


class Twice(nn.Module):
    """Uses a layer twice, whose gradient autocast then adds up in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Any:
        return self.layer(torch.tanh(self.layer(x)))


class Stop(Callback):
    """Ends a run in its third batch."""

    reports = True

    def before_batch(self, state: Any) -> None:
        if state.training and state.train_iter == 2:
            raise ZeroDivisionError


def test_half_precision_adds_alike_in_the_first_batch_of_a_run_and_later() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 16, generator=generator), torch.randn(24, 16, generator=generator)
    learner = Learner(
        seeded(Twice),
        DataLoaders(Batches((x, y), 4)),
        nn.functional.mse_loss,
        sgd(lr=0.1),
        callbacks=[MixedPrecision()],
    )
    whole = fit(learner, learner.init(), 1)
    with pytest.raises(ZeroDivisionError) as raised:
        fit(learner, learner.init(), 1, [Stop()])
    stopped: Any = raised.value.__dict__["state"]
    assert differences(whole, fit(learner, stopped, 1, resume=True)) == {}
    assert_same(whole.params, fit(learner, learner.init(), 1, donate=True).params)


class Listed(nn.Module):
    """Has its weight in a list, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.decayed = [self.layer.weight]

    def forward(self, x: Tensor) -> Any:
        return self.layer(x) * (1 + self.decayed[0].square().sum())


def test_parameters_that_were_listed_before_the_run_are_refused() -> None:
    data = DataLoaders(Batches(drawn(), 8))
    learner = Learner(seeded(Listed), data, cross_entropy, sgd(lr=LR))
    with pytest.raises(ValueError, match=r"the loss reaches 'layer.weight' of the Listed"):
        fit(learner, learner.init(), 1)


def test_parameters_that_are_looked_up_in_the_loss_are_those_of_the_batch() -> None:
    model = seeded(lambda: nn.Linear(4, 3))
    other = copy.deepcopy(model)

    def loss_of(model: nn.Module) -> Callable[..., Tensor]:
        def loss(pred: Tensor, y: Tensor) -> Tensor:
            penalty = torch.stack([weight.square().sum() for weight in model.parameters()]).sum()
            return cross_entropy(pred, y) + penalty

        return loss

    expected = by_hand(other, loss_of(other), drawn())
    learner = Learner(model, DataLoaders(Batches(drawn(), 8)), loss_of(model), sgd(lr=LR))
    assert_trained_alike(fit(learner, learner.init(), 3), expected)


class Weighted(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.size = nn.Parameter(torch.zeros(2))

    def forward(self, pred: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(pred, y) * (-self.size).exp().sum() + self.size.sum()


def test_a_loss_with_parameters_of_its_own_is_said_to_train_none_of_them() -> None:
    model = seeded(lambda: nn.Linear(4, 3))
    learner = Learner(model, DataLoaders(Batches(drawn(), 8)), Weighted(), sgd(lr=LR))
    with pytest.warns(UserWarning, match=r"of the shapes \(2,\), so they are not trained"):
        fit(learner, learner.init(), 1)


@pytest.mark.parametrize("before", [True, False])
def test_requires_grad_that_changes_after_the_state_was_made_is_refused(before: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    model[0].requires_grad_(before)
    learner = Learner(model, DataLoaders(Batches(drawn(), 8)), cross_entropy, sgd(lr=LR))
    state = learner.init()
    model[0].requires_grad_(not before)
    with pytest.raises(ValueError, match=r"fit: requires_grad of '0.weight' is"):
        fit(learner, state, 1)
