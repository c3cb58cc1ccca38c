"""MixedPrecision: the same runs as torch's own loop; autocast is open where it should be, and
closed elsewhere.
"""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from functional_sgd import adamw, fuse
from functional_sgd.schedules import one_cycle
from loop import (
    Batches,
    CancelTrain,
    DataLoaders,
    GradientAccumulation,
    GradientClip,
    MixedPrecision,
    ParamScheduler,
    Progress,
    State,
    fit,
    predict,
    validate,
)
from tests.comparing import assert_close
from tests.loop.helpers import (
    X,
    Y,
    assert_same_run,
    batches,
    everywhere,
    learned,
    learner,
    linear,
    loaders,
    losses,
    on,
)

INF = float("inf")
BF16, FP16 = torch.bfloat16, torch.float16


def half(init_scale: float = 2.0**8, **rest: Any) -> MixedPrecision:
    """float16, with a scale that the data here allow."""
    return MixedPrecision(FP16, init_scale, **rest)


def by_hand(
    model: nn.Module, data: list[Any], dtype: torch.dtype, init: float
) -> tuple[list[Tensor], float]:
    """The loop that torch's manual shows."""
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init, growth_interval=2, enabled=dtype == FP16)
    for x, y in data * 3:
        with torch.autocast("cpu", dtype):
            loss = mse_loss(model(x).float(), y)
        opt.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()
    return [value.detach() for value in model.parameters()], scaler.get_scale()


def small_net() -> nn.Sequential:
    return nn.Sequential(linear(), nn.ReLU(), linear())


@pytest.mark.parametrize(("dtype", "init"), [(BF16, 1.0), (FP16, 2.0**10), (FP16, 2.0**24)])
def test_fr2_a_run_is_that_of_torch(dtype: torch.dtype, init: float) -> None:
    """With steps that are skipped, and a scale that grows."""
    data = batches(4, seed=1)
    params, scale = by_hand(small_net(), data, dtype, init)
    mine = learner(small_net(), DataLoaders(data))
    callbacks = [GradientClip(1.0), MixedPrecision(dtype, init, growth_interval=2)]
    end = fit(mine, mine.init(), 3, callbacks)
    assert_close(list(end.params.values()), params, atol=1e-7)
    assert end.memory.get("mixed_precision", {"scale": 1.0})["scale"] == scale
    assert (end.opt_state["step"].max() == 12) == (init < 2**24)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_fr2_autocast_is_open_around_predict_and_loss_only(dtype: torch.dtype) -> None:
    seen: list[Any] = []

    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(("model", torch.is_autocast_enabled("cpu"), super().forward(x).dtype))
            return super().forward(x)

    def loss(pred: Tensor, target: Tensor) -> Tensor:
        seen.append(("loss", torch.is_autocast_enabled("cpu"), pred.dtype))
        return mse_loss(pred, target)

    spy = everywhere(
        lambda event, state: seen.append(("event", torch.is_autocast_enabled("cpu"), None))
    )
    mine = learner(Net(2, 2), loaders(1, 1), loss, callbacks=[MixedPrecision(dtype), spy])
    fit(mine, mine.init(), 1)
    validate(mine, mine.init())
    inside = [("model", True, dtype), ("loss", True, torch.float32)]
    assert [entry for entry in seen if entry[0] != "event"] == inside * 3
    assert {entry for entry in seen if entry[0] == "event"} == {("event", False, None)}


@pytest.mark.parametrize("where", ["model", "loss"])
@pytest.mark.parametrize("error", [CancelTrain, ConnectionError])
def test_autocast_is_closed_on_every_way_out(where: str, error: type[Exception]) -> None:
    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if where == "model":
                raise error
            return super().forward(x)

    def loss(pred: Tensor, target: Tensor) -> Tensor:
        raise error

    mine = learner(Net(2, 2), loaders(1, None), loss, callbacks=[MixedPrecision()])
    if error is ConnectionError:
        with pytest.raises(ConnectionError):
            fit(mine, mine.init(), 1)
    else:
        fit(mine, mine.init(), 1)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_predictions_are_float32(dtype: torch.dtype) -> None:
    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return {"out": super().forward(x), "double": x.double(), "none": None}

    mine = learner(
        Pair(2, 2), loss=lambda pred, y: mse_loss(pred["out"], y), callbacks=[MixedPrecision(dtype)]
    )
    seen: list[Any] = []
    spy = on(
        order=11,
        after_pred=lambda state: seen.append((state.pred["out"].dtype, state.pred["double"].dtype)),
    )
    fit(mine, mine.init(), 1, [spy])
    assert set(seen) == {(torch.float32, torch.float64)}
    assert predict(mine, mine.init())["out"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_it_trains_where_gradients_are_switched_off_outside(dtype: torch.dtype) -> None:
    mine = learner(callbacks=[MixedPrecision(dtype)])
    with torch.no_grad():
        end = fit(mine, mine.init(), 2)
    assert_same_run(end, fit(mine, mine.init(), 2))


def test_b27_everything_at_once() -> None:
    """Bar, mixed precision, schedules, clipping and accumulation in one run, of a fused optimizer
    too.
    """

    def together(opt: Any) -> State:
        mine = learner(small_net(), DataLoaders(Batches((X, Y), 3), batches(1, seed=2)), opt=opt)
        schedules = ParamScheduler(
            {"lr": one_cycle(0.1), "mom": lambda position: 0.9 - 0.1 * position}
        )
        rest = [Progress(file=io.StringIO()), GradientClip(0.5), GradientAccumulation(batches=3)]
        return fit(
            mine, mine.init(), 3, [half(init_scale=2.0**22, growth_interval=4), schedules, *rest]
        )

    end, fused = together(adamw()), together(fuse(adamw()))
    assert_close(learned(fused), learned(end), atol=1e-6)
    assert 1 <= end.opt_state["step"].max() < 9  # three windows an epoch, some of which overflow
    assert len(losses(end)) == 21
    assert end.hyper == adamw().hyper
    assert losses(end)[-1] < losses(end)[0]


@pytest.mark.parametrize(
    "arguments",
    [
        {"dtype": torch.float32},
        {"init_scale": 0.0},
        {"init_scale": INF},
        {"growth_factor": 1.0},
        {"backoff_factor": 1.0},
        {"growth_interval": 0},
    ],
)
def test_arguments_are_checked(arguments: Any) -> None:
    with pytest.raises(ValueError, match=f"MixedPrecision: {next(iter(arguments))} must be"):
        MixedPrecision(**arguments)
