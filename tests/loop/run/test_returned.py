"""What a callback may not change in the state that it returns, and how it is told so."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from loop import CancelBatch, CancelFit, State, fit
from tests.comparing import assert_same
from tests.loop.helpers import assert_at_rest, learner, on

MINE = learner()
START = MINE.init()

OWNED: dict[str, Any] = {
    "epoch": 7,
    "n_epoch": 7,
    "iter": 7,
    "n_iter": 7,
    "train_iter": 7,
    "epochs_seen": 7,
    "pct_train": 0.9,
    "training": False,
    "event": "after_fit",
    "done": (7,),
    "stopped": "SIGINT",
}


@pytest.mark.parametrize("field", OWNED)
def test_a_callback_that_writes_a_field_of_the_machine_is_named(field: str) -> None:
    spy = on(after_step=lambda state: state.replace(**{field: OWNED[field]}))
    said = f"callback 'spy' returned from after_step a state whose {field} is "
    with pytest.raises(ValueError, match=said):
        fit(MINE, START, 1, [spy])


@pytest.mark.parametrize("field", OWNED)
def test_so_is_one_whose_signal_carries_such_a_state(field: str) -> None:
    def act(state: State) -> None:
        raise CancelBatch(state.replace(**{field: OWNED[field]}))

    said = rf"CancelBatch, raised by callback 'spy' in after_step, carries a state whose {field} is"
    with pytest.raises(ValueError, match=said):
        fit(MINE, START, 1, [on(after_step=act)])


@pytest.mark.parametrize("change", [dict(learner=None), dict(resources={"spy": 1})])
def test_what_is_lent_is_not_for_callbacks_to_take_away(change: dict[str, Any]) -> None:
    (field,) = change
    with pytest.raises(ValueError, match=f"whose {field} is not the run's: only brackets"):
        fit(MINE, START, 1, [on(before_batch=lambda state: state.replace(**change))])


def test_a_state_of_another_place_is_told_about_back_to() -> None:
    with pytest.raises(ValueError, match=r"to go back to an older state, return state\.back_to"):
        fit(MINE, START, 1, [on(after_epoch=lambda state: START)])


def test_going_back_takes_what_was_learned_and_counted_and_stays_in_its_place() -> None:
    places: list[tuple[int, int, int]] = []

    def note(state: State) -> None:
        places.append((state.epoch, state.iter, state.train_iter))

    def undo(state: State) -> State | None:
        return state.back_to(START) if state.training and places[-1][:2] == (0, 2) else None

    end = fit(MINE, START, 2, [on(before_batch=note, after_batch=undo)])
    trained = [place for place in places if place[1] < 3]
    assert [place[2] for place in trained] == [0, 1, 2, 0, 0, 0, 1, 2, 3, 3]
    assert len(end.history.losses) == 3
    assert_at_rest(end)


def test_the_next_callback_at_the_event_sees_its_name_again() -> None:
    seen: list[str] = []
    back = on("back", after_epoch=lambda state: state.back_to(START))
    later = on("later", 1, after_epoch=lambda state: seen.append(state.event))
    fit(MINE, START, 1, [back, later])
    assert seen == ["after_epoch"]


def test_an_undone_state_may_be_changed_further() -> None:
    def undo(state: State) -> None:
        raise CancelFit(state.back_to(START).remember("why", "nan"))

    end = fit(MINE, START, 1, [on(after_epoch=undo)])
    assert_same(end.params, START.params)
    assert end.memory["why"] == "nan"


TREES: dict[str, tuple[Callable[[State], State], str]] = {
    "no dict": (lambda state: state.replace(params=[1]), "params is of type list"),
    "a name is missing": (
        lambda state: state.replace(params={"weight": state.params["weight"]}),
        "params has no 'bias'",
    ),
    "a strange name": (
        lambda state: state.replace(params={**state.params, "b": state.params["bias"]}),
        "params has a strange 'b'",
    ),
    "a shape": (
        lambda state: state.replace(params={**state.params, "bias": torch.zeros(3)}),
        r"params\['bias'\] has shape \(3,\), where the run has \(2,\)",
    ),
    "a dtype": (
        lambda state: state.replace(
            params={name: value.double() for name, value in state.params.items()}
        ),
        r"params\['weight'\] has dtype torch.float64, where the run has torch.float32",
    ),
    "no tensor": (
        lambda state: state.replace(params={**state.params, "bias": 0.0}),
        r"params\['bias'\] is of type float",
    ),
    "a slot": (
        lambda state: state.replace(opt_state={"step": state.opt_state["step"]}),
        "opt_state is built otherwise",
    ),
    "the dtype of a slot": (
        lambda state: state.replace(
            opt_state={**state.opt_state, "step": state.opt_state["step"].float()}
        ),
        r"opt_state\['step'\] has dtype torch.float32",
    ),
    "gradients": (lambda state: state.replace(grads={}), "grads has no 'bias'"),
    "the shape of a gradient": (
        lambda state: state.replace(grads={**state.grads, "bias": torch.ones(2, 2)}),
        r"grads\['bias'\] has shape \(2, 2\)",
    ),
}


@pytest.mark.parametrize("wrong", TREES)
def test_a_tree_of_another_kind_is_named_with_its_callback(wrong: str) -> None:
    """Before anything works on it, so that neither the model nor the optimizer gets the blame."""
    change, said = TREES[wrong]
    with pytest.raises((ValueError, TypeError), match=said) as caught:
        fit(MINE, START, 1, [on(before_step=change)])
    assert "callback 'spy' returned from before_step" in str(caught.value)


def test_gradients_may_be_none_or_of_another_dtype() -> None:
    """None stands still; sums of half-precision gradients are float32."""

    def change(state: State) -> State:
        assert state.grads is not None
        return state.replace(grads={**state.grads, "bias": None})

    assert_same(fit(MINE, START, 1, [on(before_step=change)]).params["bias"], START.params["bias"])
