"""Every scheduler of torch sets lr in a run as it does in a plain loop, and nothing of it stays."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedulers

from functional_sgd import adamw, sgd
from loop import DataLoaders, Learner, State, TorchScheduler, fit, plot_schedules
from tests.loop.helpers import batches, learner, linear, loaders, on

LR, MOM, BATCHES, EPOCHS = 0.1, 0.9, 5, 4
Make = Callable[[Optimizer], Any]


def third(step: int) -> float:
    """A curve of one's own."""
    return 1 / (1 + step / 3)


def sequence(optimizer: Optimizer) -> Any:
    """Two schedulers, one after the other."""
    first = schedulers.ConstantLR(optimizer, factor=0.1, total_iters=3)
    second = schedulers.CosineAnnealingLR(optimizer, T_max=9)
    return schedulers.SequentialLR(optimizer, [first, second], milestones=[4])


def both(optimizer: Optimizer) -> Any:
    """Two schedulers at once."""
    first = schedulers.ConstantLR(optimizer, factor=0.1, total_iters=3)
    return schedulers.ChainedScheduler(
        [first, schedulers.ExponentialLR(optimizer, gamma=0.9)], optimizer
    )


def cycle_then_fall(optimizer: Optimizer) -> Any:
    """Momentum that moves inside a sequence."""
    first = schedulers.CyclicLR(optimizer, 0.01, 0.2, step_size_up=3)
    return schedulers.SequentialLR(
        optimizer, [first, schedulers.ExponentialLR(optimizer, 0.8)], milestones=[7]
    )


SCHEDULERS: dict[str, Make] = {
    "ConstantLR": partial(schedulers.ConstantLR, factor=0.5, total_iters=3),
    "CosineAnnealingLR": partial(schedulers.CosineAnnealingLR, T_max=7, eta_min=0.01),
    "CosineAnnealingWarmRestarts": partial(schedulers.CosineAnnealingWarmRestarts, T_0=3, T_mult=2),
    "CyclicLR": partial(
        schedulers.CyclicLR, base_lr=0.01, max_lr=0.2, step_size_up=3, step_size_down=4
    ),
    "ExponentialLR": partial(schedulers.ExponentialLR, gamma=0.9),
    "LambdaLR": partial(schedulers.LambdaLR, lr_lambda=third),
    "LinearLR": partial(schedulers.LinearLR, start_factor=0.1, total_iters=6),
    "MultiStepLR": partial(schedulers.MultiStepLR, milestones=[3, 5, 11], gamma=0.5),
    "MultiplicativeLR": partial(schedulers.MultiplicativeLR, lr_lambda=lambda step: 0.95),
    "OneCycleLR": partial(schedulers.OneCycleLR, max_lr=0.4, total_steps=BATCHES * EPOCHS),
    "PolynomialLR": partial(schedulers.PolynomialLR, total_iters=15, power=2.0),
    "ReduceLROnPlateau": partial(schedulers.ReduceLROnPlateau, patience=0, threshold=0.5),
    "SequentialLR": sequence,
    "StepLR": partial(schedulers.StepLR, step_size=3, gamma=0.5),
    "ChainedScheduler": both,
    "CyclicLR in SequentialLR": cycle_then_fall,
}
BY_BATCH = [name for name in SCHEDULERS if name != "ReduceLROnPlateau"]
MINE = learner(data=loaders(train=BATCHES, valid=2))


def in_torch(
    make: Make, every: str, metrics: list[float] | None = None, **options: Any
) -> list[tuple[float, float]]:
    """(lr, momentum) of every batch in a plain loop."""
    optimizer = torch.optim.SGD(
        [torch.zeros(1, requires_grad=True)], **{"lr": LR, "momentum": MOM, **options}
    )
    scheduler, found = make(optimizer), []
    for epoch in range(EPOCHS):
        for _ in range(BATCHES):
            found.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
            optimizer.step()
            if every == "batch":
                scheduler.step()
        if every == "epoch":
            scheduler.step(*([] if metrics is None else [metrics[epoch]]))
    return found


def recorded(state: State) -> list[tuple[float, float]]:
    """(lr, mom) of every batch in a run."""
    return list(zip(state.history.hypers["lr"], state.history.hypers["mom"], strict=True))


@pytest.mark.parametrize("name", BY_BATCH)
def test_l21_the_same_by_batch_as_in_a_plain_loop(name: str) -> None:
    end = fit(MINE, MINE.init(), EPOCHS, [TorchScheduler(SCHEDULERS[name])])
    assert recorded(end) == in_torch(SCHEDULERS[name], "batch")
    assert end.hyper == {"lr": LR, "mom": MOM}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_l21_the_same_by_epoch_as_in_a_plain_loop(name: str) -> None:
    end = fit(MINE, MINE.init(), EPOCHS, [TorchScheduler(SCHEDULERS[name], every="epoch")])
    metrics = end.history.column("valid_loss") if name == "ReduceLROnPlateau" else None
    assert recorded(end) == in_torch(SCHEDULERS[name], "epoch", metrics)
    assert len({lr for lr, _ in recorded(end)}) > 1


def test_l21_these_are_all_schedulers_of_torch() -> None:
    classes = [value for value in vars(schedulers).values() if isinstance(value, type)]
    known = {cls.__name__ for cls in classes if issubclass(cls, schedulers.LRScheduler)}
    assert known - {"LRScheduler", "_LRScheduler"} == SCHEDULERS.keys() - {
        "CyclicLR in SequentialLR"
    }


