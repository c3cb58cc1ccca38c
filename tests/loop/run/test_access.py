"""A callback can read and replace everything (Q21, B26): one test for each field, showing the
effect.
"""

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import l1_loss, mse_loss

from functional_sgd import sgd
from loop import CancelEpoch, DataLoaders, History, Learner, State, fit, trace
from tests.comparing import assert_same
from tests.loop.helpers import batches, learned, learner, linear, loaders, losses, net, on

MINE = learner(opt=sgd(lr=0.1))
START = MINE.init()
PLAIN = fit(MINE, START, 2)


def run(mine: Learner = MINE, epochs: int = 2, **handlers: Any) -> State:
    return fit(mine, START, epochs, [on(**handlers)])


def changed_data(x_factor: float, y_factor: float) -> Learner:
    return learner(
        data=DataLoaders([(x * x_factor, y * y_factor) for x, y in batches(3, seed=1)]),
        opt=sgd(lr=0.1),
    )


def test_the_inputs() -> None:
    end = run(before_batch=lambda state: state.replace(xb=(state.x * 2,)))
    assert_same(end.params, fit(changed_data(2, 1), START, 2).params)


def test_the_targets() -> None:
    end = run(before_batch=lambda state: state.replace(yb=(state.y * 3,)))
    assert_same(end.params, fit(changed_data(1, 3), START, 2).params)


def test_the_prediction() -> None:
    end = run(after_pred=lambda state: state.replace(pred=state.pred * 2))
    twice = learner(loss=lambda pred, y: mse_loss(pred * 2, y), opt=sgd(lr=0.1))
    assert_same(end.params, fit(twice, START, 2).params)


def test_the_loss_with_its_effect_on_the_gradient() -> None:
    end = run(after_loss=lambda state: state.replace(loss=state.loss * 2))
    torch.testing.assert_close(end.params, fit(MINE, START, 2, lr=0.2).params)


def test_a_penalty_on_the_prediction() -> None:
    def penalize(state: State) -> State:
        return state.replace(loss=state.loss + state.pred.square().mean())

    penalized = learner(
        loss=lambda pred, y: mse_loss(pred, y) + pred.square().mean(), opt=sgd(lr=0.1)
    )
    assert_same(run(after_loss=penalize).params, fit(penalized, START, 2).params)


def test_the_gradients() -> None:
    def negate(state: State) -> State:
        return state.replace(grads={name: -grad for name, grad in state.grads.items()})

    upwards = torch.tensor(-0.1)  # a number below 0 would be refused
    assert_same(run(before_step=negate).params, fit(MINE, START, 2, lr=upwards).params)


@pytest.mark.parametrize(
    "event", ["after_step", "after_batch", "after_train", "after_epoch", "after_fit"]
)
def test_the_parameters(event: str) -> None:
    zeros = {name: torch.zeros_like(value) for name, value in START.params.items()}
    assert_same(run(**{event: lambda state: state.replace(params=zeros)}).params, zeros)


def test_the_parameters_at_the_beginning() -> None:
    other = {name: value + 1 for name, value in START.params.items()}
    end = run(before_fit=lambda state: state.replace(params=other))
    assert_same(end.params, fit(MINE, START.replace(params=other), 2).params)


def test_the_buffers() -> None:
    mine = learner(net())
    start = mine.init()
    fives = {name: torch.full_like(value, 5) for name, value in start.buffers.items()}
    end = fit(mine, start, 1, [on(after_fit=lambda state: state.replace(buffers=fives))])
    assert_same(end.buffers, fives)


def test_the_optimizers_state() -> None:
    """Momentum that forgets before every step is none."""
    mine = learner(opt=sgd(lr=0.1, mom=0.9))
    start = mine.init()
    end = fit(
        mine, start, 2, [on(before_step=lambda state: state.replace(opt_state=start.opt_state))]
    )
    assert_same(end.params, PLAIN.params)


def test_the_hypers() -> None:
    end = run(before_step=lambda state: state.replace(hyper={"lr": 0.0}))
    assert_same(end.params, START.params)


def test_the_loss_function_for_the_run() -> None:
    end = run(before_fit=lambda state: state.replace(learner=replace(state.learner, loss=l1_loss)))
    assert_same(end.params, fit(learner(loss=l1_loss, opt=sgd(lr=0.1)), START, 2).params)


