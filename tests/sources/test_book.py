"""The book's chapter on training (R and B are rows of its prose and listings), as
demonstrations.
"""

import io
from functools import partial
from pathlib import Path
from tokenize import NAME, tokenize
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import loop.callbacks
from functional_sgd import Optimizer, average_grad, chain, elementwise, sgd
from functional_sgd.schedules import Linear
from loop import (
    Batches,
    Callback,
    DataLoaders,
    Learner,
    ParamScheduler,
    State,
    accuracy,
    fit,
    fit_one_cycle,
    trace,
    validate,
)
from tests.comparing import assert_close, assert_same
from tests.loop.helpers import batches, learner, linear, loaders, losses, net, on


def two_classes() -> tuple[DataLoaders, nn.Module]:
    """Images of 6 x 6 pixels with a bright row or a bright column, and a small convolutional
    network.
    """
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(160, 1, 6, 6, generator=generator) / 2, torch.arange(160) % 2
    for image, label, place in zip(
        images, labels, torch.randint(6, (160,), generator=generator), strict=True
    ):
        image[0, place] += 2 * (1 - label)
        image[0, :, place] += 2 * label
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [
            nn.Conv2d(1, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
        ]
        model = nn.Sequential(*layers, nn.Linear(8, 2))
    data = DataLoaders(
        Batches((images[:120], labels[:120]), 20, shuffle=True),
        Batches((images[120:], labels[120:]), 40),
    )
    return data, model


def test_r2_a_pipeline_from_data_to_metrics() -> None:
    data, model = two_classes()
    opt = chain(average_grad, momentum_step, lr=0.5)
    mine = Learner(model, data, nn.functional.cross_entropy, opt, [accuracy])
    end = fit_one_cycle(mine, mine.init(), 10, lr=1.0)
    assert validate(mine, end)["accuracy"] >= 0.9


def test_r3_any_parameter_can_be_changed_between_steps() -> None:
    """A layer is halved after every step, and the next forward pass sees it."""
    mine, weights = learner(opt=sgd(lr=0.0)), list[Tensor]()

    def halve(state: State) -> State:
        return state.replace(params={**state.params, "weight": state.params["weight"] / 2})

    end = fit(
        mine,
        mine.init(),
        1,
        [on(after_step=halve, before_batch=lambda s: weights.append(s.params["weight"]))],
    )
    assert_same(weights[:4], [mine.init().params["weight"] / 2**k for k in range(4)])
    expected = [
        mse_loss(x @ (linear().weight / 2**k).T, y) for k, (x, y) in enumerate(batches(3, seed=1))
    ]
    assert losses(end) == pytest.approx([float(loss.detach()) for loss in expected])


@elementwise
def momentum_step(param: Tensor, grad_avg: Tensor, *, lr: float) -> dict[str, Tensor]:
    """The book's second callback: weight - lr * average."""
    return dict(param=param - lr * grad_avg)


def test_b4_moms_of_zero_or_none_turn_momentum_off() -> None:
    """Zeros make a momentum chain plain SGD, bit for bit; an optimizer without momentum needs no
    moms.
    """
    plain, with_average = (
        learner(opt=opt) for opt in (sgd(), chain(average_grad, momentum_step, lr=0.1))
    )
    runs = [
        fit_one_cycle(plain, plain.init(), 3, 0.03),
        fit_one_cycle(plain, plain.init(), 3, 0.03, moms=None),
        fit_one_cycle(with_average, with_average.init(), 3, 0.03, moms=(0.0, 0.0, 0.0)),
    ]
    assert_same(runs[1].params, runs[0].params)
    assert_same(runs[2].params, runs[0].params)


def test_b8_a_partial_makes_the_optimizer_and_fit_keeps_its_rate() -> None:
    opt_func = partial(sgd, lr=0.03)
    mine = learner(opt=opt_func())
    assert list(fit(mine, mine.init(), 3).history.hypers["lr"]) == [0.03] * 9


def test_b16_schedules_reach_the_hypers_of_a_chain_of_ones_own() -> None:
    """mom falls from .95 to .85 and comes back, lr does the opposite, by name; another name is an
    error.
    """
    mine = learner(
        data=loaders(train=8, valid=None), opt=chain(average_grad, momentum_step, lr=0.1, mom=0.9)
    )
    end = fit_one_cycle(mine, mine.init(), 1, lr=0.03)
    moms, lrs = (list(end.history.hypers[name]) for name in ("mom", "lr"))
    assert (moms[0], moms[2], moms[4], moms[6]) == pytest.approx(
        (0.95, 0.85, 0.95 - 0.1 * 0.75, 0.925)
    )
    assert (lrs[0], lrs[2]) == pytest.approx((0.0012, 0.03))
    with pytest.raises(ValueError, match="reads no 'momm'. Did you mean 'mom'"):
        fit(mine, mine.init(), 1, [ParamScheduler({"momm": Linear(0.9, 0.8)})])


def ten_lines(mine: Learner, state: State, epochs: int) -> Any:
    """The book's basic loop: for each batch, the loss, its gradients, a step. Nothing to zero."""
    params, opt_state = state.params, state.opt_state
    for _ in range(epochs):
        for x, y in mine.data.train:
            tracked = {name: value.detach().requires_grad_() for name, value in params.items()}
            loss = mine.loss(torch.func.functional_call(mine.model, tracked, (x,)), y)
            grads = dict(
                zip(params, torch.autograd.grad(loss, tuple(tracked.values())), strict=True)
            )
            params, opt_state = mine.opt(params, grads, opt_state)
    return params


@pytest.mark.parametrize("opt", [sgd(lr=0.1), sgd(lr=0.1, mom=0.9, wd=0.1)], ids=repr)
def test_b25_the_basic_loop_in_ten_lines(opt: Optimizer) -> None:
    mine = learner(opt=opt)
    assert_same(fit(mine, mine.init(), 3).params, ten_lines(mine, mine.init(), 3))


SOURCE = """
    before_batch after_pred after_loss
    before_backward after_backward before_step after_step after_cancel_batch after_batch
""".split()


def test_b28_the_events_of_a_batch_are_those_of_the_source() -> None:
    """In validation after_batch comes right after after_loss; after_cancel_batch comes only after a
    signal.
    """
    mine = learner(data=loaders(train=1, valid=1))
    seen = [event for event, _ in trace(mine, mine.init())]
    train = [event for event in SOURCE if event != "after_cancel_batch"]
    valid = ["before_batch", "after_pred", "after_loss", "after_batch"]
    inner = [*train, "after_train", "before_validate", *valid]
    assert seen == [
        "before_fit",
        "before_epoch",
        "before_train",
        *inner,
        "after_validate",
        "after_epoch",
        "after_fit",
    ]


AVAILABLE = {
    "before_fit": "",
    "before_epoch": "",
    "before_train": "training",
    "before_batch": "training xb yb",
    "after_pred": "training xb yb pred",
    "after_loss": "training xb yb pred loss",
    "before_backward": "training xb yb pred loss",
    "after_backward": "training xb yb pred loss grads",
    "before_step": "training xb yb pred loss grads",
    "after_step": "training xb yb pred loss grads",
    "after_batch": "training xb yb pred loss grads",
    "after_train": "training",
    "before_validate": "",
    "after_validate": "",
    "after_epoch": "",
    "after_fit": "",
}


@pytest.mark.parametrize("event", AVAILABLE)
def test_b29_what_there_is_at_each_event(event: str) -> None:
    """Among them: gradients can still be read after the step, and nothing of a batch lasts longer
    than it.
    """
    mine = learner(data=loaders(train=1, valid=1))
    state = next(state for name, state in trace(mine, mine.init()) if name == event)
    fields = ("training", "xb", "yb", "pred", "loss", "grads")
    assert [
        name
        for name in fields
        if not (getattr(state, name) is None or getattr(state, name) is False)
    ] == AVAILABLE[event].split()


def test_b29_what_each_event_is_for() -> None:
    """One callback that changes batch, prediction, loss, gradients, and what it keeps for an epoch,
    at its place.
    """

    class Book(Callback):
        def before_epoch(self, state: State) -> State:
            return state.remember(self.name, 0)  # what is reset with every epoch

        def before_batch(self, state: State) -> State | None:
            return state.replace(xb=(state.x * 2,)) if state.training else None  # change the batch

        def after_pred(self, state: State) -> State | None:
            return (
                state.replace(pred=state.pred + 1) if state.training else None
            )  # change the output

        def after_loss(self, state: State) -> State | None:
            penalty = 0.1 * state.params["weight"].square().sum()  # add penalties
            return state.replace(loss=state.loss + penalty) if state.training else None

        def after_backward(self, state: State) -> State:
            return state.replace(
                grads={name: grad.clamp(-0.1, 0.1) for name, grad in state.grads.items()}
            )

        def after_step(self, state: State) -> State:
            assert max(float(grad.abs().max()) for grad in state.grads.values()) <= 0.1 + 1e-6
            return state.remember(self.name, state.memory[self.name] + 1)

    mine = learner(opt=sgd(lr=0.5))
    end = fit(mine, mine.init(), 2, [Book()])
    model = linear()
    for x, y in batches(3, seed=1) * 2:
        loss = mse_loss(model(2 * x) + 1, y) + 0.1 * model.weight.square().sum()
        grads = torch.autograd.grad(loss, tuple(model.parameters()))
        with torch.no_grad():
            for parameter, grad in zip(model.parameters(), grads, strict=True):
                parameter -= 0.5 * grad.clamp(-0.1, 0.1)
    assert_close(end.params, dict(model.state_dict()), rtol=1e-5, atol=1e-6)
    assert end.memory["book"] == 3  # batches of the last epoch


def test_b34_what_can_be_read_in_the_loop() -> None:
    """Learner's model, data, loss, opt, callbacks; epoch and iter from 0; xb and yb tuples, x and y
    what is in them.
    """
    mine, seen = learner(data=loaders(train=2, valid=1)), list[tuple[int, ...]]()

    def look(state: State) -> None:
        seen.append((state.epoch, state.n_epoch, state.iter, state.n_iter))
        assert [getattr(state.learner, name) for name in ("model", "data", "loss", "opt")] == [
            mine.model, mine.data, mine.loss, mine.opt
        ]  # fmt: skip
        assert isinstance(state.xb, tuple)
        assert state.x is state.xb[0]
        assert state.y is state.yb[0]

    fit(mine, mine.init(), 2, [on(before_batch=look)])
    assert seen == [
        (0, 2, 0, 2),
        (0, 2, 1, 2),
        (0, 2, 0, 1),
        (1, 2, 0, 2),
        (1, 2, 1, 2),
        (1, 2, 0, 1),
    ]


def test_b35_the_machine_counts_and_sets_the_mode_by_itself() -> None:
    """train_iter, pct_train and the layers' mode, which are a callback's work elsewhere, cannot be
    left out.
    """
    mine, seen = learner(net()), list[Any]()
    look = on(
        before_batch=lambda s: seen.append(
            (s.train_iter, round(s.pct_train, 9), mine.model.training)
        )
    )
    fit(mine, mine.init(), 2, [look])
    shares = [round(k / 6, 9) for k in range(7)]
    train = [(k, shares[k], True) for k in range(6)]
    assert seen == [*train[:3], *[(3, shares[3], False)] * 2, *train[3:], *[(6, 1.0, False)] * 2]


def test_b36_the_smooth_loss() -> None:
    """An exponential average of the training losses, debiased, so that the first value is the first
    loss.
    """
    mine = learner()
    end = fit(mine, mine.init(), 1)
    first, second, _ = losses(end)
    smooth = end.history.smooth_losses(beta=0.98)
    assert smooth[:2] == pytest.approx(
        [first, (0.98 * 0.02 * first + 0.02 * second) / (1 - 0.98**2)]
    )


CORE = (
    "run/machine",
    "run/events",
    "run/signals",
    "run/stages",
    "run/entering",
    "run/brackets",
    "state",
    "learner",
    "callback",
)


@pytest.mark.parametrize("core", CORE)
def test_b41_the_loop_knows_none_of_its_callbacks(core: str) -> None:
    """No file of the loop's core has the name of a callback in its code: all that there are were
    added from outside.
    """
    source = Path(loop.__file__).parent.joinpath(f"{core}.py").read_bytes()
    names = {token.string for token in tokenize(io.BytesIO(source).readline) if token.type == NAME}
    shipped = [name for name, value in vars(loop.callbacks).items() if isinstance(value, type)]
    assert len(shipped) >= 25
    assert names.isdisjoint(shipped)
