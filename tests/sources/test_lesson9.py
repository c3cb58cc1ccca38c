"""Lesson 9 of the 2019 course (N are its rows): the loop, callbacks, annealing; data is in
test_loop_data.py.
"""

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import ConstantLR, LambdaLR

import loop
from functional_sgd import sgd
from functional_sgd.schedules import Constant, Cosine, Exponential, Join, Linear, one_cycle
from loop import (
    Callback,
    CancelBatch,
    CancelFit,
    DataLoaders,
    Learner,
    ParamScheduler,
    Recorder,
    State,
    TorchScheduler,
    events,
    fit,
    trace,
)
from loop.callback import in_order, snake_case
from tests.comparing import assert_same
from tests.loop.helpers import (
    batches,
    everywhere,
    learner,
    linear,
    loaders,
    losses,
    on,
    raise_once,
    raiser,
)

MINE = learner()
START = MINE.init()


def test_n30_a_callback_has_a_say_at_every_step() -> None:
    """All events of a run without signals are 16; the other seven come after signals."""
    seen: list[str] = []
    fit(MINE, START, 1, [everywhere(lambda event, state: seen.append(event))])
    assert {*events()} - {*seen} == {
        event for event in events() if event.startswith("after_cancel_")
    }
    assert len({*seen}) == 16


def test_n31_n46_three_ways_to_make_a_learner() -> None:
    """All arguments at once; a factory, which is a partial; from another learner. lr is one of the
    arguments.
    """
    at_once = Learner(linear(), loaders(), mse_loss, sgd(lr=0.3))
    make_opt = partial(sgd, lr=0.3)
    factory = partial(Learner, data=loaders(), loss=mse_loss)
    from_parts = factory(model=linear(), opt=make_opt())
    changed = replace(learner(), opt=sgd(lr=0.3))
    ends = [fit(one, one.init(), 2).params for one in (at_once, from_parts, changed)]
    assert_same(ends[0], ends[1])
    assert_same(ends[0], ends[2])
    assert_same(ends[0], fit(replace(changed, opt=sgd()), changed.init(), 2, lr=0.3).params)


def test_n33_a_learner_is_storage() -> None:
    """Ten fields, no method that trains, nothing to write to; fit is a function of it."""
    assert [
        one.name for one in fields(Learner)
    ] == "model data loss opt metrics callbacks n_inputs targets fused salt".split()
    assert [
        name for name in vars(Learner) if callable(getattr(Learner, name)) and name[0] != "_"
    ] == ["init", "load"]
    with pytest.raises(FrozenInstanceError):
        MINE.loss = mse_loss  # type: ignore[misc]


def test_n34_a_signal_keeps_later_callbacks_from_its_event_only() -> None:
    seen: list[str] = []
    stop = on("stop", 0, after_pred=raise_once(CancelBatch))
    later = everywhere(lambda event, state: seen.append(event), name="later", order=1)
    fit(learner(data=loaders(train=2, valid=None)), START, 1, [stop, later])
    assert (seen.count("before_batch"), seen.count("after_pred"), seen.count("after_batch")) == (
        2,
        1,
        2,
    )


def test_n35_exactly_ten_steps() -> None:
    seen: list[int] = []

    def count(state: State) -> None:
        seen.append(len(seen))
        if len(seen) == 10:
            raise CancelFit(state)

    end = fit(MINE, START, 100, [on(after_step=count)])
    assert len(seen) == 10
    assert set(end.opt_state["step"].tolist()) == {10}


def test_n36_any_object_with_one_handler_is_a_callback() -> None:
    """Nothing to inherit from, and no need for the other events."""
    seen: list[int] = []
    fit(MINE, START, 2, [SimpleNamespace(after_step=lambda state: seen.append(state.train_iter))])
    assert seen == [0, 1, 2, 3, 4, 5]


def test_n37_none_means_no_change_and_true_is_an_error() -> None:
    """There, returning True ended things, since None is falsy; here, only signals do, and a bool is
    a slip.
    """
    assert_same(
        fit(MINE, START, 1, [on(after_step=lambda state: None)]).params, fit(MINE, START, 1).params
    )
    with pytest.raises(TypeError, match="returned bool from after_step: expected a State or None"):
        fit(MINE, START, 1, [on(after_step=lambda state: True)])


def test_n38_a_whole_number_is_the_order_and_ties_stay() -> None:
    callbacks = [
        on(name, order, before_fit=print)
        for name, order in [("d", 1), ("b", 0), ("c", 0), ("a", -1)]
    ]
    assert [one.name for one in in_order(callbacks)] == ["a", "b", "c", "d"]


