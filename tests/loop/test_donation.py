"""fit(donate=True): the same run, bit for bit, in the memory of the state that was given up."""

import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import functional_sgd as fs
import loop
from functional_sgd.fusion import spent
from loop import Learner, State, fit, fit_one_cycle, trace
from tests.comparing import Untouched, assert_same
from tests.loop.helpers import (
    KINDS,
    assert_same_run,
    full,
    learner,
    linear,
    loaders,
    net,
    on,
)


class Tied(nn.Module):
    """One weight in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = linear()
        self.second = linear()
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Renormed(nn.Module):
    """A forward pass that writes to its params: rows of the table that are too long."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.table = nn.Embedding(5, 2, max_norm=0.5)
            self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x[:, 0].abs().mul(2).long().clamp(max=4)))


def half_frozen() -> nn.Module:
    model = net()
    model[0].weight.requires_grad_(False)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": linear,
    "net": net,
    "tied": Tied,
    "renormed": Renormed,
    "half frozen": half_frozen,
}

OPTIMIZERS: dict[str, Callable[[], fs.Optimizer]] = {
    "adamw": fs.adamw,
    "sgd": lambda: fs.sgd(mom=0.9),
    "lamb": fs.lamb,
    "clipped": lambda: fs.chain(fs.clip_norm, fs.adamw()),
    "ranger": fs.ranger,
    "sam": lambda: fs.sam(fs.adamw()),
    "schedule_free": fs.schedule_free_adamw,
    "average_params": lambda: fs.average_params(fs.adamw(), decay=0.5),
    "accumulate": lambda: fs.accumulate(fs.adamw(), every=2),
    "skip_nonfinite": lambda: fs.skip_nonfinite(fs.adamw()),
    "partition": lambda: fs.partition(
        {"matrix": fs.sgd(mom=0.9), "vector": fs.adamw()},
        lambda path, leaf: "matrix" if leaf.dim() > 1 else "vector",
    ),
    "chained": lambda: fs.chain(fs.clip_norm, fs.accumulate(fs.adamw(), every=2)),
}

CALLBACKS: dict[str, Callable[[], Any]] = {
    "AverageParams": lambda: loop.AverageParams(0.5),
    "swa": lambda: loop.AverageParams(None, start=0.4),
    "SaveModel": lambda: loop.SaveModel(None),
    "GradientAccumulation": lambda: loop.GradientAccumulation(batches=2),
    "GradientClip": lambda: loop.GradientClip(0.1),
    "Freeze": lambda: loop.Freeze("*bias"),
    "RecordValues": lambda: loop.RecordValues(
        first=lambda state: next(iter(state.params.values())).flatten()[0]
    ),
    "ParamScheduler": lambda: loop.ParamScheduler({"lr": lambda pct: 0.01 * (1 + pct)}),
    "ReduceLROnPlateau": lambda: loop.ReduceLROnPlateau(patience=1),
    "EarlyStopping": lambda: loop.EarlyStopping(patience=1, min_delta=10.0),
    "MixUp": lambda: loop.MixUp(0.4),
    "CancelStep": lambda: on(
        "skips", before_step=lambda state: _cancel(state) if state.iter == 1 else None
    ),
    "CancelBatch": lambda: on(
        "leaves", after_step=lambda state: _cancel_batch(state) if state.iter == 1 else None
    ),
}


def _cancel(state: State) -> None:
    raise loop.CancelStep


def _cancel_batch(state: State) -> None:
    raise loop.CancelBatch


def drawn(seed: int) -> tuple[Learner, list[Any], dict[str, Any]]:
    """A model, an optimizer, some callbacks and options of fit."""
    draw = random.Random(seed)
    model = MODELS[draw.choice([*MODELS])]()
    opt = OPTIMIZERS[draw.choice([*OPTIMIZERS])]()
    names = draw.sample([*CALLBACKS], draw.randrange(5))
    for one, other in (("AverageParams", "swa"), ("ParamScheduler", "ReduceLROnPlateau")):
        if {one, other} <= {*names}:  # these exclude each other
            names.remove(other)
    mine = Learner(model, loaders(5, 2), mse_loss, opt)
    return mine, [CALLBACKS[name]() for name in names], {"lr": 0.05}


@pytest.mark.parametrize("seed", range(50))
def test_a_donated_run_ends_with_the_same_bits(seed: int) -> None:
    """Everything: what was learned, what callbacks remember, the history."""
    mine, callbacks, options = drawn(seed)
    expected = fit(mine, mine.init(seed), 3, callbacks, **options)
    found = fit(mine, mine.init(seed), 3, callbacks, donate=True, **options)
    assert_same_run(found, expected)
    assert_same(tensors_of(found.memory), tensors_of(expected.memory))
    assert not found.donated
    again, expected = (fit(mine, end, 2, callbacks, **options) for end in (found, expected))
    assert_same_run(again, expected)


@pytest.mark.parametrize("seed", range(25))
def test_a_run_that_spends_gradients_ends_with_the_same_bits(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spent, "LARGE", 1)
    mine, callbacks, options = drawn(seed)
    first = mine.init(seed)
    before = Untouched(first.params, first.opt_state)
    expected = fit(mine, first, 3, callbacks, **options)
    found = fit(mine, first, 3, callbacks, donate="grads", **options)
    assert_same_run(found, expected)
    assert_same(tensors_of(found.memory), tensors_of(expected.memory))
    before.check()


