"""The book's questionnaire (Q) about the loop, question by question, as demonstrations."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import loop
from functional_sgd import adamw, average_grad, chain, elementwise, ranger, rmsprop, sgd
from loop import (
    Batches,
    Callback,
    DataLoaders,
    GradientClip,
    Learner,
    ModelResetter,
    ParamScheduler,
    Recorder,
    State,
    TerminateOnNaN,
    fit,
    validate,
)
from loop.callback import in_order
from loop.run.signals import SIGNALS
from tests.comparing import assert_finite, assert_same
from tests.loop.helpers import batches, everywhere, learner, linear, loaders, losses, on, raise_once

X = torch.linspace(-1, 1, 32)[:, None]
LINE = DataLoaders(Batches((X, 3 * X + 1), 8, shuffle=True), Batches((X, 3 * X + 1), 32))


@pytest.mark.parametrize("make", [sgd, rmsprop, adamw, ranger])
def test_q2_another_optimizer_is_another_argument(make: Any) -> None:
    mine = replace(Learner(nn.Linear(1, 1), LINE, mse_loss, adamw()), opt=make(lr=0.05))
    start = mine.init()
    assert (
        validate(mine, fit(mine, start, 40))["valid_loss"]
        < 0.2 * validate(mine, start)["valid_loss"]
    )


def test_q3_a_rule_of_ones_own_is_one_line_and_trains() -> None:
    """No class and no registration: the function changes the update and is one of the chain."""

    @elementwise
    def by_sign(update: Tensor) -> dict[str, Tensor]:
        return dict(update=update.sign())

    @elementwise
    def move(param: Tensor, update: Tensor, *, lr: float) -> dict[str, Tensor]:
        return dict(param=param - lr * update)

    mine = learner(opt=chain(average_grad, by_sign, move, lr=0.25))
    end = fit(mine, mine.init(), 1)
    moved = end.params["weight"] - linear().weight
    assert_same(
        moved.abs().round(decimals=5) % 0.25, torch.zeros(2, 2)
    )  # three steps of 0.25, up or down


class Stages(Callback):
    """Write down which stage is at work."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    @contextmanager
    def _note(self, stage: str) -> Iterator[None]:
        self.seen.append(stage)
        yield

    def around_predict(self, state: State) -> Any:
        return self._note("model")

    def around_loss(self, state: State) -> Any:
        return self._note("loss")

    def around_gradients(self, state: State) -> Any:
        return self._note("gradients")

    def around_update(self, state: State) -> Any:
        return self._note("step")


def test_q19_four_steps_of_a_training_loop() -> None:
    """The model, the loss, the gradients, the step, for every batch; in validation the
    first two.
    """
    stages, mine = Stages(), learner()
    fit(mine, mine.init(), 1, [stages])
    assert stages.seen == ["model", "loss", "gradients", "step"] * 3 + ["model", "loss"] * 2


def test_q20_tweaks_are_a_list() -> None:
    """Clipping and a schedule in one run, no loop rewritten; leaving one out is leaving it out of
    the list.
    """
    mine = learner()
    clip, schedule = (
        GradientClip(0.01),
        ParamScheduler({"lr": lambda position: 0.5 - 0.4 * position}),
    )
    runs = [
        fit(mine, mine.init(), 1, list(tweaks))
        for tweaks in [(), (clip,), (schedule,), (clip, schedule)]
    ]
    lrs = [list(run.history.hypers["lr"]) for run in runs]
    assert lrs[0] == lrs[1] == [0.1] * 3
    assert lrs[2] == lrs[3] == pytest.approx([0.5, 0.5 - 0.4 / 3, 0.5 - 0.8 / 3])
    assert len({float(run.params["weight"].sum()) for run in runs}) == 4


def test_q22_all_events() -> None:
    """fastai's 24 but after_create, of which seven come after a signal; a handler of any other name
    is refused.
    """
    names = loop.events()
    assert len(names) == 23
    assert sum(name.startswith("after_cancel_") for name in names) == 7
    with pytest.raises(TypeError, match="'after_predict' is no event. Did you mean 'after_pred'"):
        type("Slip", (Callback,), {"after_predict": lambda self, state: None})


class Resettable(nn.Linear):
    """A layer that counts its resets in a buffer."""

    resets: Tensor

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.register_buffer("resets", torch.zeros(()))

    def reset(self) -> None:
        """Count."""
        self.resets += 1


@pytest.mark.parametrize("epochs", [1, 3])
def test_q23_b31_the_model_is_reset_before_each_phase_and_after_the_run(epochs: int) -> None:
    """2n + 1 times in n epochs."""
    mine = learner(Resettable())
    assert fit(mine, mine.init(), epochs, [ModelResetter()]).buffers["resets"] == 2 * epochs + 1


