"""Schedules beyond one number: a list of them for layer groups, and numbers inside the model such
as dropout.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from functional_sgd import by_path, sgd
from functional_sgd.schedules import Constant, Cosine, Linear
from loop import (
    CancelBatch,
    CancelEpoch,
    CancelFit,
    CancelTrain,
    Learner,
    ParamScheduler,
    State,
    fit,
    trace,
    validate,
)
from loop.callbacks.parts.attributes import find_attribute
from loop.callbacks.parts.hyper_groups import hyper_groups
from loop.callbacks.schedule import values_at
from tests.comparing import Untouched, assert_same
from tests.loop.helpers import (
    Kept,
    assert_same_run,
    learned,
    learner,
    linear,
    loaders,
    net,
    on,
    raise_once,
)

RISING = ParamScheduler({"model.3.p": Linear(0.0, 0.5)})


def dropout_learner(p: float = 0.3, **rest: Any) -> Learner:
    """A net whose layer 3 is a Dropout, on 4 training and 2 validation batches."""
    return learner(net(p), loaders(4, 2), opt=sgd(lr=0.1), **rest)


def p_of(state: State) -> float:
    """The p of the Dropout, now."""
    assert state.learner is not None
    layer = state.learner.model.get_submodule("3")
    assert isinstance(layer, nn.Dropout)
    return layer.p


def test_n48_dropout_rises_over_the_run() -> None:
    mine, seen = dropout_learner(), list[float]()
    note = on("note", after_pred=lambda state: seen.append(p_of(state)) if state.training else None)
    fit(mine, mine.init(), 2, [RISING, note])
    assert seen == [0.0, 0.0625, 0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375]


def test_n48_outside_training_the_model_is_as_it_was() -> None:
    mine = dropout_learner()
    seen = {
        event: p_of(state)
        for event, state in trace(mine, mine.init(), 1, [RISING])
        if not state.training
    }
    assert {
        seen[event] for event in ("before_epoch", "before_validate", "after_epoch", "after_fit")
    } == {0.3}


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_n48_the_scheduled_p_is_the_one_that_is_used(p: float) -> None:
    """A run with p scheduled to this everywhere is that of a net that has it."""
    mine, other = dropout_learner(0.3), dropout_learner(p)
    found = fit(mine, mine.init(), 2, [ParamScheduler({"model.3.p": Constant(p)})])
    assert_same(learned(found), learned(fit(other, other.init(), 2)))
    assert not torch.equal(found.params["0.weight"], fit(mine, mine.init(), 2).params["0.weight"])


@pytest.mark.parametrize("signal", [CancelBatch, CancelTrain, CancelEpoch, CancelFit])
@pytest.mark.parametrize("event", ["before_batch", "after_pred", "after_loss", "before_step"])
def test_n48_put_back_after_a_signal(event: str, signal: type[Exception]) -> None:
    mine = dropout_learner()
    fit(mine, mine.init(), 1, [RISING, on("cancel", 99, **{event: raise_once(signal, at=2)})])
    assert mine.model.get_submodule("3").p == 0.3


@pytest.mark.parametrize(
    "event", ["before_train", "before_batch", "after_pred", "after_batch", "after_train"]
)
def test_n48_put_back_after_an_error(event: str) -> None:
    mine = dropout_learner()
    with pytest.raises(KeyError):
        fit(mine, mine.init(), 1, [RISING, on("fail", 99, **{event: raise_once(KeyError())})])
    assert mine.model.get_submodule("3").p == 0.3


def test_n48_put_back_when_a_trace_is_dropped() -> None:
    mine = dropout_learner()
    running = trace(mine, mine.init(), 1, [RISING])
    next(state for event, state in running if event == "after_pred" and p_of(state) == 0.125)
    running.close()
    assert mine.model.get_submodule("3").p == 0.3


def test_the_state_and_the_model_are_not_touched() -> None:
    mine = dropout_learner()
    kept, tensors = Kept(mine.init()), Untouched(dict(mine.model.state_dict()))
    end = fit(mine, kept.state, 1, [RISING])
    kept.check()
    tensors.check()
    assert end.hyper == {"lr": 0.1}
    assert "param_scheduler" not in end.memory


def test_a_stopped_run_goes_on_with_the_p_of_its_place() -> None:
    mine, callbacks = dropout_learner(), [RISING]
    failing = on("failing", 99, before_step=raise_once(KeyError(), at=5))
    with pytest.raises(KeyError) as caught:
        fit(mine, mine.init(), 2, [*callbacks, failing])
    found = fit(mine, caught.value.state, 2, callbacks, resume=True)  # type: ignore[attr-defined]
    assert_same_run(found, fit(mine, mine.init(), 2, callbacks))


def test_validate_with_a_scheduler_of_the_model_at_hand() -> None:
    mine = dropout_learner(callbacks=[RISING])
    assert validate(mine, mine.init()) == validate(dropout_learner(), mine.init())


def test_the_model_and_the_optimizer_in_one_scheduler() -> None:
    mine, seen = dropout_learner(), list[float]()
    both = ParamScheduler({"model.3.p": Linear(0.0, 1.0), "lr": Linear(1.0, 0.0)})
    note = on("note", after_loss=lambda state: seen.append(p_of(state)) if state.training else None)
    end = fit(mine, mine.init(), 1, [both, note])
    assert list(zip(seen, end.history.hypers["lr"], strict=True)) == [
        (0, 1),
        (0.25, 0.75),
        (0.5, 0.5),
        (0.75, 0.25),
    ]


class Noise(nn.Module):
    """A model with numbers of its own: one of the object, one of the class, one that is
    computed.
    """

    strength = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale, self.name, self.on = linear(), 2, "noise", True

    @property
    def half(self) -> float:
        """Half the scale."""
        return self.scale / 2

    @half.setter
    def half(self, value: float) -> None:
        self.scale = 2 * value  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale + self.strength


@pytest.mark.parametrize("name", ["scale", "strength", "half"])
def test_a_number_of_the_model_itself(name: str) -> None:
    model = Noise()
    before, seen = dict(vars(model)), list[float]()
    mine = learner(model, loaders(2, None))
    note = on("note", after_pred=lambda state: seen.append(getattr(model, name)))
    fit(mine, mine.init(), 1, [ParamScheduler({f"model.{name}": Linear(0.0, 1.0)}), note])
    assert seen == [0.0, 0.5]
    assert {**vars(model), "training": True} == {**before, "training": True}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("model.4.p", "the model has no layer '4'"),
        ("model.layr.bias", "the model has no layer 'layr'. Did you mean 'layer'?"),
        ("model.skale", r"Noise has no number 'skale'. Did you mean 'scale'\? Known names: scale"),
        ("model.layer.weight", "Linear has no number 'weight'"),
        ("model.name", "Noise has no number 'name'"),
        ("model.on", "Noise has no number 'on'"),
        ("model.forward", "Noise has no number 'forward'"),
        ("model.", "Noise has no number ''"),
    ],
)
def test_a_path_that_leads_nowhere(path: str, message: str) -> None:
    mine = learner(Noise())
    with pytest.raises(ValueError, match=f"ParamScheduler: '{path}': {message}"):
        fit(mine, mine.init(), 0, [ParamScheduler({path: Constant(0.5)})])


def test_a_layer_under_two_names_is_put_back() -> None:
    shared = nn.Dropout(0.3)
    model = nn.Sequential(shared, shared, linear())
    mine = learner(model)
    fit(
        mine,
        mine.init(),
        1,
        [ParamScheduler({"model.0.p": Constant(0.1), "model.1.p": Constant(0.2)})],
    )
    assert shared.p == 0.3
    assert find_attribute("me", model, "model.1.p").layer is shared


def test_a_number_of_the_model_has_one_schedule() -> None:
    with pytest.raises(
        TypeError, match="ParamScheduler: 'model.3.p' is one number, so its schedule is a function"
    ):
        ParamScheduler({"model.3.p": [Constant(0.1)]})


def grouped() -> tuple[Learner, State]:
    """Two layers, of which the head learns ten times as fast."""
    model = nn.Sequential(linear(), nn.ReLU(), linear())
    mine = learner(model, loaders(2, None))
    start = mine.init()
    return mine, start.replace(
        hyper={"lr": by_path(start.params, {"0.*": 0.1, "2.*": 1.0}), "mom": 0.9}
    )


def test_n50_a_schedule_for_each_layer_group() -> None:
    mine, start = grouped()
    end = fit(
        mine,
        start,
        1,
        [ParamScheduler({"lr": [Cosine(0.1, 0.0), Linear(1.0, 0.0)], "mom": Constant(0.5)})],
    )
    body, head = {"0.weight", "0.bias"}, {"2.weight", "2.bias"}
    for batch, lr in enumerate(end.history.hypers["lr"]):
        assert {lr[name] for name in body} == {Cosine(0.1, 0.0)(batch / 2)}
        assert {lr[name] for name in head} == {1 - batch / 2}
    assert end.hyper == start.hyper


def test_n50_groups_are_in_the_order_of_the_model() -> None:
    """Whatever the order or the size of their lrs."""
    mine, start = grouped()
    start = start.replace(hyper={"lr": by_path(start.params, {"2.*": 0.1, "0.*": 1.0}), "mom": 0.9})
    end = fit(mine, start, 1, [ParamScheduler({"lr": (Constant(5.0), Constant(7.0))})])
    assert end.history.hypers["lr"][0] == {"0.weight": 5, "0.bias": 5, "2.weight": 7, "2.bias": 7}


def test_n50_the_list_is_a_tree_of_schedules_written_shortly() -> None:
    mine, start = grouped()
    slow, fast = Linear(0.1, 0.0), Linear(1.0, 0.0)
    tree = ParamScheduler({"lr": by_path(start.params, {"0.*": slow, "2.*": fast})})
    assert_same_run(
        fit(mine, start, 2, [ParamScheduler({"lr": [slow, fast]})]), fit(mine, start, 2, [tree])
    )


@pytest.mark.parametrize("count", [1, 3])
def test_n50_as_many_schedules_as_groups(count: int) -> None:
    mine, start = grouped()
    with pytest.raises(
        ValueError, match=f"ParamScheduler: 'lr' has a list of {count} schedules, but there are 2"
    ):
        fit(mine, start, 1, [ParamScheduler({"lr": [Constant(0.1)] * count})])


def test_n50_one_lr_is_one_group() -> None:
    mine = learner()
    end = fit(mine, mine.init(), 1, [ParamScheduler({"lr": [Constant(0.3)]})])
    assert end.history.hypers["lr"][0] == {"weight": 0.3, "bias": 0.3}
    with pytest.raises(ValueError, match="ParamScheduler: 'mom' has no value yet"):
        fit(
            mine,
            mine.init().replace(hyper={"lr": 0.1}),
            1,
            [ParamScheduler({"mom": [Constant(0.3)]})],
        )


def test_n50_a_grouped_run_can_be_resumed() -> None:
    mine, start = grouped()
    callbacks = [ParamScheduler({"lr": [Linear(0.1, 0.0), Linear(1.0, 0.0)]})]
    failing = on("failing", 99, before_step=raise_once(KeyError(), at=1))
    with pytest.raises(KeyError) as caught:
        fit(mine, start, 1, [*callbacks, failing])
    found = fit(mine, caught.value.state, 1, callbacks, resume=True)  # type: ignore[attr-defined]
    assert_same_run(found, fit(mine, start, 1, callbacks))


def test_a_run_that_goes_back_to_before_it_puts_the_hypers_back() -> None:
    mine, start = grouped()

    def undo(state: State) -> State | None:
        return state.back_to(start) if state.train_iter == 1 else None

    back = on("back", 99, after_batch=undo)
    end = fit(mine, start, 1, [ParamScheduler({"lr": [Constant(0.1), Constant(0.2)]}), back])
    assert end.hyper == start.hyper


def test_groups_by_several_hypers() -> None:
    params = {"a": torch.zeros(1), "b": torch.zeros(1), "c": torch.zeros(1)}
    hyper = {
        "lr": {"a": 0.1, "b": torch.tensor(0.5), "c": 0.1},
        "mom": {"a": 0.9, "b": 0.9, "c": 0.8},
    }
    values, group_of = hyper_groups("me", params, hyper, ["lr", "mom"])
    assert (values, group_of) == ([(0.1, 0.9), (0.5, 0.9), (0.1, 0.8)], {"a": 0, "b": 1, "c": 2})
    with pytest.raises(
        ValueError, match="me: 'lr' must be a number, a 0-d tensor, or a tree prefix"
    ):
        hyper_groups("me", params, {"lr": {"a": 0.1}}, ["lr"])


def test_values_of_schedules() -> None:
    assert values_at(Linear(0, 1), 0.5) == 0.5
    assert values_at({"a": Linear(0, 1), "b": [Linear(0, 2)]}, 0.5) == {"a": 0.5, "b": [1.0]}
