"""Averages of the params: the numbers, which steps count, and that validation alone sees them."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from functional_sgd import sgd
from loop import (
    AverageParams,
    Batches,
    DataLoaders,
    GradientAccumulation,
    Learner,
    State,
    at_average,
    fit,
    validate,
)
from loop.callbacks.average import moved, newest_weight
from loop.run.signals import Cancel, CancelBackward, CancelBatch, CancelStep
from tests.comparing import Untouched, assert_same
from tests.loop.helpers import (
    Kept,
    learned,
    learner,
    net,
    on,
    one_weight,
    raise_once,
)

ONE = (torch.ones(1, 1), torch.zeros(1, 1))


def shrinking(batches: int = 3, **rest: Any) -> Learner:
    """y = w * x on x = 1, target 0, lr 0.25: every step halves w, from 1."""
    return learner(one_weight(), DataLoaders([ONE] * batches, [ONE]), opt=sgd(lr=0.25), **rest)


def average_of(state: State, name: str = "average_params") -> float:
    return at_average(state, name).params["weight"].item()


def run(callback: AverageParams, epochs: int = 1, batches: int = 3, *others: Any) -> State:
    mine = shrinking(batches)
    return fit(mine, mine.init(), epochs, [callback, *others])


def test_the_debiased_average_is_the_textbook_one() -> None:
    """Starting at zero, average = d * average + (1 - d) * params; then divided by 1 - d**n."""
    average = 0.0
    for count, weight in enumerate([0.5, 0.25, 0.125], start=1):
        average = 0.9 * average + 0.1 * weight
        found = run(AverageParams(decay=0.9), batches=count)
        assert average_of(found) == pytest.approx(average / (1 - 0.9**count), rel=1e-6)


def test_the_average_without_debias_begins_with_the_first_params() -> None:
    found = average_of(run(AverageParams(decay=0.5, debias=False)))
    assert found == 0.5 * (0.5 * 0.5 + 0.5 * 0.25) + 0.5 * 0.125


@pytest.mark.parametrize("options", [(None,), (0.9,), (0.9, False)])
def test_the_first_value_weighs_one(options: Any) -> None:
    assert newest_weight(1, *options) == 1


def test_what_callbacks_do_to_the_params_after_the_step_is_averaged() -> None:
    double = on(
        after_step=lambda state: state.replace(params={"weight": 2 * state.params["weight"]})
    )
    assert average_of(run(AverageParams(), 1, 1, double)) == 1.0


def test_the_plain_mean() -> None:
    assert average_of(run(AverageParams(decay=None))) == pytest.approx((0.5 + 0.25 + 0.125) / 3)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999, 0.9999999])
def test_the_weights_of_all_values_are_the_debiased_ones(decay: float) -> None:
    """Of n values, the i-th weighs (1 - d) * d**(n - i) / (1 - d**n) in the end: they sum to 1."""
    values = torch.eye(5, dtype=torch.float64)
    average: dict[str, Tensor] = {}
    for count, value in enumerate(values, start=1):
        average = moved(average, {"a": value}, newest_weight(count, decay))
    powers = torch.tensor([decay ** (4 - index) for index in range(5)], dtype=torch.float64)
    torch.testing.assert_close(average["a"], powers / powers.sum(), rtol=1e-8, atol=1e-15)


@pytest.mark.parametrize("options", [{"decay": 0.9, "debias": False}, {"decay": None}])
@pytest.mark.parametrize("every", [1, 3])
def test_torchs_numbers(options: dict[str, Any], every: int) -> None:
    """AveragedModel over params and float buffers, in float64, within 1e-12."""
    model = net(dropout=0.0).double()
    x, y = torch.randn(2, 20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mine = Learner(model, DataLoaders(Batches((x, y), 4)), mse_loss, sgd(lr=0.1, mom=0.9))
    start = mine.init()

    theirs = copy.deepcopy(model)
    multi = None if options["decay"] is None else get_ema_multi_avg_fn(options["decay"])
    average = AveragedModel(theirs, multi_avg_fn=multi, use_buffers=True)
    opt = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for step in range(1, 16):
        index = (step - 1) % 5 * 4
        mse_loss(theirs(x[index : index + 4]), y[index : index + 4]).backward()
        opt.step()
        opt.zero_grad()
        if step % every == 0:
            average.update_parameters(theirs)

    found = at_average(fit(mine, start, 3, [AverageParams(**options, every=every)]))
    expected = average.module.state_dict()
    for name, value in {**found.params, **found.buffers}.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12, msg=name)
    assert found.buffers["1.num_batches_tracked"] == 15


def test_every_second_step_counts() -> None:
    state = run(AverageParams(decay=None, every=2), batches=5)
    assert average_of(state) == (2**-2 + 2**-4) / 2
    assert state.memory["average_params"].count == 2


def test_every_counts_on_over_epochs_and_runs() -> None:
    mine = shrinking(3, callbacks=[AverageParams(decay=0.9, every=2)])
    start = mine.init()
    twice, once = fit(mine, fit(mine, start, 1), 1), fit(mine, start, 2)
    assert_same(vars(twice.memory["average_params"]), vars(once.memory["average_params"]))
    assert once.memory["average_params"].count == 3


def test_start_is_a_share_of_the_run() -> None:
    state = run(AverageParams(decay=None, start=0.5), epochs=2, batches=2)
    assert average_of(state) == (2**-3 + 2**-4) / 2


def test_a_run_with_a_start_begins_a_new_average() -> None:
    mine = shrinking(4, callbacks=[AverageParams(decay=None, start=0.5)])
    state = fit(mine, fit(mine, mine.init(), 1), 1)
    assert average_of(state) == (2**-7 + 2**-8) / 2


def test_before_its_start_there_is_no_average_of_an_earlier_run() -> None:
    mine = shrinking(2, callbacks=[AverageParams(decay=None, start=0.5)])
    first = fit(mine, mine.init(), 1)
    second = fit(mine, first, 2)
    assert second.history.rows[1]["valid_loss"] == pytest.approx(
        2**-8
    )  # two steps more, and not the average


@pytest.mark.parametrize(
    ("event", "signal"),
    [
        ("before_step", CancelStep),
        ("before_backward", CancelBackward),
        *(
            (event, CancelBatch)
            for event in ("after_loss", "before_backward", "after_backward", "before_step")
        ),
    ],
)
def test_a_cancelled_step_does_not_count(event: str, signal: type[Cancel]) -> None:
    for order in (-1, 100):  # before and after AverageParams
        state = run(
            AverageParams(decay=None), 1, 3, on(order=order, **{event: raise_once(signal, at=1)})
        )
        assert average_of(state) == (2**-1 + 2**-2) / 2
        assert state.memory["average_params"].count == 2


def test_a_step_after_a_batch_that_was_cancelled_within_its_cancelled_step_counts() -> None:
    """after_step, where the first cancellation would be noticed, was never delivered."""
    extra = on(
        order=50,
        before_step=raise_once(CancelStep, at=1),
        after_cancel_step=raise_once(CancelBatch),
    )
    state = run(AverageParams(decay=None), 1, 3, extra)
    assert average_of(state) == (2**-1 + 2**-2) / 2


def test_accumulated_batches_count_once() -> None:
    mine = shrinking(4)
    state = fit(mine, mine.init(), 1, [GradientAccumulation(2), AverageParams(decay=None)])
    assert state.memory["average_params"].count == 2


def test_half_precision_is_averaged_in_float32() -> None:
    """1024 steps of bfloat16's smallest weight would not move a bfloat16 average at all."""
    average = {"a": torch.ones(1)}
    for _ in range(1024):
        average = moved(average, {"a": torch.zeros(1, dtype=torch.bfloat16)}, 0.001)
    assert average["a"].dtype == torch.float32
    assert average["a"].item() == pytest.approx(0.999**1024, rel=1e-4)