def test_q24_b33_a_write_is_a_new_state() -> None:
    """What is returned, the next callback and the loop see; a state that is not returned does
    nothing.
    """
    seen: list[float] = []

    def forget(state: State) -> None:
        state.replace(pred=state.pred * 7)

    forgetful = on("forgetful", 0, after_pred=forget)
    double = on("double", 1, after_pred=lambda state: state.replace(pred=state.pred * 2))
    spy = on("spy", 2, after_pred=lambda state: seen.append(float(state.pred.detach().sum())))
    mine = learner(data=loaders(train=1, valid=None))
    end = fit(mine, mine.init(), 1, [forgetful, double, spy])
    ((x, y),) = batches(1, seed=1)
    assert seen == pytest.approx([2 * float(linear()(x).detach().sum())])
    assert losses(end) == pytest.approx([float(mse_loss(2 * linear()(x), y).detach())])


def test_q24_an_unknown_field_is_an_error_and_not_a_new_attribute() -> None:
    mine = learner()
    with pytest.raises(TypeError, match="State has no field 'preds'. Did you mean 'pred'"):
        fit(mine, mine.init(), 1, [on(after_pred=lambda state: state.replace(preds=0))])
    with pytest.raises(AttributeError):
        mine.init().loss = torch.tensor(0.0)  # type: ignore[misc]


BATCH = (
    "before_batch after_pred after_loss before_backward after_backward before_step after_step "
    "after_batch"
).split()
VALIDATION = "before_validate before_batch after_pred after_loss after_batch after_validate".split()
END = ["after_epoch", "after_fit"]

CONTROL = {
    ("batch", "after_pred"): [
        "after_cancel_batch", "after_batch", "after_train", *VALIDATION, *END
    ],
    ("backward", "before_backward"): [
        "after_cancel_backward", "after_backward", "after_batch", "after_train", *VALIDATION, *END
    ],
    ("step", "before_step"): [
        "after_cancel_step", "after_step", "after_batch", "after_train", *VALIDATION, *END
    ],
    ("train", "after_loss"): ["after_cancel_train", "after_train", *VALIDATION, *END],
    ("validate", "before_validate"): ["after_cancel_validate", "after_validate", *END],
    ("epoch", "after_step"): ["after_cancel_epoch", *END],
    ("fit", "after_backward"): ["after_cancel_fit", "after_fit"],
}  # fmt: skip
"""(signal, where it is raised) -> all that follows, in a run of one training and one validation
batch.
"""


@pytest.mark.parametrize(("signal", "where"), CONTROL, ids=lambda one: one)
def test_q25_b38_b39_signals_skip_to_after_cancel_and_then_after(signal: str, where: str) -> None:
    seen: list[str] = []
    mine = learner(data=loaders(train=1, valid=1))
    spy = everywhere(lambda event, state: seen.append(event), order=-1)
    fit(mine, mine.init(), 1, [spy, on("stop", **{where: raise_once(SIGNALS[signal])})])
    assert seen[seen.index(where) + 1 :] == CONTROL[signal, where]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_q26_b37_a_bad_loss_ends_the_run(value: float) -> None:
    """It is not recorded, no batch follows, after_fit does, and the parameters are finite: it acts
    in time.
    """
    data = batches(3, seed=1)
    data[1] = (data[1][0], torch.full((4, 2), value))
    mine, seen = learner(data=DataLoaders(data, batches(2, seed=2))), list[str]()
    spy = everywhere(lambda event, state: seen.append(event), order=100)
    end = fit(mine, mine.init(), 5, [TerminateOnNaN(), spy])
    assert seen.count("before_batch") == 2
    assert seen[-2:] == ["after_cancel_fit", "after_fit"]
    assert len(losses(end)) == 1
    assert set(end.opt_state["step"].tolist()) == {1}
    assert_finite((end.params, end.opt_state))


def test_q27_b40_who_goes_first() -> None:
    """By wishes, which may name classes; then by order; then by the list. A circle of wishes is
    shown.
    """

    class First(Callback):
        run_before = (Recorder, TerminateOnNaN)

    class Last(Callback):
        run_after = (Recorder,)
        order = -100

    mine = in_order([Last(), Recorder(), TerminateOnNaN(), First()])
    assert [one.name for one in mine] == ["first", "terminate_on_nan", "recorder", "last"]
    with pytest.raises(ValueError, match="last runs after late runs after last"):
        in_order([Last(), type("Late", (Recorder,), {"run_after": (Last,)})()])


def test_q4_b6_no_gradients_to_zero() -> None:
    """Gradients are an argument of the step, made anew for every batch: a batch that is run twice
    has the same.
    """
    seen: list[Any] = []
    mine = learner(opt=sgd(lr=0.0), data=DataLoaders(batches(1, seed=1) * 2))
    make = partial(on, after_backward=lambda state: seen.append(state.grads))
    fit(mine, mine.init(), 1, [make()])
    assert_same(seen[0], seen[1])
    assert all(parameter.grad is None for parameter in mine.model.parameters())
