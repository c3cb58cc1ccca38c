"""GradientAccumulation: the step of several small batches is the step of the big one."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from functional_sgd import Optimizer, adamw, fuse, sgd
from loop import (
    Batches,
    CancelBatch,
    CancelEpoch,
    CancelFit,
    CancelStep,
    CancelTrain,
    DataLoaders,
    GradientAccumulation,
    GradientClip,
    Learner,
    ParamScheduler,
    State,
    fit,
    trace,
    validate,
)
from tests.comparing import assert_close, assert_same
from tests.loop.helpers import (
    UNUSED,
    Kept,
    assert_same_run,
    learned,
    learner,
    linear,
    losses,
    on,
    one_weight,
    raise_once,
)

DOUBLE = torch.float64
X, Y = (
    torch.randn(8, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
    for seed in (0, 1)
)


def cut(*sizes: int) -> list[tuple[Tensor, ...]]:
    """The eight samples, in batches of these sizes."""
    return list(zip(X.split(sizes), Y.split(sizes), strict=True))


class NoLength:
    """A loader that cannot tell how many batches it has."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def double(train: Any, opt: Optimizer | None = None, **rest: Any) -> Learner:
    """A linear layer in float64 on these batches."""
    return learner(linear().double(), DataLoaders(train, cut(8)), opt=opt or adamw(lr=0.1), **rest)


def run(train: Any, callbacks: list[Any], epochs: int = 3, opt: Optimizer | None = None) -> State:
    mine = double(train, opt)
    return fit(mine, mine.init(), epochs, callbacks)


@pytest.mark.parametrize("sizes", [(4, 4), (2, 2, 2, 2), (3, 1, 4), (1, 5, 2), (1,) * 8])
@pytest.mark.parametrize(
    "make", [lambda: sgd(lr=0.1, mom=0.9), lambda: adamw(lr=0.1), lambda: fuse(adamw(lr=0.1))]
)
def test_n29_small_batches_make_the_step_of_the_big_one(
    sizes: tuple[int, ...], make: Callable[[], Optimizer]
) -> None:
    big = run(cut(8), [], opt=make())
    small = run(cut(*sizes), [GradientAccumulation(batches=len(sizes))], opt=make())
    assert_close(learned(small), learned(big), atol=1e-14)
    assert small.opt_state["step"].max() == 3


def test_n29_the_gradient_of_uneven_batches_by_hand() -> None:
    """y = w x at w = 1 towards 0: the gradient of the mean square is the mean of 2 x^2; a plain
    mean gives another.
    """
    x = torch.tensor([[1.0], [2.0], [3.0]])
    data = DataLoaders([(x[:1], 0 * x[:1]), (x[1:], 0 * x[1:])])
    mine = Learner(one_weight(), data, mse_loss, sgd(lr=1.0))
    seen: list[Tensor | None] = []
    spy = on(order=7, before_step=lambda state: seen.append(state.grads["weight"]))
    fit(mine, mine.init(), 1, [GradientAccumulation(batches=2), spy])
    assert_same(seen, [torch.tensor([[2 * (1 + 4 + 9) / 3]])])


@pytest.mark.parametrize("size", [4, 2, 1])
def test_n29_numbers_of_fastai(size: int) -> None:
    """Eight points of y = 3x + 1, steps of 4 samples, 2 epochs from zero."""
    x = torch.linspace(-1, 1, 8)[:, None]
    mine = Learner(
        nn.Linear(1, 1), DataLoaders(Batches((x, 3 * x + 1), size)), mse_loss, sgd(lr=0.1)
    )
    start = mine.init().replace(params={"weight": torch.zeros(1, 1), "bias": torch.zeros(1)})
    end = fit(mine, start, 2, [GradientAccumulation(samples=4)])
    assert_close(end.params["weight"], torch.tensor([[0.950294017791748]]), atol=1e-7)
    assert_close(end.params["bias"], torch.tensor([0.6639267206]), atol=1e-7)


@pytest.mark.parametrize(("window", "expected"), [(1, 8), (2, 4), (3, 3), (8, 1), (9, 1)])
def test_the_tail_of_an_epoch_gets_its_own_step(window: int, expected: int) -> None:
    end = run(cut(*(1,) * 8), [GradientAccumulation(batches=window)], epochs=2)
    assert end.opt_state["step"].max() == 2 * expected
    assert "gradient_accumulation" not in end.memory


def test_samples_are_gathered_until_there_are_enough() -> None:
    """3 + 2 reach 4, and so do 1 + 1 + ... at the end of the epoch only."""
    taken: list[int] = []
    spy = on(order=7, before_step=lambda state: taken.append(state.iter))
    run(cut(3, 2, 1, 1, 1), [GradientAccumulation(samples=4), spy], epochs=1)
    assert taken == [1, 4]


def test_windows_of_one_batch_change_no_bit() -> None:
    mine = double(cut(3, 1, 4))
    assert_same_run(
        fit(mine, mine.init(), 2, [GradientAccumulation(batches=1)]), fit(mine, mine.init(), 2)
    )