def test_n39_epochs_done_as_a_number_with_a_fraction() -> None:
    """2 epochs of 5 batches: 0, .2, ..., 1.8, and its share of the run, 0, .1, ..., .9, is what
    schedules go by.
    """
    mine = learner(data=loaders(train=5, valid=1))
    running = trace(mine, mine.init(), 2, [ParamScheduler({"lr": Linear(0, 1)})])
    states = [state for event, state in running if event == "after_pred" and state.training]
    assert [state.epoch + state.iter / state.n_iter for state in states] == pytest.approx(
        [k / 5 for k in range(10)]
    )
    assert [state.pct_train for state in states] == pytest.approx([k / 10 for k in range(10)])
    assert [state.hyper["lr"] for state in states] == pytest.approx([k / 10 for k in range(10)])


ARGUMENTS: dict[str, dict[str, Any]] = {
    "CSVLogger": {"path": "log.csv"},
    "Checkpoint": {"folder": "runs"},
    "Freeze": {"patterns": "body.*"},
    "GradientAccumulation": {"batches": 2},
    "JSONLLogger": {"path": "log.jsonl"},
    "ParamScheduler": {"schedules": {"lr": Linear(0, 1)}},
    "RecordValues": {"size": len},
    "SaveModel": {"path": None},
    "TensorBoardLogger": {"log_dir": "runs"},
    "TorchScheduler": {"make": ConstantLR},
    "TrackerLogger": {"log": print},
}
SHIPPED = {
    value
    for value in vars(loop).values()
    if isinstance(value, type) and issubclass(value, Callback)
}


@pytest.mark.parametrize("name", sorted(value.__name__ for value in SHIPPED - {Callback}))
def test_n40_callbacks_can_be_copied_and_pickled(name: str) -> None:
    """Nothing is looked up elsewhere, so there is nothing to recurse into: what is not there is an
    AttributeError.
    """
    one = getattr(loop, name)(**ARGUMENTS.get(name, {}))
    assert copy.deepcopy(one) == one
    assert pickle.loads(pickle.dumps(one)) == one
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        one.nothing


def test_n41_names_in_snake_case_and_only_once() -> None:
    assert [snake_case(name) for name in ("TrainEval", "AvgStatsCallback")] == [
        "train_eval",
        "avg_stats_callback",
    ]
    with pytest.raises(ValueError, match="two callbacks are called 'recorder'"):
        in_order([Recorder(), Recorder()])


def halved(pred: Tensor, target: Tensor) -> Tensor:
    """A metric."""
    return target.mean() / 2


@dataclass(frozen=True)
class AvgStats(Callback):
    """The course's callback: sums weighted by batch size, apart for both phases, printed after each
    epoch.
    """

    metric: Callable[[Tensor, Tensor], Tensor]
    order: ClassVar[int] = 1

    def before_epoch(self, state: State) -> State:
        return state.remember(self.name, {"train": (0.0, 0.0, 0), "valid": (0.0, 0.0, 0)})

    def after_loss(self, state: State) -> State:
        count, phase = len(state.y), "train" if state.training else "valid"
        loss, metric, total = state.memory[self.name][phase]
        sums = (
            loss + state.loss.item() * count,
            metric + self.metric(state.pred, state.y).item() * count,
        )
        return state.remember(self.name, {**state.memory[self.name], phase: (*sums, total + count)})

    def after_epoch(self, state: State) -> None:
        for phase, (loss, metric, total) in state.memory[self.name].items():
            print(f"{phase}: {[round(loss / total, 4), round(metric / total, 4)]}")


def plays(values: list[tuple[float, int]]) -> list[tuple[Tensor, Tensor]]:
    """Batches of so many samples whose loss is this."""
    return [(torch.zeros(count, 1), torch.full((count, 1), value)) for value, count in values]


def test_n42_n43_averages_of_both_phases_by_a_partial() -> None:
    """(4 * .5 + 1 * 3) / 5 = 1 and (2 * 1 + 6 * 2) / 8 = 1.75: the same numbers as the
    Recorder's.
    """
    make = partial(AvgStats, halved)
    data = DataLoaders(plays([(0.5, 4), (3.0, 1)]), plays([(1.0, 2), (2.0, 6)]))
    mine = Learner(
        nn.Linear(1, 1),
        data,
        lambda pred, y: 0 * pred.sum() + y.mean(),
        sgd(lr=0.1),
        [halved],
        [make()],
    )
    with redirect_stdout(io.StringIO()) as printed:
        end = fit(mine, mine.init(), 1, [Recorder(train_metrics=True)])
    assert printed.getvalue() == "train: [1.0, 0.5]\nvalid: [1.75, 0.875]\n"
    row = end.history.rows[0]
    assert (row["train_mean_loss"], row["train_halved"], row["valid_loss"], row["halved"]) == (
        1,
        0.5,
        1.75,
        0.875,
    )


