"""What layers put out while a model learns: the numbers, and that no hook stays (L38, N56)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from functional_sgd import sgd
from loop import DataLoaders, Learner, State, fit, predict, trace, validate
from loop.callbacks.activations import ActivationStats, activation_stats, layers_of, stats_of
from loop.run.signals import (
    Cancel,
    CancelBackward,
    CancelBatch,
    CancelEpoch,
    CancelFit,
    CancelStep,
    CancelTrain,
)
from tests.comparing import assert_same
from tests.loop.helpers import (
    UNUSED,
    Kept,
    assert_same_run,
    learner,
    linear,
    loaders,
    net,
    on,
    raise_once,
    raiser,
)

X = torch.tensor([[0.0, 1.0], [2.0, -4.0]])
NAN = float("nan")


def identity(data: int = 1, **rest: Any) -> Learner:
    """Puts out what comes in, and does not learn; then a ReLU that overwrites."""
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2))
    return learner(
        nn.Sequential(layer, nn.ReLU(inplace=True)),
        DataLoaders([(X, X)] * data),
        opt=sgd(lr=0.0),
        **rest,
    )


def measured(mine: Learner, *callbacks: Any, epochs: int = 1) -> Any:
    return activation_stats(fit(mine, mine.init(), epochs, callbacks))


def hooks(model: nn.Module) -> int:
    return sum(
        len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in model.modules()
    )


def test_l38_mean_std_and_share_near_zero() -> None:
    """0, 1, 2, -4: mean -0.25, squared deviations 0.0625 + 1.5625 + 5.0625 + 14.0625 = 20.75, two
    of four near zero.
    """
    found = measured(identity(), ActivationStats("*"))
    assert found.layers == ("0", "1")
    assert found.kinds == ("Linear", "ReLU")
    assert found.mean.tolist() == [[-0.25, 0.75]]
    assert found.std[0].tolist() == pytest.approx([(20.75 / 3) ** 0.5, (2.75 / 3) ** 0.5])
    assert found.near_zero.tolist() == [[0.5, 0.5]]
    assert found.histograms is None


def test_near_zero_is_up_to_five_hundredths() -> None:
    assert stats_of(torch.tensor([-1.0, 0.0499, 0.0501, 3.0]))[2] == 0.5


def test_one_output_has_no_deviation() -> None:
    assert stats_of(torch.tensor([2.0])).tolist() == [2.0, 0.0, 0.0]


def test_histograms_count_what_is_in_range() -> None:
    found = measured(identity(), ActivationStats("*", hist=True, bins=4, range=(-2.0, 2.0)))
    assert found.histograms.tolist() == [
        [[0, 0, 1, 2], [0, 0, 2, 2]]
    ]  # -4 is outside; 2 is in the last bin
    assert found.range == (-2.0, 2.0)


def test_forty_bins_from_zero_to_ten_unless_told_otherwise() -> None:
    found = measured(identity(), ActivationStats(hist=True))
    expected = torch.zeros(40)
    expected[[0, 4, 8]] = 1.0
    assert_same(found.histograms[0, 0], expected)


def test_the_numbers_are_those_of_the_forward_pass_that_trains() -> None:
    """Every batch: the mean of the last layer's output is that of the prediction."""
    mine = learner(net())
    means = []
    spy = on(
        after_pred=lambda state: means.append(state.pred.mean().item()) if state.training else None
    )
    found = measured(mine, ActivationStats("4"), spy, epochs=2)
    assert found.mean[:, 0].tolist() == pytest.approx(means)
    assert found.train_iter == (0, 1, 2, 3, 4, 5)


def test_the_run_is_the_same_with_and_without() -> None:
    mine = learner(net())
    assert_same_run(
        fit(mine, mine.init(), 2, [ActivationStats("*", hist=True)]), fit(mine, mine.init(), 2)
    )


def test_every_nth_batch_over_runs() -> None:
    mine = learner(net(), callbacks=[ActivationStats(every=4)])
    state = fit(mine, fit(mine, mine.init(), 1), 2)
    assert activation_stats(state).train_iter == (0, 4, 8)


def test_other_layers_begin_anew() -> None:
    mine = learner(net())
    first = fit(mine, mine.init(), 1, [ActivationStats()])
    found = activation_stats(fit(mine, first, 1, [ActivationStats("0")]))
    assert found.layers == ("0",)
    assert found.train_iter == (3, 4, 5)


def test_only_training_batches_are_measured() -> None:
    mine = learner(net(), callbacks=[ActivationStats()])
    state = fit(mine, mine.init(), 1)
    assert len(activation_stats(state).train_iter) == 3
    seen = []
    callback = on(
        around_predict=lambda state: Watch(
            lambda: seen.append((state.training, hooks(mine.model)))
        ),
        order=99,
    )
    fit(mine, state, 1, [callback])
    assert seen == [(True, 3)] * 3 + [(False, 0)] * 2
    validate(mine, state)
    predict(mine, state)


class Watch:
    """A bracket that looks when it opens."""

    def __init__(self, look: Callable[[], Any]) -> None:
        self.look = look

    def __enter__(self) -> None:
        self.look()

    def __exit__(self, *_: object) -> None: ...


def test_n56_a_hook_may_come_after_a_forward_pass_and_is_gone_again() -> None:
    """The model has run before; and between two batches there is no hook."""
    mine = learner(net())
    mine.model(torch.ones(2, 2))
    seen = {
        event: hooks(mine.model) for event, _ in trace(mine, mine.init(), 1, [ActivationStats()])
    }
    assert set(seen.values()) == {0}