@pytest.mark.parametrize("window", [2, 3, 4])
def test_a_loader_without_length_makes_no_difference(window: int) -> None:
    callbacks = [GradientAccumulation(batches=window)]
    found, expected = (
        run(data, callbacks) for data in (NoLength(cut(2, 2, 1, 2, 1)), cut(2, 2, 1, 2, 1))
    )
    assert_close(learned(found), learned(expected), atol=1e-15)
    assert found.memory.keys() == {"recorder"}


@pytest.mark.parametrize("signal", [CancelTrain, CancelEpoch, CancelFit])
@pytest.mark.parametrize("event", ["after_batch", "after_cancel_step", "after_step"])
def test_a_phase_cut_short_loses_nothing(signal: type[Exception], event: str) -> None:
    """Three batches of five, in windows of two, and then no more."""

    def stop(state: State) -> None:
        if state.training and state.iter == 2:
            raise signal

    found = run(
        cut(2, 2, 1, 2, 1), [GradientAccumulation(batches=2), on(**{event: stop})], epochs=1
    )
    expected = run(cut(2, 2, 1, 3)[:3], [GradientAccumulation(batches=2)], epochs=1)
    assert_close(learned(found), learned(expected), atol=1e-15)
    assert found.opt_state["step"].max() == 2
    assert found.grads is None


def test_the_validation_is_of_the_last_step() -> None:
    seen: list[Any] = []
    spy = on(
        before_validate=lambda state: seen.append(
            (state.opt_state["step"].max().item(), state.grads)
        )
    )
    end = run(NoLength(cut(2, 2, 4)), [GradientAccumulation(batches=2), spy], epochs=1)
    assert seen == [(2, None)]
    assert end.history.column("valid_loss") == [validate(double(cut(8)), end)["valid_loss"]]


def test_a_cancelled_epoch_hands_nothing_on() -> None:
    """Its last step is taken before the next epoch begins."""
    seen: list[int] = []
    spy = on("other", before_epoch=lambda state: seen.append(state.opt_state["step"].max().item()))
    run(
        cut(4, 4),
        [GradientAccumulation(batches=2), on(after_step=raise_once(CancelEpoch)), spy],
        epochs=2,
    )
    assert seen == [0, 1]


def test_the_last_step_has_the_scheduled_hyper() -> None:
    def stop(state: State) -> None:
        raise CancelFit

    callbacks = [
        GradientAccumulation(batches=2),
        ParamScheduler({"lr": lambda position: 0.5}),
        on(after_step=stop),
    ]
    found = run(cut(4, 4), callbacks, epochs=1, opt=sgd(lr=1e9))
    assert_close(found.params, run(cut(4, 4)[:1], [], epochs=1, opt=sgd(lr=0.5)).params, atol=1e-15)
    assert found.hyper["lr"] == 1e9


def test_a_run_stopped_in_a_window_goes_on_bit_for_bit() -> None:
    mine = double(cut(1, 2, 1, 2, 1, 1))
    whole = fit(mine, mine.init(), 2, [GradientAccumulation(batches=3)])
    broken = on(
        after_pred=raise_once(ConnectionError, at=9)
    )  # epoch 1, in the window of its first batches
    with pytest.raises(ConnectionError) as caught:
        fit(mine, mine.init(), 2, [GradientAccumulation(batches=3), broken])
    middle: State = caught.value.state  # type: ignore[attr-defined]
    assert middle.memory["gradient_accumulation"].batches in (1, 2)
    kept = Kept(middle)
    assert_same_run(fit(mine, middle, 2, [GradientAccumulation(batches=3)], resume=True), whole)
    kept.check()


def test_the_step_after_a_phase_leaves_the_committed_state_of_a_donated_run() -> None:
    """An error behind that step, and the run goes on from the batch before it, bit for bit."""

    def stop(state: State) -> None:
        if state.iter == 2:
            raise CancelTrain

    mine = double(cut(2, 2, 1, 2, 1), sgd(lr=0.1))
    callbacks = [GradientAccumulation(batches=2), on("stop", after_batch=stop)]
    whole = fit(mine, mine.init(), 1, callbacks, donate=True)
    broken = on(order=7, after_train=raise_once(ConnectionError))
    with pytest.raises(ConnectionError) as caught:
        fit(mine, mine.init(), 1, [*callbacks, broken], donate=True)
    committed: State = caught.value.state  # type: ignore[attr-defined]
    assert_same_run(fit(mine, committed, 1, callbacks, resume=True), whole)


def test_a_new_run_forgets_the_window_of_a_stopped_one() -> None:
    mine = double(cut(4, 4))
    with pytest.raises(ConnectionError) as caught:
        fit(
            mine,
            mine.init(),
            1,
            [GradientAccumulation(batches=2), on(after_pred=raise_once(ConnectionError, at=1))],
        )
    middle: State = caught.value.state  # type: ignore[attr-defined]
    again = fit(mine, middle, 1, [GradientAccumulation(batches=2)])
    assert_same(
        learned(again), learned(fit(mine, mine.init(), 1, [GradientAccumulation(batches=2)]))
    )


