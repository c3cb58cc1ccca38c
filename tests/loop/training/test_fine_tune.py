"""fine_tune: the head first, then all of it."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from functional_sgd import adamw, chain, round_stochastically, sgd
from loop import CancelFit, Learner, State, fit
from loop.callbacks.checkpoint import Checkpoint
from loop.callbacks.freezing import BnFreeze
from loop.training.fine_tune import MEMORY, fine_tune, norm_names, with_head
from tests.comparing import assert_same
from tests.loop.helpers import Kept, assert_same_run, learned, learner, loaders, on


class Two(nn.Module):
    """A body with batch norm, and a head that comes last, or first."""

    def __init__(self, names: tuple[str, ...] = ("body", "head")) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            parts = {
                "body": nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU()),
                "head": nn.Linear(4, 2),
            }
        for name in names:
            self.add_module(name, parts[name])

    def forward(self, x: torch.Tensor) -> Any:
        """Body, then head."""
        return self.head(self.body(x))


NORMS = {"body.1.weight", "body.1.bias"}
HEAD = {"head.weight", "head.bias"}


def tuned(*callbacks: Any, model: nn.Module | None = None) -> Learner:
    """A learner of ten batches."""
    return learner(model or Two(), loaders(train=10), opt=adamw(), callbacks=callbacks)


def moved(start: State, end: State) -> set[str]:
    return {
        name for name, value in start.params.items() if not torch.equal(value, end.params[name])
    }


def rates(state: State, name: str) -> list[float]:
    """The learning rate of a parameter, batch by batch."""
    return [lr[name] for lr in state.history.hypers["lr"]]


def test_the_rates_of_both_halves() -> None:
    """Those of fastai for two groups and ten batches an epoch, whose own error is 1e-7."""
    mine = tuned()
    end = fine_tune(mine, mine.init(), epochs=1)
    body, head = rates(end, "body.0.weight"), rates(end, "head.weight")
    assert len(body) == len(head) == 20
    assert (body[0], head[0]) == pytest.approx((8e-6, 8e-5), rel=1e-6)
    assert (body[9], head[9]) == pytest.approx((1.961e-4, 1.961e-3), rel=1e-3)
    assert (body[10], head[10]) == pytest.approx((2e-6, 2e-4), rel=1e-6)
    assert (max(body[10:]), max(head[10:])) == pytest.approx((1e-5, 1e-3), rel=1e-6)
    assert head[13] == max(head[10:])


@pytest.mark.parametrize(("train_norms", "expected"), [(False, HEAD), (True, HEAD | NORMS)])
def test_first_the_head_moves_and_then_everything(train_norms: bool, expected: set[str]) -> None:
    mine = tuned()
    start = mine.init()
    first = fine_tune(mine, start, epochs=0, train_norms=train_norms)
    assert moved(start, first) == expected
    end = fine_tune(mine, start, epochs=1, train_norms=train_norms)
    assert moved(start, end) == {*start.params}
    assert (first.train_iter, end.train_iter) == (10, 20)


@pytest.mark.parametrize("order", [("body", "head"), ("head", "body")])
def test_the_head_by_a_pattern(order: tuple[str, ...]) -> None:
    """Wherever it is in the model."""
    mine = tuned(model=Two(order))
    start = mine.init()
    end = fine_tune(mine, start, epochs=1, head="head.*")
    expected = tuned()
    assert_same(end.params, fine_tune(expected, start, epochs=1).params)


def test_a_head_that_is_part_of_a_child() -> None:
    params = Two().state_dict()
    assert with_head(params, "body.0.*")[-1] == ["body.0.weight", "body.0.bias"]
    assert [group[0] for group in with_head(params, "body.0.*")] == [
        "body.1.weight",
        "head.weight",
        "body.0.weight",
    ]


@pytest.mark.parametrize(
    ("head", "message"), [("*", "nothing is left to freeze"), ("tail.*", "matches no leaf")]
)
def test_a_head_that_is_none(head: str, message: str) -> None:
    mine = tuned()
    with pytest.raises(ValueError, match=f"fine_tune: .*{message}"):
        fine_tune(mine, mine.init(), 1, head=head)


def test_a_model_of_one_layer() -> None:
    mine = learner(opt=adamw())
    with pytest.raises(
        ValueError,
        match=r"fine_tune: nothing is left to freeze: .*head, weight, bias. Say with head",
    ):
        fine_tune(mine, mine.init(), 1)


def test_normalisation_layers() -> None:
    model = nn.Sequential(
        nn.Conv1d(2, 2, 1), nn.InstanceNorm1d(2, affine=True), nn.LayerNorm(2), Two()
    )
    assert {name.rpartition(".")[0] for name in norm_names(model)} == {"1", "2", "3.body.1"}


def test_statistics_can_stand_still_too() -> None:
    """Both halves, of layers that are frozen in the first."""
    mine = tuned()
    start = mine.init()
    first = fine_tune(mine, start, epochs=0, train_norms=False, callbacks=[BnFreeze()])
    assert_same(first.buffers, start.buffers)
    assert not torch.equal(
        fine_tune(mine, start, 1, train_norms=False, callbacks=[BnFreeze()]).buffers[
            "body.1.running_mean"
        ],
        start.buffers["body.1.running_mean"],
    )


def test_each_half_begins_with_a_fresh_optimizer_state() -> None:
    steps: list[int] = []
    mine = tuned(on(before_fit=lambda state: steps.append(int(state.opt_state["step"].max()))))
    warm = fit(tuned(), mine.init(), 1)
    assert warm.opt_state["step"].max() == 10
    end = fine_tune(mine, warm, epochs=2)
    assert steps == [0, 0]
    assert end.opt_state["step"].max() == 20


def test_nothing_is_left_behind_and_runs_repeat() -> None:
    mine = tuned()
    start = mine.init()
    kept = Kept(start)
    end = fine_tune(mine, start, epochs=2)
    kept.check()
    assert end.hyper == start.hyper
    assert MEMORY not in end.memory
    assert_same_run(fine_tune(mine, start, epochs=2), end)


def test_a_run_that_a_callback_ends_in_the_first_half_goes_on_with_the_second() -> None:
    """As in fastai: CancelFit ends one fit."""
    calls: list[int] = []

    def once(state: State) -> None:
        calls.append(state.train_iter)
        if len(calls) == 1:
            raise CancelFit(state)

    mine = tuned()
    end = fine_tune(mine, mine.init(), epochs=1, callbacks=[on(after_batch=once)])
    assert calls[:2] == [1, 2]
    assert MEMORY not in end.memory


def interrupt_at(train_iter: int) -> Any:
    """A callback that asks for the end of the run before this batch is done."""

    def stop(state: State) -> None:
        if state.train_iter == train_iter and state.training:
            os.kill(os.getpid(), signal.SIGTERM)

    return on(before_batch=stop)


@pytest.mark.parametrize(
    ("train_iter", "half"), [(0, "head"), (4, "head"), (10, "all"), (17, "all")]
)
@pytest.mark.parametrize("epochs", [1, 2])
def test_an_interrupted_run_is_resumed_where_it_was(
    train_iter: int, half: str, epochs: int
) -> None:
    mine = tuned()
    stopped = fine_tune(
        mine, mine.init(), epochs, callbacks=[interrupt_at(train_iter)], stop="return"
    )
    assert (stopped.stopped, stopped.train_iter, stopped.memory[MEMORY]) == (
        "SIGTERM",
        train_iter,
        half,
    )
    end = fine_tune(mine, stopped, epochs, resume=True)
    assert_same_run(end, fine_tune(mine, mine.init(), epochs))
    assert MEMORY not in end.memory


def test_an_interrupted_half_ends_the_script_with_the_state_of_that_half() -> None:
    mine = tuned()
    with pytest.raises(SystemExit) as caught:
        fine_tune(mine, mine.init(), 1, callbacks=[interrupt_at(4)])
    assert caught.value.state.memory[MEMORY] == "head"  # type: ignore[union-attr]


def test_a_new_run_from_a_stopped_one_begins_with_the_head(tmp_path: Path) -> None:
    mine = tuned()
    stopped = fine_tune(mine, mine.init(), 1, callbacks=[interrupt_at(15)], stop="return")
    for resume in (False, tmp_path):
        assert fine_tune(mine, stopped, 1, resume=resume).train_iter == 15 + 20


def test_a_state_that_is_not_within_a_fine_tune() -> None:
    mine = tuned()
    for state in (
        mine.init(),
        fit(mine, mine.init(), 1, [interrupt_at(5)], stop="return"),
        fine_tune(mine, mine.init(), 1),
    ):
        with pytest.raises(ValueError, match="fine_tune: the state is not within a fine_tune"):
            fine_tune(mine, state, 1, resume=True)


@pytest.mark.parametrize("train_iter", [3, 13])
def test_a_crash_is_resumed_from_the_checkpoints_of_either_half(
    train_iter: int, tmp_path: Path
) -> None:
    def crash(state: State) -> None:
        if state.train_iter == train_iter:
            raise OSError("full")

    mine = tuned(Checkpoint(tmp_path, batches=2))
    with pytest.raises(OSError, match="full"):
        fine_tune(mine, mine.init(), 1, callbacks=[on(before_step=crash)], resume=tmp_path)
    end = fine_tune(mine, mine.init(), 1, resume=tmp_path)
    assert_same(learned(end), learned(fine_tune(tuned(), mine.init(), 1)))


def test_other_arguments_go_to_both_halves(tmp_path: Path) -> None:
    mine = tuned()
    end = fine_tune(mine, mine.init(), 1, moms=(0.5, 0.5, 0.5), div_final=10.0)
    assert set(end.history.hypers["mom"]) == {0.5}
    assert fine_tune(mine, mine.init(), 1, frozen_epochs=0).train_iter == 10
    assert_same(
        learned(fine_tune(mine, mine.init(), 1, resume=tmp_path)),
        learned(fine_tune(mine, mine.init(), 1)),
    )


@pytest.mark.parametrize("halves", [(4, 13), (None, 7), (25, 3)])
def test_either_half_may_be_counted_in_steps(halves: tuple[int | None, int]) -> None:
    frozen_steps, steps = halves
    mine, seen = tuned(), []
    look = on("look", after_step=lambda state: seen.append(bool(state.frozen)))
    end = fine_tune(mine, mine.init(), steps=steps, frozen_steps=frozen_steps, callbacks=[look])
    first = 10 if frozen_steps is None else frozen_steps
    assert seen == [True] * first + [False] * steps
    assert end.train_iter == first + steps
    head = rates(end, "head.weight")
    assert (head[0], head[first]) == pytest.approx((8e-5, 2e-4))  # a cycle each
    assert head[-1] < max(head[first:])


@pytest.mark.parametrize("lengths", [{}, {"epochs": 1, "steps": 5}])
def test_a_second_half_without_a_length_is_an_error_before_the_first(lengths: Any) -> None:
    mine, seen = tuned(), []
    look = on("look", before_fit=lambda state: seen.append(state))
    with pytest.raises(ValueError, match="expected epochs or steps"):
        fine_tune(mine, mine.init(), callbacks=[look], **lengths)
    assert not seen


@pytest.mark.parametrize("seed", [0, 5])
def test_both_halves_draw_by_the_seed_of_the_state(seed: int) -> None:
    mine = learner(Two(), loaders(train=2), opt=chain(sgd(), round_stochastically))
    seeds: list[int] = []

    def note(state: State) -> None:
        seeds.append(int(state.opt_state["seed"]))

    fine_tune(mine, mine.init(seed), 1, callbacks=[on(before_train=note)])
    assert seeds == [seed, seed]
