"""Callbacks that keep or print what passes by."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from functional_sgd.schedules import one_cycle
from loop import (
    CancelBatch,
    CancelFit,
    CollectData,
    DataLoaders,
    ParamScheduler,
    PrintShapes,
    RecordValues,
    State,
    fit,
    plot_records,
    predict,
    trace,
    validate,
)
from loop.disk.store import load, save
from loop.history import Log
from tests.comparing import assert_same
from tests.loop.helpers import (
    Kept,
    assert_same_run,
    batches,
    full,
    learner,
    linear,
    loaders,
    losses,
    net,
    on,
    raise_once,
    raiser,
)

MINE = learner()
START = MINE.init()
TRAIN, VALID = batches(3, seed=1), batches(2, seed=2)


def collected(state: State) -> Log:
    found: Log = state.memory["collect_data"]
    return found


def entries(kept: Any) -> str:
    """All that is kept, as text."""
    return str(list(kept) if isinstance(kept, Log) else kept)


def test_collect_data_grows_without_copying_what_it_has() -> None:
    """So that the cost of a batch does not depend on how many there were."""
    first, *_, last = [
        state for event, state in trace(MINE, START, 2, [CollectData()]) if event == "after_batch"
    ]
    assert isinstance(collected(last), Log)
    assert collected(first)._store is collected(last)._store
    assert (len(collected(first)), len(collected(last))) == (1, 10)


def test_collect_data_has_every_batch_in_order() -> None:
    found = collected(fit(MINE, START, 2, [CollectData()]))
    expected = [*TRAIN, *VALID] * 2
    assert [set(entry) for entry in found] == [{"xb", "yb", "pred", "loss"}] * 10
    assert_same([(*entry["xb"], *entry["yb"]) for entry in found], expected)


def test_collect_data_has_predictions_and_losses() -> None:
    end = fit(MINE, START, 1, [CollectData()])
    found = collected(end)
    assert [float(entry["loss"]) for entry in found[:3]] == losses(end)
    assert_same(found[0]["pred"], TRAIN[0][0] @ torch.tensor([[0.1, 0.3], [0.2, 0.4]]))
    for entry in found:
        assert_same(entry["loss"], mse_loss(entry["pred"], entry["yb"][0]))


@pytest.mark.parametrize(
    ("training", "expected"), [(True, TRAIN), (False, VALID), (None, [*TRAIN, *VALID])]
)
def test_collect_data_of_a_phase(training: bool | None, expected: list[Any]) -> None:
    found = collected(fit(MINE, START, 1, [CollectData(("x", "y"), training)]))
    assert_same([(entry["x"], entry["y"]) for entry in found], expected)


def test_collect_data_of_other_fields() -> None:
    found = collected(
        fit(MINE, START, 1, [CollectData(("train_iter", "iter", "training", "grads"))])
    )
    assert [(entry["train_iter"], entry["iter"], entry["training"]) for entry in found] == [
        *[(1, 0, True), (2, 1, True), (3, 2, True), (3, 0, False), (3, 1, False)]
    ]
    assert [entry["grads"] is None for entry in found] == [False] * 3 + [True] * 2


def test_what_a_batch_did_not_come_to_is_none() -> None:
    found = collected(
        fit(MINE, START, 1, [CollectData(), on(after_pred=raise_once(CancelBatch, at=1))])
    )
    assert [entry["loss"] is None for entry in found] == [False, True, False, False, False]
    assert_same(found[1]["xb"], TRAIN[1][:1])


def test_nothing_that_is_collected_is_tracked() -> None:
    """Not even in a batch that is cancelled while its params are."""
    mine = learner(net())
    callbacks = [CollectData(("pred", "loss", "params")), on(after_loss=raiser(CancelBatch))]
    (first, *_) = collected(fit(mine, mine.init(), 1, callbacks))
    assert not any(
        tensor.requires_grad for tensor in (first["pred"], first["loss"], *first["params"].values())
    )


def test_collect_data_begins_anew_with_every_run() -> None:
    middle = fit(MINE, START, 2, [CollectData()])
    assert len(collected(fit(MINE, middle, 1, [CollectData()]))) == 5
    assert len(collected(middle)) == 10


@pytest.mark.parametrize("make", [CollectData, lambda: RecordValues(loss=lambda state: state.loss)])
def test_a_resumed_run_goes_on_with_what_was_kept(make: Any) -> None:
    states: list[State] = []
    mine = full()
    end = fit(mine, mine.init(), 2, [make(), on("watch", committed=states.append)])
    name = make().name
    for state in states[1::4]:
        resumed = fit(mine, state, 2, [make()], resume=True)
        assert entries(resumed.memory[name]) == entries(end.memory[name])


def test_the_state_given_is_untouched() -> None:
    start = fit(MINE, START, 1, [CollectData(), RecordValues(loss=lambda state: state.loss)])
    kept = Kept(start)
    end = fit(MINE, start, 1, [CollectData(), RecordValues(loss=lambda state: state.loss)])
    kept.check()
    assert_same_run(end, fit(MINE, start, 1))
    assert len(start.memory["record_values"]["loss"]) == 3


def test_what_is_kept_can_be_saved(tmp_path: Path) -> None:
    end = fit(
        MINE,
        START,
        1,
        [CollectData(("xb", "loss", "grads")), RecordValues(lr=lambda state: state.hyper["lr"])],
    )
    assert str(load(save(end, tmp_path / "saved")).memory) == str(end.memory)


def test_evaluation_goes_well_with_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = [CollectData(), RecordValues(lr=lambda state: state.hyper["lr"]), PrintShapes()]
    mine = learner(callbacks=callbacks)
    assert validate(mine, START) == validate(MINE, START)
    assert_same(predict(mine, START), predict(MINE, START))
    capsys.readouterr()


def test_a_name_that_nothing_has() -> None:
    with pytest.raises(ValueError, match="CollectData: there is no 'preds'.* Did you mean 'pred'"):
        CollectData(("preds",))
    with pytest.raises(ValueError, match="CollectData: there is no 'memory'"):
        CollectData(("memory",))
    with pytest.raises(
        TypeError, match="CollectData: what must be names, got 'pred'. Put it in a tuple"
    ):
        CollectData("pred")


def test_l30_any_function_of_the_state_is_recorded_for_every_training_batch() -> None:
    lr = RecordValues(lr=lambda state: state.hyper["lr"], count=lambda state: state.train_iter)
    end = fit(MINE, START, 2, [ParamScheduler({"lr": one_cycle(1.0)}), lr])
    assert end.memory["record_values"] == {
        "lr": list(end.history.hypers["lr"]),
        "count": [1, 2, 3, 4, 5, 6],
    }
    assert len(set(end.memory["record_values"]["lr"])) == 6


def test_l30_records_begin_anew_with_every_run() -> None:
    record = RecordValues(count=lambda state: state.train_iter)
    middle = fit(MINE, START, 1, [record])
    end = fit(MINE, middle, 1, [record])
    assert [list(state.memory["record_values"]["count"]) for state in (middle, end)] == [
        [1, 2, 3],
        [4, 5, 6],
    ]


def test_a_record_sees_the_batch_and_the_gradients() -> None:
    def sizes(state: State) -> dict[str, Tensor]:
        return {
            name: grad.square().sum()
            for name, grad in (state.grads or {}).items()
            if grad is not None
        }

    end = fit(
        MINE,
        START,
        1,
        [RecordValues(sizes=sizes, loss=lambda state: mse_loss(state.pred, state.y))],
    )
    assert [float(loss) for loss in end.memory["record_values"]["loss"]] == losses(end)
    assert set(end.memory["record_values"]["sizes"][0]) == {"weight", "bias"}


def test_a_batch_cancelled_before_its_loss_is_not_recorded() -> None:
    record = RecordValues(iter=lambda state: state.iter)
    end = fit(MINE, START, 1, [record, on(after_pred=raise_once(CancelBatch, at=1))])
    assert list(end.memory["record_values"]["iter"]) == [0, 2]


def test_a_record_is_kept_after_a_signal() -> None:
    end = fit(
        MINE,
        START,
        1,
        [RecordValues(one=lambda state: 1), on(before_batch=raise_once(CancelFit, at=2))],
    )
    assert list(end.memory["record_values"]["one"]) == [1, 1]


def test_records_are_functions() -> None:
    with pytest.raises(
        TypeError, match=r"RecordValues: lr must be a function of the state, got 0\.1"
    ):
        RecordValues(lr=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="RecordValues: expected functions"):
        RecordValues()
    with pytest.raises(dataclasses.FrozenInstanceError):
        RecordValues(one=lambda state: 1).functions = {}  # type: ignore[misc]


def test_l30_a_plot_of_what_was_recorded() -> None:
    """Of a tree the last leaf is drawn; to see another group, record that group."""
    lrs = lambda state: [0.5 * state.train_iter, 2.0 * state.train_iter]  # noqa: E731
    end = fit(
        MINE,
        START,
        1,
        [RecordValues(loss=lambda state: state.loss, lr=lrs, first=lambda state: lrs(state)[0])],
    )
    figure = plot_records(end)
    lines = {axes.get_ylabel(): list(axes.lines[0].get_ydata()) for axes in figure.axes}
    assert lines == {"loss": losses(end), "lr": [2.0, 4.0, 6.0], "first": [0.5, 1.0, 1.5]}
    with pytest.raises(
        KeyError, match="plot_records: the state has no 'values', but 'recorder', 'record_values'"
    ):
        plot_records(end, "values")


def shapes(data: DataLoaders, epochs: int = 1, **rest: Any) -> list[str]:
    lines: list[str] = []
    fit(learner(linear(), data, **rest), START, epochs, [PrintShapes(report=lines.append)])
    return lines


def test_n47_shapes_of_the_first_batch_of_each_phase() -> None:
    data = DataLoaders(batches(3, seed=1), batches(2, seed=2, size=7))
    train, valid = (
        f"{phase}: xb: ('float32[{size}, 2]',), yb: ('float32[{size}, 2]',), pred: float32[{size}, "
        f"2], loss: float32[]"
        for phase, size in (("train", 4), ("validate", 7))
    )
    assert shapes(data, epochs=2) == [train, valid] * 2


@pytest.mark.filterwarnings("ignore:.*batches without targets")
def test_n47_without_targets_there_is_no_loss() -> None:
    data = DataLoaders(batches(1, seed=1), [(torch.ones(3, 2),)])
    assert shapes(data)[1] == "validate: xb: ('float32[3, 2]',), yb: (), pred: float32[3, 2]"


def test_n47_shapes_are_printed_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    end = fit(MINE, START, 1, [PrintShapes()])
    assert capsys.readouterr().out.count("pred: float32[4, 2]") == 2
    assert_same_run(end, fit(MINE, START, 1))


def test_no_validation_no_line() -> None:
    assert len(shapes(loaders(valid=None))) == 1


def test_params_collected_in_a_donated_run_are_those_of_their_batches() -> None:
    each, donated = (
        fit(MINE, MINE.init(), 1, [CollectData(what=("params",), training=True)], donate=donate)
        for donate in (False, True)
    )
    assert_same(list(collected(donated)), list(collected(each)))