def swap_first_batch(state: State) -> State | None:
    """Another loss function for the first batch."""
    return (
        state.replace(learner=replace(state.learner, loss=l1_loss))
        if state.train_iter == 0
        else None
    )


def test_a_loss_function_for_a_batch_is_put_back_after_it() -> None:
    """The first batch with L1, all others with the learner's own."""
    end = run(before_batch=swap_first_batch)
    first = fit(
        learner(data=DataLoaders(batches(3, 1)[:1]), loss=l1_loss, opt=sgd(lr=0.1)), START, 1
    )
    rest = learner(data=DataLoaders(batches(3, 1)[1:]), opt=sgd(lr=0.1))
    assert_same(end.params, fit(MINE, fit(rest, first, 1), 1).params)


def test_a_loss_function_for_a_batch_is_put_back_when_a_signal_leaves_it() -> None:
    """All scopes that the signal leaves have ended, so no later event sees what was swapped in
    there.
    """

    def swap_and_leave(state: State) -> State | None:
        raise CancelEpoch(swap_first_batch(state))

    running = trace(MINE, START, 1, [on(before_batch=swap_and_leave)])
    seen = {
        event: state.learner.loss
        for event, state in running
        if event in ("after_cancel_epoch", "after_epoch")
    }
    assert seen == {"after_cancel_epoch": mse_loss, "after_epoch": mse_loss}


def test_the_data_of_a_phase_is_put_back_after_it() -> None:
    short = DataLoaders(batches(1, seed=9), batches(1, seed=9))

    def shorten(state: State) -> State | None:
        return (
            state.replace(learner=replace(state.learner, data=short)) if state.epoch == 0 else None
        )

    counts = []
    for event, state in trace(MINE, START, 2, [on(before_train=shorten)]):
        if event in ("after_train", "after_validate"):
            counts.append(state.iter + 1)
    assert counts == [1, 2, 3, 2]


def test_the_data_of_the_run() -> None:
    """Progressive resizing, say: other data from the second epoch on."""
    other = DataLoaders(batches(2, seed=5))

    def exchange(state: State) -> State | None:
        return (
            state.replace(learner=replace(state.learner, data=other)) if state.epoch == 1 else None
        )

    end = run(before_epoch=exchange)
    expected = fit(learner(data=other, opt=sgd(lr=0.1)), fit(MINE, START, 1), 1)
    assert_same(end.params, expected.params)


def test_the_model() -> None:
    """A model with the same parameters that computes something else."""

    class Negative(nn.Linear):
        def forward(self, x: Any) -> Any:
            return -super().forward(x)

    end = run(
        before_fit=lambda state: state.replace(learner=replace(state.learner, model=Negative(2, 2)))
    )
    assert_same(end.params, fit(learner(Negative(2, 2), opt=sgd(lr=0.1)), START, 2).params)


@pytest.mark.parametrize("event", ["before_fit", "before_validate", "before_batch"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_model_that_is_lent_gets_its_modes_back(event: str, fails: bool) -> None:
    """Also where the layers have different ones, and where the run ends in an error."""
    lent = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).eval()
    lent[1].train()

    def fail(state: State) -> None:
        if fails and state.epoch == 1 and not state.training:
            raise RuntimeError("boom")

    mine = learner(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))
    lend = on("lender", **{event: lambda state: state.replace(learner=replace(mine, model=lent))})
    with pytest.raises(RuntimeError, match="boom") if fails else nullcontext():
        fit(mine, mine.init(), 2, [lend, on("failing", after_batch=fail)])
    assert [layer.training for layer in lent.modules()] == [False, False, True]
    assert [layer.training for layer in mine.model.modules()] == [True, True, True]


def test_the_optimizer() -> None:
    def other(state: State) -> State | None:
        return state.replace(
            learner=replace(state.learner, opt=sgd(lr=0.1, wd=0.5)), hyper={"lr": 0.1, "wd": 0.5}
        )

    end = run(before_fit=other)
    assert_same(
        end.params, fit(learner(opt=sgd(lr=0.1, wd=0.5)), START.replace(hyper={}), 2).params
    )