@pytest.mark.parametrize(
    ("event", "signal"),
    [
        *(
            (event, signal)
            for event in ("before_batch", "after_pred", "after_loss")
            for signal in (CancelBatch, CancelFit)
        ),
        ("after_pred", CancelTrain),
        ("after_pred", CancelEpoch),
        ("before_backward", CancelBackward),
        ("before_step", CancelStep),
    ],
)
def test_no_hook_stays_after_a_signal(event: str, signal: type[Cancel]) -> None:
    mine = learner(net())
    state = fit(mine, mine.init(), 1, [ActivationStats(), on(**{event: raise_once(signal, at=1)})])
    assert hooks(mine.model) == 0
    for values in state.memory["activation_stats"]["stats"]:
        assert torch.isfinite(values).all()


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, CancelFit, CancelBatch])
@pytest.mark.parametrize("where", ["first", "last", "loss", "another bracket"])
def test_no_hook_stays_after_an_error(where: str, error: type[BaseException]) -> None:
    mine = learner(net(), loss=raiser(error) if where == "loss" else nn.functional.mse_loss)
    if where in ("first", "last"):
        mine.model[0 if where == "first" else 4].forward = raiser(error)
    others = [on("late", 99, around_predict=raiser(error))] if where == "another bracket" else []
    if issubclass(error, Cancel):
        fit(mine, mine.init(), 1, [ActivationStats(), *others])
    else:
        with pytest.raises(error):
            fit(mine, mine.init(), 1, [ActivationStats(), *others])
    assert hooks(mine.model) == 0


def test_what_a_cancelled_forward_pass_has_left_is_not_counted() -> None:
    """The second batch, in which alone the first layer is called, ends within the model."""

    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.stop = linear(), linear(), raise_once(CancelBatch, at=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                self.stop()
            except CancelBatch:
                self.first(x)
                raise
            return self.second(x)

    with pytest.warns(UserWarning, match=UNUSED):
        found = measured(learner(Once()), ActivationStats())
    assert found.train_iter == (0, 2)
    assert found.mean[:, 0].isnan().all()
    assert found.mean[:, 1].isfinite().all()


def test_a_users_hooks_stay() -> None:
    mine = learner(net())
    mine.model[0].register_forward_hook(lambda *_: None)
    fit(mine, mine.init(), 1, [ActivationStats()])
    assert hooks(mine.model) == 1


def test_a_layer_that_is_not_called_has_nans() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = linear(), linear()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x)

    with pytest.warns(UserWarning, match=UNUSED):
        found = measured(learner(Sometimes()), ActivationStats(hist=True, bins=2))
    assert found.mean[:, 1].isnan().all()
    assert found.mean[:, 0].isfinite().all()
    assert found.histograms[:, 1].sum() == 0


def test_the_first_tensor_of_a_tuple_counts() -> None:
    class Last(nn.Module):
        def forward(self, output: Any) -> torch.Tensor:
            return output[0]

    mine = learner(nn.Sequential(nn.LSTM(2, 2, batch_first=True), Last()))
    found = measured(mine, ActivationStats("*"))
    assert_same(found.mean[:, 0], found.mean[:, 1])


def test_half_precision_is_measured_in_float32() -> None:
    data = DataLoaders([(X.bfloat16(), X.bfloat16())])
    assert (
        measured(learner(linear().bfloat16(), data, opt=sgd(lr=0.0)), ActivationStats()).mean.dtype
        == torch.float32
    )


def test_the_state_given_is_untouched() -> None:
    mine = learner(net(), callbacks=[ActivationStats()])
    start = fit(mine, mine.init(), 1)
    kept, length = Kept(start), len(start.memory["activation_stats"]["stats"])
    fit(mine, start, 1)
    fit(mine, start, 2)
    kept.check()
    assert len(start.memory["activation_stats"]["stats"]) == length == 3


def test_which_layers() -> None:
    model = nn.Sequential(net(), nn.Sequential(linear(), nn.ReLU()))
    assert list(layers_of(model)) == ["0.0", "0.1", "0.4", "1.0"]
    assert list(layers_of(model, "1.*")) == ["1.0", "1.1"]
    assert list(layers_of(model, ["1.0", "0.?"])) == ["0.0", "0.1", "0.2", "0.3", "0.4", "1.0"]
    assert list(layers_of(model, lambda name, layer: isinstance(layer, nn.ReLU))) == ["0.2", "1.1"]
    assert list(layers_of(linear())) == [""]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("5", "no layer of the model is called '5'"),
        (["0", "a*"], r"called 'a\*'"),
        (lambda *_: False, "chooses none"),
    ],
)
def test_layers_that_are_not_there(layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(learner(net(), loaders()), learner(net()).init(), 1, [ActivationStats(layers)])


@pytest.mark.parametrize("options", [{"every": 0}, {"bins": 0}, {"range": (1.0, 1.0)}])
def test_settings_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"ActivationStats: {next(iter(options))} must"):
        ActivationStats(**options)


@pytest.mark.parametrize("epochs", [None, 0])
def test_nothing_measured_says_so(epochs: int | None) -> None:
    mine = learner()
    state: State = (
        mine.init() if epochs is None else fit(mine, mine.init(), epochs, [ActivationStats()])
    )
    with pytest.raises(ValueError, match="activation_stats: the state has no measurements"):
        activation_stats(state)


def test_a_run_can_go_back_to_a_state_from_before_it() -> None:
    """The measurements begin anew there, as in the other callbacks that remember."""
    mine = identity(3)
    start = mine.init()

    def undo(state: State) -> State | None:
        return state.back_to(start) if state.training and state.iter == 1 else None

    back = on("back", 99, after_batch=undo)
    assert measured(mine, ActivationStats("*"), back).mean.tolist() == [[-0.25, 0.75]]