def test_gradients_that_were_spent_are_gone_and_what_was_remembered_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spent, "LARGE", 1)
    seen: list[Any] = []
    keeper = on("keeper", after_backward=lambda state: state.remember("keeper", state.grads))
    watch = on("watch", after_step=lambda state: seen.append((state.grads, state.memory["keeper"])))
    mine = learner(net(), opt=fs.adamw(lr=0.1))
    expected = fit(mine, mine.init(), 2, [keeper])
    found = fit(mine, mine.init(), 2, [keeper, watch], donate="grads")
    assert_same_run(found, expected)
    assert seen
    assert all(grads is None for grads, _ in seen)
    assert_same(found.memory["keeper"], expected.memory["keeper"])


def test_an_error_leaves_a_state_to_go_on_from_if_only_gradients_are_spent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spent, "LARGE", 1)
    mine = learner(net(), opt=fs.adamw(lr=0.1))

    def fail(state: State) -> None:
        if state.train_iter == 3:
            raise RuntimeError("here")

    with pytest.raises(RuntimeError, match="here") as caught:
        fit(mine, mine.init(), 2, [on("fails", after_step=fail)], donate="grads")
    expected = fit(mine, mine.init(), steps=3, steps_per_epoch=3)
    assert_same(caught.value.state.params, expected.params)  # type: ignore[attr-defined]


def test_another_word_for_what_is_given_away_is_an_error() -> None:
    mine = learner(net())
    with pytest.raises(ValueError, match="fit: donate must be True, False or 'grads', got 'all'"):
        fit(mine, mine.init(), 1, donate="all")  # type: ignore[arg-type]


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in what callbacks remember, in order."""
    from loop.remembered import tensors_in

    return list(tensors_in(value))


@pytest.mark.parametrize("kind", KINDS)
def test_with_every_callback_in_the_box(kind: str) -> None:
    mine = full(kind)
    expected = fit(mine, mine.init(), 2)
    assert_same_run(fit(mine, mine.init(), 2, donate=True), expected)


def test_other_ways_to_train_donate_too() -> None:
    mine = learner(net())
    expected = fit_one_cycle(mine, mine.init(), 2, lr=0.1)
    start = mine.init()
    assert_same_run(fit_one_cycle(mine, start, 2, lr=0.1, donate=True), expected)
    with pytest.raises(ValueError, match="this state was donated to fit"):
        fit_one_cycle(mine, start, 2, lr=0.1)


def test_compiled() -> None:
    mine = learner(linear(), opt=fs.adamw(lr=0.1))
    expected = fit(mine, mine.init(), 2, compile=True)
    assert_same_run(fit(mine, mine.init(), 2, compile=True, donate=True), expected)


# Memory.


def test_the_memory_is_that_of_the_state_given() -> None:
    mine = learner(net(), opt=fs.adamw())
    start = mine.init()
    places = {value.data_ptr() for value in (*start.params.values(), *slots(start))}
    end = fit(mine, start, 2, donate=True)
    assert {value.data_ptr() for value in (*end.params.values(), *slots(end))} == places


def test_a_run_that_is_over_keeps_no_memory_for_a_next_step() -> None:
    """Its learner's optimizer lives on, and so would the spare of a pure step."""
    wide = nn.Sequential(nn.Linear(2, 20_000), nn.Linear(20_000, 2))
    mine = learner(wide, opt=fs.adamw())
    stepper: Any = mine.stepper
    kept: list[int] = []
    looker = on("looker", after_batch=lambda state: kept.append(len(stepper._pool._buffers)))
    fit(mine, mine.init(), 1, [looker])
    assert min(kept) > 0
    assert not stepper._pool._buffers


def slots(state: State) -> list[Tensor]:
    """Those of Adam."""
    return [value for name in ("grad_avg", "sqr_avg") for value in state.opt_state[name].values()]


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize("donate", [False, True])
def test_nobody_holds_the_first_state_once_a_step_is_done(name: str, donate: bool) -> None:
    """A bracket whose frame holds it would cost its memory as long as the run lasts."""
    mine = learner(net(), opt=fs.adamw())
    start = mine.init()
    first = weakref.ref(start.params["0.weight"])
    alive: list[bool] = []

    def look(state: State) -> None:
        alive.append(first() is not None)

    looker = on("looker", before_batch=look, order=-1000)
    running = trace(mine, start, 1, [CALLBACKS[name](), looker], donate=donate)
    del start
    for _ in running:
        pass
    assert not alive[-1], "somebody holds the state that the run began with"


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: loop.Checkpoint(folder),
        lambda folder: loop.CSVLogger(folder / "log.csv"),
        lambda folder: loop.JSONLLogger(folder / "log.jsonl"),
        lambda folder: loop.SaveModel(folder / "model.safetensors"),
        lambda folder: loop.Timer(report=lambda times: None),
        lambda folder: loop.Progress(),
        lambda folder: loop.ActivationStats(),
        lambda folder: loop.BnFreeze(),
        lambda folder: loop.ShowGraph(folder / "graph.png"),
        lambda folder: loop.TorchScheduler(lambda opt: torch.optim.lr_scheduler.StepLR(opt, 1)),
    ],
    ids=lambda make: make.__code__.co_names[1],
)
def test_nor_do_callbacks_with_brackets(make: Callable[[Path], Any], tmp_path: Path) -> None:
    mine = learner(net(), opt=fs.adamw())
    start = mine.init()
    first = weakref.ref(start.params["0.weight"])
    alive: list[bool] = []
    looker = on("looker", before_batch=lambda state: alive.append(first() is not None), order=-1000)
    running = trace(mine, start, 1, [make(tmp_path), looker])
    del start
    for _ in running:
        pass
    assert not alive[1], "a bracket holds the state that the run began with"