def test_a_window_is_plain_data() -> None:
    mine = double(cut(1, 2, 5), callbacks=[GradientAccumulation(batches=3)])
    states = [state for event, state in trace(mine, mine.init()) if event == "after_step"]
    window = states[1].memory["gradient_accumulation"]
    assert {name: type(value) for name, value in vars(window).items()} == dict(
        sum=dict, weight=int, batches=int, samples=int, value=type(None)
    )
    assert (window.weight, window.batches, window.samples) == (3, 2, 3)
    assert not window.sum["weight"].requires_grad


def test_the_others_see_full_gradients_only() -> None:
    """GradientClip works on the big batch's gradient, wherever it stands in the list."""
    small = run(cut(3, 1, 4), [GradientClip(0.1), GradientAccumulation(batches=3)], opt=sgd(lr=1.0))
    big = run(cut(8), [GradientClip(0.1)], opt=sgd(lr=1.0))
    assert_close(small.params, big.params, atol=1e-14)
    assert (
        small.params["weight"] - run(cut(8), [], opt=sgd(lr=1.0)).params["weight"]
    ).abs().max() > 0.1


def test_every_batch_has_its_place_in_the_history() -> None:
    schedule = ParamScheduler({"lr": lambda position: position})
    end = run(cut(2, 2, 2, 2), [GradientAccumulation(batches=2), schedule], epochs=1)
    assert list(end.history.hypers["lr"]) == [0, 0.25, 0.5, 0.75]
    assert len(losses(end)) == 4


def test_a_cancelled_batch_does_not_count() -> None:
    skip = on(before_batch=raise_once(CancelBatch, at=1))
    found = run(cut(2, 4, 2), [GradientAccumulation(batches=2), skip], epochs=1)
    (first, _, last) = cut(2, 4, 2)
    both = tuple(torch.cat(pair) for pair in zip(first, last, strict=True))
    assert_close(learned(found), learned(run([both], [], epochs=1)), atol=1e-15)


def test_a_window_whose_step_is_cancelled_is_gone() -> None:
    skip = on(order=7, before_step=raise_once(CancelStep, at=0))
    found = run(cut(2, 2, 2, 2), [GradientAccumulation(batches=2), skip], epochs=1)
    assert_close(
        learned(found),
        learned(run(cut(2, 2, 2, 2)[2:], [GradientAccumulation(2)], epochs=1)),
        atol=1e-15,
    )


def test_validation_is_left_alone() -> None:
    mine = double(cut(8), callbacks=[GradientAccumulation(batches=2)])
    assert validate(mine, mine.init()) == validate(double(cut(8)), mine.init())


class Switch(nn.Module):
    """One layer for positive inputs, another for the rest, and one for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.never = (one_weight(value) for value in (1.0, 2.0, 3.0))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(x) if x.sum() > 0 else self.down(x)
        return out


def test_leaves_without_a_gradient_in_some_batches() -> None:
    """Half of the samples have gradient 0 for each layer; the layer that is never used has none."""
    x = torch.tensor([[1.0], [-1.0]])
    mine = Learner(
        Switch(),
        DataLoaders([(x[:1], 0 * x[:1]), (x[1:], 0 * x[1:])]),
        mse_loss,
        sgd(lr=1.0, wd=0.1),
    )
    seen: list[Any] = []
    spy = on(order=7, before_step=lambda state: seen.append(dict(state.grads)))
    with pytest.warns(UserWarning, match=f"{UNUSED} 1 parameter .*: 'never.weight'"):
        end = fit(mine, mine.init(), 1, [GradientAccumulation(batches=2), spy])
    assert_same(
        [seen[0]["up.weight"], seen[0]["down.weight"]],
        [torch.tensor([[1.0]]), torch.tensor([[2.0]])],
    )
    assert seen[0]["never.weight"] is None
    assert end.params["never.weight"] == 3.0


def test_half_precision_gradients_are_summed_in_float32() -> None:
    """256 + 1 is 256 in bfloat16."""
    data = DataLoaders(
        [(torch.full((1, 1), value, dtype=torch.bfloat16),) for value in (256.0, 1.0)]
    )
    mine = Learner(one_weight().bfloat16(), data, lambda pred: pred.mean(), sgd(lr=1.0))
    seen: list[Any] = []
    spy = on(order=7, before_step=lambda state: seen.append(state.grads["weight"]))
    end = fit(mine, mine.init(), 1, [GradientAccumulation(batches=2), spy])
    assert_same(seen, [torch.tensor([[128.5]])])
    assert end.params["weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "arguments", [{}, {"batches": 2, "samples": 4}, {"batches": 0}, {"samples": 1.5}]
)
def test_arguments_are_checked(arguments: Any) -> None:
    with pytest.raises(
        ValueError, match="GradientAccumulation: (give either|batches must|samples must)"
    ):
        GradientAccumulation(**arguments)