def test_the_metrics() -> None:
    def count(pred: Any, y: Any) -> Any:
        return torch.tensor(float(len(y)))

    end = run(
        before_fit=lambda state: state.replace(learner=replace(state.learner, metrics=(count,)))
    )
    assert end.history.column("count") == [4.0, 4.0]


def test_a_learner_from_a_callback_is_gone_after_the_run() -> None:
    end = run(before_fit=lambda state: state.replace(learner=replace(state.learner, loss=l1_loss)))
    assert end.learner is None
    assert_same(fit(MINE, START, 2).params, PLAIN.params)


def test_the_history() -> None:
    end = run(after_fit=lambda state: state.replace(history=History()))
    assert end.history == History()


def test_the_seed() -> None:
    mine = learner(net())
    start = mine.init(seed=0)
    end = fit(mine, start, 1, [on(before_fit=lambda state: state.replace(seed=8))])
    assert_same(learned(end), learned(fit(mine, mine.init(seed=8), 1)))


def test_the_memory() -> None:
    def count(state: State) -> State:
        return state.remember("spy", state.memory.get("spy", 0) + 1)

    assert run(after_step=count).memory["spy"] == 6


def test_memory_goes_from_run_to_run() -> None:
    def count(state: State) -> State:
        return state.remember("spy", state.memory.get("spy", 0) + 1)

    assert fit(MINE, run(after_step=count), 1, [on(after_step=count)]).memory["spy"] == 9


def test_the_counters_can_be_read() -> None:
    seen: list[tuple[int, ...]] = []

    def look(state: State) -> None:
        seen.append(
            (
                state.epoch,
                state.n_epoch,
                state.iter,
                state.n_iter or 0,
                state.train_iter,
                state.epochs_seen,
            )
        )

    run(before_batch=look)
    epoch_0 = [
        (0, 2, 0, 3, 0, 0),
        (0, 2, 1, 3, 1, 0),
        (0, 2, 2, 3, 2, 0),
        (0, 2, 0, 2, 3, 0),
        (0, 2, 1, 2, 3, 0),
    ]
    epoch_1 = [(1, 2, *rest[:2], rest[2] + 3, 1) for _, _, *rest, _ in epoch_0]
    assert seen == epoch_0 + epoch_1


def test_gradients_can_be_read_after_the_step() -> None:
    seen: list[bool] = []
    run(after_step=lambda state: seen.append(state.grads["weight"] is not None))
    assert seen == [True] * 6


def test_gradients_are_those_of_autograd() -> None:
    state = next(state for event, state in trace(MINE, START, 1) if event == "after_backward")
    model = linear()
    x, y = loaders().train[0]  # type: ignore[index]
    mse_loss(model(x), y).backward()
    assert_same(state.grads, {name: value.grad for name, value in model.named_parameters()})


def test_mixup_as_a_callback() -> None:
    """Inputs mixed with their reverse, and the loss mixed by the same share: learner and batch
    swapped together.
    """
    share = 0.25

    def mix(state: State) -> State | None:
        if not state.training:
            return None

        def mixed(pred: Any, y: Any) -> Any:
            return share * mse_loss(pred, y) + (1 - share) * mse_loss(pred, y.flip(0))

        inputs = share * state.x + (1 - share) * state.x.flip(0)
        return state.replace(xb=(inputs,), learner=replace(state.learner, loss=mixed))

    end = run(before_batch=mix, epochs=1)
    x, y = loaders().train[0]  # type: ignore[index]
    pred = linear()(0.25 * x + 0.75 * x.flip(0))
    assert losses(end)[0] == pytest.approx(
        (0.25 * mse_loss(pred, y) + 0.75 * mse_loss(pred, y.flip(0))).item()
    )
    assert math.isclose(end.history.rows[0]["valid_loss"], valid_loss(end), rel_tol=1e-6)


def valid_loss(state: State) -> float:
    """The loss on the validation data, with the learner's own function."""
    model = linear()
    model.load_state_dict(state.params)
    x, y = (torch.cat(parts) for parts in zip(*loaders().valid or (), strict=True))
    with torch.no_grad():
        return mse_loss(model(x), y).item()