@pytest.mark.parametrize("name", BY_BATCH)
def test_l22_the_optimizer_is_ours(name: str) -> None:
    """Which has no groups, and here no momentum: what would set it is passed over."""
    mine = learner(data=loaders(BATCHES, None), opt=sgd(lr=LR))
    end = fit(mine, mine.init(), EPOCHS, [TorchScheduler(SCHEDULERS[name])])
    assert list(end.history.hypers["lr"]) == [lr for lr, _ in in_torch(SCHEDULERS[name], "batch")]
    assert list(end.history.hypers) == ["lr"]


def counted(batches_an_epoch: int, **rest: Any) -> Learner:
    """So many small batches an epoch."""
    data = batches(1, seed=1, size=1) * batches_an_epoch
    return learner(data=DataLoaders(data, data[:2]), **rest)


def test_l27_a_cosine_rises_again_after_its_end() -> None:
    mine = counted(110, opt=sgd(lr=0.006))
    end = fit(
        mine, mine.init(), 1, [TorchScheduler(partial(schedulers.CosineAnnealingLR, T_max=100))]
    )
    lrs = end.history.hypers["lr"]
    expected = {0: 0.006, 25: 0.0051213203, 50: 0.003, 75: 8.786797e-4, 100: 0.0, 101: 1.48032e-6}
    assert {batch: lrs[batch] for batch in expected} == pytest.approx(expected, rel=1e-6, abs=1e-15)


def test_l28_every_layer_group_has_its_own_lr() -> None:
    mine = learner(linear(), loaders(BATCHES, None))
    lr = {"weight": 0.1, "bias": 1.0}
    end = fit(
        mine, mine.init(), 1, [TorchScheduler(partial(schedulers.StepLR, step_size=2))], lr=lr
    )
    weight = [0.1, 0.1, 0.01, 0.01, 0.001]
    assert [entry["weight"] for entry in end.history.hypers["lr"]] == pytest.approx(weight)
    assert [entry["bias"] for entry in end.history.hypers["lr"]] == pytest.approx(
        [10 * value for value in weight]
    )
    assert end.hyper["lr"] == lr


def test_l28_lists_of_torch_have_an_entry_for_each_group() -> None:
    """In the order of the parameters."""
    mine = learner(linear(), loaders(2, None))
    make = partial(schedulers.OneCycleLR, max_lr=[25.0, 50.0], total_steps=9)
    end = fit(mine, mine.init(), 1, [TorchScheduler(make)], lr={"bias": 0.5, "weight": 0.1})
    assert end.history.hypers["lr"][0] == {"weight": 1.0, "bias": 2.0}
    assert end.history.hypers["mom"][0] == {"weight": 0.95, "bias": 0.95}
    with pytest.raises(ValueError, match="max_lr has 2 values, param_groups has 1"):
        fit(mine, mine.init(), 1, [TorchScheduler(make)])


def test_l29_validation_does_not_move_the_schedule() -> None:
    mine = learner(data=loaders(train=2, valid=3))
    seen: list[float] = []
    note = on("note", 100, before_batch=lambda state: seen.append(state.hyper["lr"]))
    fit(mine, mine.init(), 1, [TorchScheduler(partial(schedulers.ExponentialLR, gamma=0.5)), note])
    assert seen == [0.1, 0.05, 0.025, 0.025, 0.025]


def test_l30_what_was_recorded_can_be_drawn() -> None:
    """By training batch, whatever the scheduler moves."""
    end = fit(MINE, MINE.init(), EPOCHS, [TorchScheduler(SCHEDULERS["OneCycleLR"])])
    figure = plot_schedules(end.history)
    drawn = {axes.get_ylabel(): axes.lines[0].get_ydata().tolist() for axes in figure.axes}  # type: ignore[union-attr]
    assert drawn == {name: list(end.history.hypers[name]) for name in ("lr", "mom")}


def test_l31_a_cosine_over_three_epochs_of_the_lesson() -> None:
    mine = counted(59, opt=adamw(lr=0.02))
    end = fit(
        mine, mine.init(), 3, [TorchScheduler(partial(schedulers.CosineAnnealingLR, T_max=3 * 59))]
    )
    lrs = end.history.hypers["lr"]
    assert (len(lrs), lrs[0]) == (177, 0.02)
    assert (lrs[59], lrs[118]) == (pytest.approx(0.015), pytest.approx(0.005))


def test_l32_a_cosine_by_epoch() -> None:
    mine = counted(2, opt=adamw(lr=0.02))
    end = fit(
        mine,
        mine.init(),
        3,
        [TorchScheduler(partial(schedulers.CosineAnnealingLR, T_max=3), "epoch")],
    )
    assert list(end.history.hypers["lr"]) == pytest.approx([0.02, 0.02, 0.015, 0.015, 0.005, 0.005])


def test_l33_one_cycle_moves_lr_and_momentum() -> None:
    mine = counted(59, opt=adamw())
    make = partial(schedulers.OneCycleLR, max_lr=0.06, total_steps=295)
    end = fit(mine, mine.init(), 5, [TorchScheduler(make)])
    expected = {
        0: (0.0024, 0.95),
        1: (0.002418560919, 0.949967776),
        44: (0.031458504724, 0.899551207),
        87: (0.059995359396, 0.850008057),
        88: (0.059999132065, 0.850001447),
        147: (0.048525784345, 0.869123769),
        293: (3.711689e-6, 0.949994214),
        294: (2.4e-7, 0.95),
    }
    assert {batch: recorded(end)[batch] for batch in expected} == {
        batch: pytest.approx(values, rel=1e-6) for batch, values in expected.items()
    }
    assert end.hyper == mine.opt.hyper


def test_the_step_after_the_last_is_an_error_of_torch() -> None:
    make = partial(schedulers.OneCycleLR, max_lr=0.06, total_steps=4)
    with pytest.raises(ValueError, match="Tried to step 5 times"):
        fit(MINE, MINE.init(), 2, [TorchScheduler(make)])
