"""What is donated is given away: states, and the tensors of a model; errors and signals say so."""

import copy
import pickle
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
from torch import nn

import functional_sgd as fs
import loop
from loop import Learner, State, fit, lr_find, predict, trace, validate
from tests.comparing import Untouched, assert_same
from tests.loop.helpers import (
    assert_same_run,
    learned,
    learner,
    net,
    on,
    raise_once,
    raiser,
)

# What is given up is given up.

USES: dict[str, Callable[[Learner, State], Any]] = {
    "fit": lambda mine, state: fit(mine, state, 1),
    "fit(donate=True)": lambda mine, state: fit(mine, state, 1, donate=True),
    "trace": lambda mine, state: next(trace(mine, state, 1)),
    "validate": validate,
    "predict": predict,
    "lr_find": lambda mine, state: lr_find(mine, state),
    "load": lambda mine, state: mine.load(state),
}


@pytest.mark.parametrize("use", USES)
def test_a_spent_state_says_so(use: str) -> None:
    mine = learner()
    start = mine.init()
    fork = start.replace(hyper={**start.hyper, "lr": 0.5})
    end = fit(mine, start, 1, donate=True)
    for spent in (start, fork):
        with pytest.raises(ValueError, match=r"this state was donated to fit\(donate=True\)"):
            USES[use](mine, spent)
    USES[use](mine, end)


def test_the_numbers_of_a_spent_state_are_useless() -> None:
    mine = learner()
    start = mine.init()
    fit(mine, start, 1, donate=True)
    assert all(value.isnan().all() for value in start.params.values())
    assert start.params["weight"].shape == (2, 2)


def test_what_a_state_remembers_is_not_given_up() -> None:
    """The best weights, which a state has as its params too."""
    mine = learner()
    end = fit(mine, mine.init(), 2, [loop.SaveModel(None)])
    best = end.memory["save_model"]["params"]
    assert end.params["weight"] is best["weight"]
    kept = Untouched(best)
    fit(mine, end, 2, donate=True)
    kept.check()
    assert best["weight"].isfinite().all()


def test_a_state_that_does_not_begin_a_run_is_not_spent() -> None:
    mine = learner()
    start = mine.init()
    with pytest.raises(ValueError, match="reads no 'lrr'"):
        fit(mine, start, 1, donate=True, lrr=0.1)
    fit(mine, start, 1)


def test_keep_in_a_donated_run() -> None:
    mine, kept = learner(), []
    look = on(after_batch=lambda state: kept.append(state.keep()) if state.training else None)
    fit(mine, mine.init(), 1, [look], donate=True)
    expected: list[State] = []
    look = on(after_batch=lambda state: expected.append(state) if state.training else None)
    fit(mine, mine.init(), 1, [look])
    for found, wanted in zip(kept, expected, strict=True):
        assert_same((found.params, found.opt_state), (wanted.params, wanted.opt_state))


def test_going_back_to_what_was_kept() -> None:
    """back_to, with and without donation."""

    def ends(donate: bool) -> State:
        kept: list[State] = []

        def back(state: State) -> State | None:
            if state.training and state.iter == 0:
                kept.append(state.keep())
            return state.back_to(kept[0]) if state.training and state.iter == 2 else None

        mine = learner()
        return fit(mine, mine.init(), 1, [on(after_batch=back)], donate=donate)

    assert_same(learned(ends(True)), learned(ends(False)))


# Errors and signals.


def test_an_error_before_the_step_leaves_the_last_batch() -> None:
    def failed(donate: bool) -> State:
        mine = learner(net(), opt=fs.adamw())
        fails = on(after_loss=raise_once(RuntimeError("boom"), at=2))
        with pytest.raises(RuntimeError, match="boom") as caught:
            fit(mine, mine.init(), 2, [fails], donate=donate)
        state: State = caught.value.state  # type: ignore[attr-defined]
        return state

    found = failed(True)
    assert_same(learned(found), learned(failed(False)))
    assert found.train_iter == 2


def test_an_error_after_the_step_leaves_no_state_and_says_where_to_go_on() -> None:
    mine = learner()
    fails = on(after_step=raise_once(RuntimeError("boom"), at=1))
    with pytest.raises(RuntimeError, match="boom") as caught:
        fit(mine, mine.init(), 2, [fails], donate=True)
    assert caught.value.state is None  # type: ignore[attr-defined]
    assert "Go on from the last checkpoint" in "".join(caught.value.__notes__)


@pytest.mark.parametrize("event", ["after_loss", "after_step", "after_batch"])
def test_ctrl_c_ends_with_a_whole_batch(event: str) -> None:
    """After the step the batch is done to its end first."""
    mine = learner(net(), opt=fs.adamw())

    def interrupt(state: State) -> None:
        if state.training and state.train_iter + (event == "before_batch") == 1:
            signal.raise_signal(signal.SIGINT)

    found = fit(mine, mine.init(), 1, [on(**{event: interrupt})], donate=True, stop="return")
    assert found.stopped == "SIGINT"
    batches = found.train_iter
    assert batches == (1 if event in ("after_loss", "after_batch") else 2)
    expected = on(
        after_batch=lambda state: raiser(loop.CancelFit)() if state.train_iter == batches else None
    )
    other = fit(mine, mine.init(), 1, [expected])
    assert_same(learned(found), learned(other))
    assert_same_run(fit(mine, found, 1, resume=True), fit(mine, mine.init(), 1))