def test_n43_a_callback_serves_several_runs_so_no_factory_is_needed() -> None:
    """Two runs in turns with one object, which remembers nothing itself."""
    counter = on("count", after_step=lambda s: s.remember("count", s.memory.get("count", 0) + 1))
    one, other = (trace(learner(callbacks=[counter]), START, epochs) for epochs in (1, 1))
    counts = [[s.memory.get("count") for _, s in (next(one), next(other))] for _ in range(20)]
    assert all(mine == yours for mine, yours in counts)
    assert counts[-1] == [2, 2]


def test_n47_an_error_names_the_callback_the_event_and_the_batch() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        fit(
            MINE,
            START,
            1,
            [on("divider", after_loss=raise_once(ZeroDivisionError("by zero"), at=1))],
        )
    assert caught.value.__notes__ == [
        "loop: raised by callback 'divider' in after_loss, training batch 1 of epoch 0."
    ]
    with pytest.raises(RuntimeError) as shapes:
        fit(learner(nn.Linear(3, 2)), learner(nn.Linear(3, 2)).init(), 1)
    assert "in [predict]" in shapes.value.__notes__[0]
    assert "float32[4, 2]" in shapes.value.__notes__[0]


def test_n49_the_first_batch_is_scheduled_already() -> None:
    """Whoever schedules it, lr is set before the batch, and recorded as the batch was trained with
    it.
    """
    lrs = [0.1, 0.2, 0.3]
    ours = fit(MINE, START, 1, [ParamScheduler({"lr": lambda share: 0.1 + 0.3 * share})], lr=9.0)
    torchs = fit(
        MINE, START, 1, [TorchScheduler(partial(LambdaLR, lr_lambda=lambda k: k + 1))], lr=0.1
    )
    assert list(ours.history.hypers["lr"]) == pytest.approx(lrs)
    assert list(torchs.history.hypers["lr"]) == pytest.approx(lrs)


def test_n51_an_annealer_is_a_class_of_start_and_end() -> None:
    """No decorator to hide the signature, and it can be pickled."""
    assert Linear(1, 2)(0.3) == 1.3
    assert list(inspect.signature(Linear).parameters) == ["start", "end"]
    assert pickle.loads(pickle.dumps(Linear(1, 2))) == Linear(1, 2)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Linear(0, 2), (0, 0.5, 1, 1.5, 2)),
        (Cosine(0, 2), (0, 0.2928932188, 1, 1.7071067812, 2)),
        (Constant(2), (2, 2, 2, 2, 2)),
        (Exponential(1, 2), (1, 1.1892071150, 1.4142135624, 1.6817928305, 2)),
    ],
)
def test_n52_n53_annealers_at_quarters_and_as_a_plot_of_tensors(
    schedule: Any, values: tuple[float, ...]
) -> None:
    positions = torch.linspace(0, 1, 5)
    found = torch.stack(
        [torch.as_tensor(schedule(position), dtype=torch.float32) for position in positions]
    )
    torch.testing.assert_close(found, torch.tensor(values, dtype=torch.float32))
    (line,) = Figure().subplots().plot(positions, found)
    assert list(line.get_ydata()) == pytest.approx(values, rel=1e-5)


def test_n54_n55_schedules_one_after_the_other_and_one_cycle_is_two_cosines() -> None:
    """The values at 0, .1, .3, .5 and 1, where the course's own version fails."""
    combined = Join((0.3, 0.7), (Cosine(0.3, 0.6), Cosine(0.6, 0.2)))
    values = [combined(position) for position in (0, 0.1, 0.3, 0.5, 1)]
    assert values == pytest.approx([0.3, 0.375, 0.6, 0.5246979687, 0.2], rel=1e-7)
    assert one_cycle(0.6, 2, 3, 0.3) == Join((0.3, 0.7), (Cosine(0.3, 0.6), Cosine(0.6, 0.6 / 3)))


def test_n57_a_transform_of_batches_is_a_callback() -> None:
    """Here (x - 1) / 2; the device is an argument of init, and batches follow the parameters."""
    transform = on(before_batch=lambda state: state.replace(xb=((state.x - 1) / 2,)))
    data = DataLoaders([((x - 1) / 2, y) for x, y in batches(3, seed=1)])
    there = learner(data=data)
    assert losses(fit(MINE, MINE.init(device="cpu"), 1, [transform])) == losses(
        fit(there, there.init(), 1)
    )
    mine = learner(data=loaders(train=1, valid=None))
    on_meta = (
        state
        for _, state in trace(
            mine, mine.init(device="meta"), 1, [on(after_pred=raiser(CancelBatch))]
        )
    )
    assert {state.x.device.type for state in on_meta if state.xb} == {"meta"}
