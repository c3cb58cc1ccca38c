"""FR3: the learning rate finder: what it records, that it changes nothing, and what it suggests."""

import math
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from functional_sgd import Optimizer, adamw, by_path, chain, elementwise, sgd
from functional_sgd.schedules import Constant
from loop import (
    Batches,
    CancelBatch,
    CSVLogger,
    DataLoaders,
    EarlyStopping,
    GradientClip,
    Learner,
    LRFind,
    ParamScheduler,
    Progress,
    State,
    TerminateOnNaN,
    fit,
    lr_find,
)
from loop.callbacks.checkpoint import Checkpoint
from loop.callbacks.saving import SaveModel
from tests.loop.helpers import Kept, full, learner, loaders, on, one_weight, raise_once

SLOW = full(callbacks=[TerminateOnNaN()])


def told(values: list[float], **rest: Any) -> Learner:
    """A learner whose losses are these, whatever it learns."""
    data = DataLoaders([(torch.ones(2, 1), torch.full((2, 1), value)) for value in values])
    return Learner(one_weight(), data, lambda pred, y: y.mean() + 0 * pred.mean(), sgd(), **rest)


def found(values: list[float], **options: Any) -> LRFind:
    """What the finder records of these losses; not smoothed, unless told otherwise."""
    mine = told(values)
    return lr_find(mine, mine.init(), **{"iterations": len(values), "beta": 0.0, **options})


def test_fr3_the_learning_rate_rises_by_equal_factors() -> None:
    lrs = found([1.0] * 100).lrs
    assert lrs == tuple(1e-7 * (10.0 / 1e-7) ** (k / 100) for k in range(100))
    assert lrs[50] == pytest.approx(1e-3, rel=1e-12)
    assert lrs[99] == pytest.approx(8.3176377, rel=1e-7)


def test_the_batches_are_trained_with_it() -> None:
    used: list[float] = []
    mine = learner(opt=sgd())
    spy = on(order=2000, before_step=lambda state: used.append(state.hyper["lr"]))
    recorded = lr_find(mine, mine.init(), 1e-3, 1.0, 8, callbacks=[spy])
    assert tuple(used) == recorded.lrs
    assert len(used) == 8


def test_the_first_step_is_that_of_the_first_lr() -> None:
    """The second loss is the one after a step with the first lr."""
    x, y = torch.ones(1, 1), torch.zeros(1, 1)
    mine = Learner(one_weight(1.0), DataLoaders([(x, y)]), nn.functional.mse_loss, sgd())
    raw = lr_find(mine, mine.init(), 0.125, 0.5, 2, stop_factor=None, beta=0.0)
    assert raw.lrs == (0.125, 0.25)
    assert raw.losses == (1.0, (1 - 2 * 0.125) ** 2)


def test_the_losses_are_averaged_and_debiased() -> None:
    """(0.98 * 1 + 2) / (0.98 + 1), and so on."""
    smooth = found([1.0, 2.0, 3.0, 4.0], beta=0.98).losses
    assert smooth == pytest.approx(
        [1.0, 2.98 / 1.98, 5.9204 / 2.9404, 9.801992 / 3.881592], rel=1e-12
    )


@pytest.mark.parametrize(
    ("losses", "count"),
    [
        ([2.0, 1.0, 3.9, 4.0, 5.0, 6.0], 5),
        ([2.0, 1.0, 4.1, 1.0], 3),
        ([2.0, 8.1, 1.0], 2),
        ([2.0, 8.0, 1.0], 3),
    ],
)
def test_fr3_it_stops_above_four_times_the_best(losses: list[float], count: int) -> None:
    assert found(losses).losses == pytest.approx(losses[:count])


def test_another_factor() -> None:
    assert found([1.0, 2.5, 1.0], stop_factor=2.0).losses == (1.0, 2.5)


def test_no_factor_means_no_end() -> None:
    assert len(found([1.0, 100.0, 1e6], stop_factor=None).losses) == 3


def test_it_is_the_smoothed_loss_that_counts() -> None:
    assert len(found([1.0] * 20 + [5.0] * 3, beta=0.9).losses) == 23


def test_nan_does_not_stop_it_and_ends_the_curve() -> None:
    curve = found([3.0, 2.0, 1.0, math.nan, *[1.0] * 16])
    assert len(curve.losses) == 20
    assert curve.curve[1] == [1.0]  # the first 20 // 10 are left out