def test_a_checkpoint_never_has_what_was_half_overwritten(tmp_path: Path) -> None:
    """What fails after a step leaves the checkpoint before; the run goes on from there."""
    mine = learner(net(), opt=fs.adamw())
    keeper = loop.Checkpoint(tmp_path, batches=2)
    fails = on(after_step=raise_once(RuntimeError("boom"), at=3))
    with pytest.raises(RuntimeError, match="boom"):
        fit(mine, mine.init(), 2, [keeper, fails], donate=True)
    quiet = on(after_step=lambda state: None)
    end = fit(mine, mine.init(), 2, [keeper, quiet], donate=True, resume=tmp_path)
    assert_same_run(end, fit(mine, mine.init(), 2))


def test_a_checkpoint_of_an_error_before_the_step_is_the_last_batch(tmp_path: Path) -> None:
    mine = learner(net(), opt=fs.adamw())
    keeper = loop.Checkpoint(tmp_path)
    fails = on(after_loss=raise_once(RuntimeError("boom"), at=2))
    with pytest.raises(RuntimeError, match="boom"):
        fit(mine, mine.init(), 2, [keeper, fails], donate=True)
    assert loop.load_latest(tmp_path).train_iter == 2


# The model's own tensors.


def test_a_model_can_give_its_tensors_away() -> None:
    mine, twin = learner(net(), opt=fs.adamw()), learner(net(), opt=fs.adamw())
    places = {value.data_ptr() for value in mine.model.parameters()}
    start = mine.init(donate=True)
    assert {value.data_ptr() for value in start.params.values()} == places
    end = fit(mine, start, 2, donate=True)
    assert_same_run(end, fit(twin, twin.init(), 2))


@pytest.mark.parametrize("donate", [False, True])
def test_and_get_those_of_a_state_back(donate: bool) -> None:
    mine = learner(net(), opt=fs.adamw())
    end = fit(mine, mine.init(donate=True), 1, donate=True)
    expected = optree.tree_map(torch.clone, end.params)
    own = dict(mine.model.named_parameters())
    model = mine.load(end, donate=donate)
    assert dict(model.named_parameters()).keys() == own.keys()
    assert all(value is own[name] for name, value in model.named_parameters())
    assert_same({name: value.detach() for name, value in own.items()}, expected)
    assert all(value.requires_grad for value in own.values())
    model.eval()(torch.ones(1, 2))
    model.state_dict()
    if donate:
        with pytest.raises(ValueError, match=r"donated to Learner.load\(donate=True\)"):
            fit(mine, end, 1)
    else:
        shared = {v.data_ptr() for v in own.values()} & {v.data_ptr() for v in end.params.values()}
        assert not shared


@pytest.mark.parametrize(
    "use",
    [
        lambda mine: mine.model(torch.ones(1, 2)),
        lambda mine: mine.model.state_dict(),
        lambda mine: mine.init(),
        lambda mine: mine.init(donate=True),
    ],
    ids=["call", "state_dict", "init", "init again"],
)
def test_a_model_without_tensors_says_so(use: Callable[[Learner], Any]) -> None:
    mine = learner()
    start = mine.init(donate=True)
    with pytest.raises((RuntimeError, ValueError), match=r"init\(donate=True\)"):
        use(mine)
    validate(mine, start)  # which has others in its place
    mine.load(start)
    use(mine)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize(
    "use",
    [
        lambda mine: mine.model(torch.ones(1, 2)),
        lambda mine: mine.model.state_dict(),
        lambda mine: mine.init(),
        lambda mine: replace(mine, model=nn.Sequential(mine.model)).init(),
    ],
    ids=["call", "state_dict", "init", "init of what it is a part of"],
)
def test_a_copy_of_a_model_without_tensors_says_so_too(
    use: Callable[[Learner], Any], copied: Callable[[nn.Module], nn.Module]
) -> None:
    mine = learner()
    start = mine.init(donate=True)
    other = replace(mine, model=copied(mine.model))
    with pytest.raises((RuntimeError, ValueError), match=r"init\(donate=True\)"):
        use(other)
    assert validate(other, start) == validate(mine, start)
    assert_same({**other.load(start).state_dict()}, {**start.params})
    use(other)
    with pytest.raises((RuntimeError, ValueError), match=r"init\(donate=True\)"):
        use(mine)


def test_a_frozen_part_is_given_away_too() -> None:
    mine = learner(_half_frozen())
    start = mine.init(donate=True)
    assert "0.weight" in start.buffers
    end = fit(mine, start, 1, donate=True)
    assert_same(dict(mine.load(end).named_parameters())["0.weight"].detach(), net()[0].weight)


def _half_frozen() -> nn.Module:
    model = net()
    model[0].weight.requires_grad_(False)
    return model
