"""The callbacks in the box that end, reset or clip."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.utils import clip_grad_norm_

from functional_sgd import sgd
from loop import (
    DataLoaders,
    GradientClip,
    Learner,
    ModelResetter,
    Progress,
    Recorder,
    RecordValues,
    SingleBatch,
    State,
    TerminateOnNaN,
    fit,
    fit_one_cycle,
    validate,
)
from tests.comparing import Untouched, assert_close, assert_finite, assert_same
from tests.loop.helpers import UNUSED, batches, everywhere, learned, learner, linear, loaders, on

NAN, INF = float("nan"), float("inf")


def bad_at(index: int, value: float) -> Learner:
    """A learner of three batches, one of which gives this loss."""
    data = batches(3, seed=1)
    data[index] = (data[index][0], torch.full((4, 2), value))
    return learner(data=DataLoaders(data, batches(2, seed=2)))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_terminate_keeps_a_bad_loss_from_the_weights(value: float) -> None:
    mine = bad_at(1, value)
    end = fit(mine, mine.init(), 5, [TerminateOnNaN()])
    assert_finite((end.params, end.opt_state))
    assert end.opt_state["step"].max() == 1


def test_without_it_the_weights_are_lost() -> None:
    mine = bad_at(1, NAN)
    assert fit(mine, mine.init(), 1).params["weight"].isnan().all()


@pytest.mark.parametrize("value", [NAN, INF])
def test_terminate_keeps_a_bad_loss_from_the_history(value: float) -> None:
    """It runs before the Recorder, whatever the list says."""
    mine = bad_at(1, value)
    assert len(fit(mine, mine.init(), 5, [TerminateOnNaN()]).history.losses) == 1


def test_terminate_ends_the_run_there_and_then() -> None:
    seen: list[str] = []
    mine = bad_at(1, NAN)
    spy = everywhere(lambda event, state: seen.append(event), order=100)
    fit(mine, mine.init(), 5, [TerminateOnNaN(), spy])
    assert seen[-3:] == ["after_pred", "after_cancel_fit", "after_fit"]
    assert seen.count("before_batch") == 2


@pytest.mark.parametrize("value", [NAN, INF])
def test_terminate_leaves_word_of_where_and_why(value: float) -> None:
    mine = bad_at(1, value)
    end = fit(mine, mine.init(), 5, [TerminateOnNaN()])
    assert end.memory["ended"] == f"TerminateOnNaN at batch 1 of epoch 0: the loss is {value}"


def test_the_next_run_has_forgotten_it() -> None:
    mine = bad_at(1, NAN)
    end = fit(mine, mine.init(), 5, [TerminateOnNaN()])
    assert "ended" not in fit(learner(), end, 1).memory


def test_terminate_lets_a_validation_loss_be() -> None:
    data = DataLoaders(batches(1, seed=1), [(torch.ones(4, 2), torch.full((4, 2), NAN))])
    mine = learner(data=data, callbacks=[TerminateOnNaN()])
    assert fit(mine, mine.init(), 3).train_iter == 3


def test_terminate_has_nothing_to_do_with_a_good_run() -> None:
    mine = learner()
    assert_same(
        learned(fit(mine, mine.init(), 2, [TerminateOnNaN()])), learned(fit(mine, mine.init(), 2))
    )


def test_single_batch_trains_on_one_batch() -> None:
    mine = learner()
    end = fit(mine, mine.init(), 5, [SingleBatch()])
    first = learner(data=DataLoaders(batches(3, seed=1)[:1]))
    assert_same(learned(end), learned(fit(first, first.init(), 1)))
    assert (end.train_iter, len(end.history.losses)) == (1, 1)


def test_the_single_batch_is_seen_by_everyone() -> None:
    mine = learner()
    end = fit(
        mine, mine.init(), 5, [SingleBatch(), RecordValues(lr=lambda state: state.hyper["lr"])]
    )
    assert list(end.memory["record_values"]["lr"]) == [0.1]


def test_single_batch_leaves_validate_alone() -> None:
    mine = learner(callbacks=[SingleBatch()])
    assert validate(mine, mine.init()) == validate(learner(), mine.init())


class Recurrent(nn.Linear):
    """A layer that counts, in buffers, how often it was used and how often reset."""

    used: Tensor
    resets: Tensor

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.register_buffer("used", torch.zeros(()))
        self.register_buffer("resets", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.used += 1
        return super().forward(x)

    def reset(self) -> None:
        """Forget."""
        self.used.zero_()
        self.resets += 1


@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_the_model_is_reset_twice_an_epoch_and_once_at_the_end(epochs: int) -> None:
    mine = learner(Recurrent())
    assert fit(mine, mine.init(), epochs, [ModelResetter()]).buffers["resets"] == 2 * epochs + 1


def test_without_validation_the_model_is_reset_once_an_epoch_and_once_at_the_end() -> None:
    mine = learner(Recurrent(), loaders(valid=None))
    assert fit(mine, mine.init(), 3, [ModelResetter()]).buffers["resets"] == 4


def test_a_reset_forgets() -> None:
    mine = learner(Recurrent())
    used: list[float] = []
    fit(
        mine,
        mine.init(),
        2,
        [ModelResetter(), on(after_train=lambda state: used.append(float(state.buffers["used"])))],
    )
    assert used == [3, 3]


def test_a_reset_does_not_touch_the_model_or_the_first_state() -> None:
    mine = learner(Recurrent())
    start = mine.init()
    kept = Untouched(dict(mine.model.state_dict()), learned(start))
    fit(mine, start, 1, [ModelResetter()])
    kept.check()


def test_a_reset_leaves_the_parameters_alone() -> None:
    mine = learner(Recurrent())
    start = mine.init()
    assert_same(fit(mine, start, 2, [ModelResetter()]).params, fit(mine, start, 2).params)


def test_a_reset_that_replaces_a_buffer() -> None:
    class Replacing(Recurrent):
        def reset(self) -> None:
            self.used = torch.full((), 50.0)

    mine = learner(Replacing())
    kept = Untouched(dict(mine.model.state_dict()))
    end = fit(mine, mine.init(), 1, [ModelResetter()])
    assert end.buffers["used"] == 50
    kept.check()


def test_a_model_that_cannot_be_reset() -> None:
    mine = learner()
    with pytest.raises(TypeError, match="ModelResetter: Linear has no reset"):
        fit(mine, mine.init(), 1, [ModelResetter()])


def clipped_torch(model: nn.Module, data: list[Any], max_norm: float) -> nn.Module:
    """Plain PyTorch with clipped gradients."""
    model = copy.deepcopy(model).train()
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    for x, y in data:
        mse_loss(model(x), y).backward()
        clip_grad_norm_(model.parameters(), max_norm)
        opt.step()
        opt.zero_grad()
    return model


@pytest.mark.parametrize("max_norm", [0.01, 0.5, 100.0])
def test_clipped_gradients_are_those_of_torch(max_norm: float) -> None:
    data = [(x.double(), y.double()) for x, y in batches(3, seed=1)]
    model = linear().double()
    mine = learner(model, DataLoaders(data), opt=sgd(lr=0.5))
    end = fit(mine, mine.init(), 1, [GradientClip(max_norm)])
    # torch adds 1e-6 to the norm that it divides by
    assert_close(
        end.params, dict(clipped_torch(model, data, max_norm).state_dict()), rtol=1e-5, atol=1e-7
    )


def test_clipping_makes_a_difference_only_where_the_gradient_is_long() -> None:
    mine = learner(opt=sgd(lr=0.5))
    start = mine.init()
    plain = fit(mine, start, 1)
    assert_same(fit(mine, start, 1, [GradientClip(100.0)]).params, plain.params)
    assert not torch.equal(
        fit(mine, start, 1, [GradientClip(0.01)]).params["weight"], plain.params["weight"]
    )


def test_a_clipped_gradient_is_as_long_as_it_may_be() -> None:
    lengths: list[float] = []

    def measure(state: State) -> None:
        grads = [grad.flatten() for grad in (state.grads or {}).values() if grad is not None]
        lengths.append(torch.cat(grads).norm().item())

    mine = learner()
    fit(mine, mine.init(), 1, [GradientClip(0.01), on(before_step=measure, order=100)])
    assert lengths == pytest.approx([0.01] * 3, rel=1e-4)


def test_clipping_passes_over_parameters_without_a_gradient() -> None:
    class Spare(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.spare = nn.Parameter(torch.ones(3))

    mine = learner(Spare())
    with pytest.warns(UserWarning, match=UNUSED):
        end = fit(mine, mine.init(), 1, [GradientClip(0.01)])
    assert torch.equal(end.params["spare"], torch.ones(3))


@pytest.mark.parametrize("max_norm", [0.0, -1.0, NAN])
def test_a_length_to_clip_to_is_above_0(max_norm: float) -> None:
    with pytest.raises(ValueError, match="GradientClip: max_norm"):
        GradientClip(max_norm)


def test_all_together_in_one_run() -> None:
    """A schedule, clipping, a watch for NaN, metrics of training and a table: five lines
    in a list.
    """
    table = io.StringIO()
    callbacks = [
        TerminateOnNaN(),
        GradientClip(0.5),
        Recorder(train_metrics=True),
        Progress(file=table),
    ]
    mine = learner()
    end = fit_one_cycle(mine, mine.init(), 2, lr=0.1, callbacks=callbacks)
    assert len(table.getvalue().splitlines()) == len(end.history.rows) + 1 == 3
    assert end.opt_state["step"].max() == 6
    assert len(set(end.history.hypers["lr"])) == 6
    assert end.hyper == mine.opt.hyper


@pytest.mark.parametrize("make", [TerminateOnNaN, SingleBatch, ModelResetter, GradientClip])
def test_callbacks_are_values(make: Callable[[], Any]) -> None:
    """Equal when their configuration is, and with nothing to write to."""
    assert make() == make()
    with pytest.raises(AttributeError):
        make().order = 3