def test_an_infinite_loss_ends_the_curve_too() -> None:
    curve = found([3.0, 2.0, 1.0, math.inf, *[1.0] * 16], stop_factor=None)
    assert curve.curve == ([pytest.approx(curve.lrs[2])], [1.0])


def test_the_curve_is_without_its_ends() -> None:
    whole = found([float(n) for n in range(40, 0, -1)])
    lrs, losses = whole.curve
    assert losses == pytest.approx([float(n) for n in range(36, 5, -1)])
    assert lrs == list(whole.lrs[4:35])


def test_epochs_are_repeated_as_needed() -> None:
    assert len(lr_find(learner(), learner().init(), iterations=11, stop_factor=None).lrs) == 11


def test_data_without_a_length() -> None:
    class Endless:
        def __iter__(self) -> Any:
            return iter(loaders().train)

    mine = learner(data=DataLoaders(Endless()))
    assert len(lr_find(mine, mine.init(), iterations=7).lrs) == 7


def test_nothing_is_validated() -> None:
    class Forbidden:
        def __iter__(self) -> Any:
            raise AssertionError("validation data")

    mine = learner(data=replace(loaders(), valid=Forbidden()))
    assert len(lr_find(mine, mine.init(), iterations=7).lrs) == 7


def test_a_cancelled_batch_takes_its_lr_with_it() -> None:
    cut = on(after_pred=raise_once(CancelBatch, at=1))
    recorded = lr_find(learner(), learner().init(), iterations=5, stop_factor=None, callbacks=[cut])
    assert recorded.lrs == tuple(1e-7 * 1e8 ** (k / 5) for k in (0, 2, 3, 4))
    assert len(recorded.losses) == 4


def test_a_gradient_callback_takes_part() -> None:
    plain = lr_find(learner(), learner().init(), 0.01, 10.0, 30)
    mine = learner(callbacks=[GradientClip(1e-3)])
    assert lr_find(mine, mine.init(), 0.01, 10.0, 30).losses != plain.losses


def test_what_reports_or_watches_epochs_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        CSVLogger(tmp_path / "log.csv"),
        Checkpoint(tmp_path / "run"),
        SaveModel(tmp_path / "best.safetensors"),
    ]
    others = [Progress(), *files, EarlyStopping(patience=1)]
    mine = learner(callbacks=others)
    assert lr_find(mine, mine.init()) == lr_find(learner(), learner().init())
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_a_schedule_of_lr_does_not_interfere() -> None:
    mine = learner(callbacks=[ParamScheduler({"lr": Constant(0.5)})])
    assert lr_find(mine, mine.init()) == lr_find(learner(), learner().init())


def test_a_run_ended_by_another_callback() -> None:
    mine = told([1.0, math.nan, 1.0], callbacks=[TerminateOnNaN()])
    assert lr_find(mine, mine.init()).losses == (1.0,)


@pytest.mark.parametrize("error", [None, RuntimeError("no")])
def test_fr3_nothing_is_changed(error: Exception | None) -> None:
    """Bit for bit: the state, torch's random numbers, the mode of every layer; even if the model
    fails.
    """
    state, before = SLOW.init(), torch.get_rng_state()
    SLOW.model[1].eval()
    modes = [layer.training for layer in SLOW.model.modules()]
    kept = Kept(state)
    values = [value.clone() for value in SLOW.model.state_dict().values()]
    failing = [on(after_loss=raise_once(error, at=5))] if error else []
    with pytest.raises(RuntimeError, match="no") if error else nullcontext():
        lr_find(SLOW, state, callbacks=failing)
    kept.check()
    assert torch.equal(torch.get_rng_state(), before)
    assert [layer.training for layer in SLOW.model.modules()] == modes
    assert all(map(torch.equal, SLOW.model.state_dict().values(), values))


def test_it_can_be_repeated_anywhere() -> None:
    assert lr_find(SLOW, SLOW.init()) == lr_find(SLOW, SLOW.init())


