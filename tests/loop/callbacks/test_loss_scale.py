"""The loss scale of MixedPrecision: it follows torch's rules, skips what overflows, and is seen by
nobody else.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from functional_sgd import sgd
from loop import (
    CancelBackward,
    CancelBatch,
    CancelTrain,
    DataLoaders,
    GradientAccumulation,
    Learner,
    MixedPrecision,
    State,
    fit,
    trace,
)
from loop.callbacks.precision import all_finite
from loop.disk.store import load, save
from tests.comparing import assert_close, assert_same
from tests.loop.helpers import (
    Kept,
    assert_same_run,
    batches,
    everywhere,
    learned,
    learner,
    linear,
    loaders,
    losses,
    on,
    one_weight,
    raise_once,
)

INF, NAN = float("inf"), float("nan")
BF16, FP16 = torch.bfloat16, torch.float16


def half(init_scale: float = 2.0**8, **rest: Any) -> MixedPrecision:
    """float16, with a scale that the data here allow."""
    return MixedPrecision(FP16, init_scale, **rest)


def memory(state: State) -> tuple[float, int]:
    """(scale, good steps)."""
    kept = state.memory["mixed_precision"]
    return kept["scale"].item(), kept["good_steps"]


def with_bad_batches(*bad: int, count: int = 4, factor: float = 1e18) -> Learner:
    """A learner of so many batches, some of which have a gradient that float16 cannot hold, and a
    finite loss.
    """
    data = batches(count, seed=1)
    for index in bad:
        data[index] = (data[index][0], data[index][1] * factor)
    return learner(data=DataLoaders(data))


@pytest.mark.parametrize("init", [2.0**16, 1000.0, 2.0**125, 2.0**-120])
def test_fr2_the_scale_is_that_of_torch(init: float) -> None:
    """A hundred steps, of which some overflow, and so does the scale itself."""
    theirs = torch.amp.GradScaler("cpu", init, growth_interval=3)
    weight = nn.Parameter(torch.zeros(1))
    opt, scale, good_steps = torch.optim.SGD([weight], lr=0.0), torch.tensor(init), 0
    ours = half(init_scale=init, growth_interval=3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        finite = bool(torch.rand((), generator=generator) < 0.8)
        theirs.scale(torch.zeros(()))
        weight.grad = torch.tensor([1.0 if finite else INF])
        theirs.step(opt)
        theirs.update()
        scale, good_steps = ours.next_scale(scale, good_steps, finite)
        assert (scale.item(), good_steps) == (theirs.get_scale(), theirs._get_growth_tracker())
    assert scale.dtype == torch.float32


def test_nobody_sees_a_scaled_loss() -> None:
    seen: dict[int, set[float]] = {}

    def note(event: str, state: State) -> None:
        if state.training and state.loss is not None:
            seen.setdefault(state.train_iter - (event == "after_batch"), set()).add(
                state.loss.item()
            )

    mine = learner(data=loaders(4, None))
    end = fit(
        mine,
        mine.init(),
        1,
        [
            half(),
            everywhere(note, order=20),
            on("first", before_backward=raise_once(CancelBatch, 1)),
            on("second", 30, before_backward=raise_once(CancelBatch, 1)),
        ],
    )
    assert [seen[index] for index in range(4)] == [{loss} for loss in losses(end)]


def test_gradients_are_those_of_the_loss() -> None:
    """From after_backward on; a power of two changes no bit where nothing vanishes."""
    found: list[Any] = []
    spy = on(order=20, before_step=lambda state: found.append(state.grads))
    mine = learner(data=loaders(1, None))
    fit(mine, mine.init(), 1, [half(init_scale=1.0), spy])
    fit(mine, mine.init(), 1, [half(init_scale=2.0**8), spy])
    assert_same(found[0], found[1])


def test_fr2_small_gradients_survive() -> None:
    """A gradient of 1e-9 is 0 in float16, and 1e-9 with a scale."""
    model = nn.Sequential(one_weight(), one_weight())
    data = DataLoaders([(torch.ones(1, 1), torch.ones(1, 1))])
    for init, expected in ((1.0, 0.0), (2.0**20, 1e-9)):
        mine = Learner(model, data, lambda pred, y: 1e-9 * pred.mean(), sgd(lr=1.0))
        seen: list[Any] = []
        fit(
            mine,
            mine.init(),
            1,
            [
                half(init_scale=init),
                on(
                    order=20,
                    before_step=lambda state, seen=seen: seen.append(state.grads["0.weight"]),
                ),
            ],
        )
        assert_close(seen, [torch.full((1, 1), expected)], rtol=1e-3)


def test_fr2_a_step_that_overflows_is_skipped() -> None:
    """Bit for bit; the next one is as if the batch had not been there."""
    mine = with_bad_batches(1)
    states = [
        state
        for event, state in trace(mine, mine.init(), 1, [half(growth_interval=3)])
        if event == "after_step"
    ]
    assert_same((states[1].params, states[1].opt_state), (states[0].params, states[0].opt_state))
    assert [memory(state) for state in states] == [
        (2.0**8, 1),
        (2.0**7, 0),
        (2.0**7, 1),
        (2.0**7, 2),
    ]
    good = batches(4, seed=1)
    others = learner(data=DataLoaders([good[0], *good[2:]]))
    assert_same(learned(states[3]), learned(fit(others, others.init(), 1, [half()])))


def test_fr2_bfloat16_has_no_scale() -> None:
    mine = with_bad_batches(1, factor=INF)
    end = fit(mine, mine.init(), 1, [MixedPrecision()])
    assert "mixed_precision" not in end.memory
    assert end.params["weight"].isnan().all()


def test_a_scale_that_falls_for_ever_is_an_error() -> None:
    mine = with_bad_batches(0, count=1, factor=INF)
    start = mine.init()
    kept = Kept(start)
    with pytest.raises(
        FloatingPointError, match="MixedPrecision: the loss scale has fallen to 5.88e-39"
    ) as caught:
        fit(mine, start, 200, [half(init_scale=2.0**-120)])
    assert caught.value.state.epochs_seen == 6  # type: ignore[attr-defined]
    kept.check()


def test_the_scale_goes_on_from_run_to_run() -> None:
    mine = with_bad_batches(1)
    whole = fit(mine, mine.init(), 3, [half(growth_interval=3)])
    parts = mine.init()
    for _ in range(3):
        parts = fit(mine, parts, 1, [half(growth_interval=3)])
    assert_same(learned(parts), learned(whole))
    assert memory(parts) == memory(whole) == (2.0**7, 2)


def test_a_run_stopped_in_a_window_and_saved_goes_on_bit_for_bit(tmp_path: Path) -> None:
    mine = with_bad_batches(1, count=7)
    callbacks: list[Any] = [half(growth_interval=2), GradientAccumulation(batches=2)]
    whole = fit(mine, mine.init(), 2, callbacks)
    with pytest.raises(ConnectionError) as caught:
        fit(mine, mine.init(), 2, [*callbacks, on(after_pred=raise_once(ConnectionError, at=10))])
    save(caught.value.state, tmp_path / "state")  # type: ignore[attr-defined]
    middle = load(tmp_path / "state", like=mine.init())
    assert middle.memory["gradient_accumulation"]["batches"] == 1
    end = fit(mine, middle, 2, callbacks, resume=True)
    assert_same_run(end, whole)
    assert memory(end) == memory(whole)


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_an_overflow_anywhere_in_a_window_skips_its_step(bad: int) -> None:
    """And lowers the scale once."""
    mine = with_bad_batches(bad, count=6)
    end = fit(mine, mine.init(), 1, [half(), GradientAccumulation(batches=3)])
    assert end.opt_state["step"].max() == 1
    assert memory(end) == (2.0**7, 1)
    rest = learner(data=DataLoaders(batches(6, seed=1)[3:]))
    assert_same(
        learned(end), learned(fit(rest, rest.init(), 1, [half(), GradientAccumulation(batches=3)]))
    )


@pytest.mark.parametrize(("bad", "steps", "scale"), [((), 2, (2.0**8, 2)), ((2,), 1, (2.0**7, 0))])
def test_the_last_step_of_a_phase_cut_short_is_checked_too(
    bad: Any, steps: int, scale: Any
) -> None:
    mine = with_bad_batches(*bad)
    stop = on(after_batch=raise_once(CancelTrain, at=2))
    end = fit(mine, mine.init(), 1, [half(), GradientAccumulation(batches=2), stop])
    assert end.opt_state["step"].max() == steps
    assert memory(end) == scale
    assert all_finite(end.params)


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_all_finite(bad: float) -> None:
    good = {
        "a": torch.full((3,), 3e38),
        "empty": torch.ones(0),
        "none": None,
        "half": torch.ones((), dtype=FP16),
    }
    assert all_finite(good)
    assert all_finite({})
    for dtype in (torch.float32, torch.float64, FP16, BF16, torch.complex64):
        assert not all_finite({**good, "bad": torch.tensor([1.0, bad, 2.0]).to(dtype)})


def test_float16_parameters_are_an_error() -> None:
    mine = learner(linear().half())
    with pytest.raises(ValueError, match=r"params\['weight'\] is float16"):
        fit(mine, mine.init(), 1, [half()])


def test_without_a_backward_pass_there_is_nothing_to_scale() -> None:
    mine = learner()
    end = fit(mine, mine.init(), 1, [half(), on(before_backward=raise_once(CancelBackward))])
    assert end.opt_state["step"].max() == 2
    assert memory(end) == (2.0**8, 2)


def test_the_scale_is_float32_whatever_the_default_dtype_is() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert half().remembered(State({}, {}, {}, {}))["scale"].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