def test_the_average_of_half_params_is_read_in_their_dtype() -> None:
    mine = learner(
        one_weight().bfloat16(),
        DataLoaders([tuple(part.bfloat16() for part in ONE)] * 3),
        opt=sgd(lr=0.25),
    )
    state = fit(mine, mine.init(), 1, [AverageParams(decay=None)])
    assert state.memory["average_params"].average["weight"].dtype == torch.float32
    assert at_average(state).params["weight"].dtype == torch.bfloat16


def test_complex_values_are_averaged() -> None:
    average = moved({"a": torch.tensor(2j)}, {"a": torch.tensor(4 + 0j)}, 0.5)
    assert average["a"] == 2 + 1j


def test_buffers_can_be_left_out() -> None:
    mine = learner(net())
    state = fit(mine, mine.init(), 2, [AverageParams(decay=0.5, buffers=False)])
    assert_same(at_average(state).buffers, state.buffers)
    with_buffers = at_average(fit(mine, mine.init(), 2, [AverageParams(decay=0.5)])).buffers
    assert not torch.equal(with_buffers["1.running_mean"], state.buffers["1.running_mean"])
    assert with_buffers["1.num_batches_tracked"] == 6


def test_training_is_the_same_with_and_without() -> None:
    mine = learner(net())
    plain, found = fit(mine, mine.init(), 2), fit(mine, mine.init(), 2, [AverageParams(decay=0.5)])
    assert_same(learned(found), learned(plain))


def test_the_state_given_is_untouched() -> None:
    mine = learner(net(), callbacks=[AverageParams(decay=0.5)])
    start = fit(mine, mine.init(), 1)
    kept, memory = Kept(start), Untouched(dict(start.memory["average_params"].average))
    fit(mine, start, 1)
    validate(mine, start)
    at_average(start)
    kept.check()
    memory.check()


def test_nothing_averaged_yet_is_the_state_as_it_is() -> None:
    mine = shrinking()
    state = fit(mine, mine.init(), 0, [AverageParams()])
    assert_same(at_average(state).params, state.params)


def test_a_state_without_an_average_says_so() -> None:
    with pytest.raises(ValueError, match="at_average: the state remembers no 'average_params'"):
        at_average(shrinking().init())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, "decay must be in"),
        ({"decay": -0.1}, "decay must be in"),
        ({"start": 1.0}, "start must be a share"),
        ({"every": 0}, "every must be at least 1"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"AverageParams: {message}"):
        AverageParams(**options)