def test_a_tree_of_learning_rates_keeps_its_ratios() -> None:
    used: list[Any] = []
    mine = learner(opt=sgd())
    state = mine.init()
    state = state.replace(hyper={"lr": by_path(state.params, {"weight": 0.02, "bias": 0.1})})
    spy = on(order=2000, before_step=lambda state: used.append(state.hyper["lr"]))
    recorded = lr_find(mine, state, 1e-3, 1.0, 6, callbacks=[spy])
    assert [lr["bias"] for lr in used] == list(recorded.lrs)
    assert [lr["bias"] / lr["weight"] for lr in used] == pytest.approx([5.0] * 6, rel=1e-12)


def test_the_ratios_are_those_of_before_a_schedule_that_was_stopped() -> None:
    used: list[Any] = []
    mine = learner(opt=sgd())
    state = mine.init()
    start = state.replace(hyper={"lr": by_path(state.params, {"weight": 0.02, "bias": 0.1})})
    schedule = ParamScheduler({"lr": {"weight": Constant(1.0), "bias": Constant(2.0)}})
    with pytest.raises(ZeroDivisionError) as caught:
        fit(mine, start, 1, [schedule, on(after_epoch=raise_once(ZeroDivisionError))])
    spy = on(order=2000, before_step=lambda state: used.append(state.hyper["lr"]))
    lr_find(mine, caught.value.state, 1e-3, 1.0, 6, callbacks=[spy])  # type: ignore[attr-defined]
    assert [lr["bias"] / lr["weight"] for lr in used] == pytest.approx([5.0] * 6, rel=1e-12)


def test_a_search_without_a_state_says_so() -> None:
    with pytest.raises(TypeError, match="lr_find: the second argument must be a State, got int"):
        lr_find(SLOW, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("at", [None, 0, 3])
def test_a_state_that_was_trained_already(at: int | None) -> None:
    """Its history and counters have no part in it, whether or not a batch is cancelled."""

    def search(state: State) -> LRFind:
        cut = [] if at is None else [on(after_pred=raise_once(CancelBatch, at))]
        return lr_find(mine, state, iterations=6, callbacks=cut)

    mine = learner(opt=sgd())
    trained = fit(mine, mine.init(), 2)
    assert search(trained) == search(mine.init().replace(params=trained.params))


def test_an_interruption_is_no_answer() -> None:
    press = on(after_loss=lambda state: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match="SIGINT"):
        lr_find(learner(), learner().init(), callbacks=[press])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 0.0}, "0 < start < end, got 0.0 and 10.0"),
        ({"start": 2.0, "end": 1.0}, "0 < start < end"),
        ({"iterations": 0}, "iterations must be a whole number"),
        ({"iterations": 2.5}, "iterations must be a whole number"),
        ({"stop_factor": 0.5}, "stop_factor must be at least 1"),
        ({"beta": 1.0}, "beta must be in"),
    ],
)
def test_numbers_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lr_find(learner(), learner().init(), **options)


def test_an_optimizer_without_lr() -> None:
    @elementwise
    def fixed(param: Tensor, grad: Tensor) -> dict[str, Tensor]:
        return {"param": param - 0.1 * grad}

    mine = learner(opt=chain(fixed))
    with pytest.raises(ValueError, match="reads no 'lr'"):
        lr_find(mine, mine.init())


def classify() -> tuple[nn.Module, DataLoaders]:
    """A small net and a problem that it can learn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.randn(512, 20)
        y = (x @ torch.randn(20, 4)).argmax(dim=1)
        return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4)), DataLoaders(
            Batches((x, y), 64)
        )


def test_b43_sgd_wants_a_higher_lr_than_adam() -> None:
    def search(opt: Optimizer) -> LRFind:
        mine = Learner(*classify(), nn.functional.cross_entropy, opt)
        return lr_find(mine, mine.init())

    by_sgd, by_adam = search(sgd()), search(adamw())
    assert by_sgd.valley > 5 * by_adam.valley
    assert by_sgd.minimum > 2 * by_adam.minimum


def test_b3_the_suggestions_are_a_named_tuple() -> None:
    mine = Learner(*classify(), nn.functional.cross_entropy, adamw())
    recorded = lr_find(mine, mine.init())
    tenth, steep = recorded.suggestions.minimum, recorded.suggestions.steep
    assert (tenth, steep) == (recorded.minimum, recorded.steep)
    assert tenth == recorded.curve[0][recorded.curve[1].index(min(recorded.curve[1]))] / 10
    assert recorded.suggestions == (recorded.valley, recorded.slide, tenth, steep)
