"""fit(compile=True): the same run from a graph; what cannot be in a graph says so."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import mse_loss

from functional_sgd import adamw, lamb, sgd
from functional_sgd.schedules import Linear
from loop import (
    ActivationStats,
    CancelBatch,
    CancelStep,
    Freeze,
    GradientAccumulation,
    GradientClip,
    LabelSmoothing,
    MixedPrecision,
    MixUp,
    ParamScheduler,
    Recorder,
    State,
    fit,
    fit_one_cycle,
    trace,
)
from loop.run.graph_cache import graphs_of
from tests.comparing import Untouched, assert_same
from tests.loop.helpers import Kept, assert_same_run, learner, losses, net, on
from tests.loop.run.compiled_runs import assert_close, classes, model, traced

pytestmark = pytest.mark.usefixtures("quiet")

COMBINATIONS: dict[str, list[Any]] = {
    "nothing": [],
    "clip": [GradientClip(0.1)],
    "smoothing": [LabelSmoothing(0.1)],
    "mixup": [MixUp(0.4)],
    "mixup and smoothing": [MixUp(0.4), LabelSmoothing(0.2), GradientClip(0.5)],
    "accumulation": [GradientAccumulation(batches=3), GradientClip(0.1)],
    "freeze": [Freeze("0.*")],
    "scheduled": [ParamScheduler({"lr": Linear(0.1, 0.01), "mom": Linear(0.9, 0.5)})],
}


COMPILED = ("mixup and smoothing",)
"""Whose graphs become code, which takes ten seconds where nothing is known yet."""


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_compiled_run_is_the_same_run(name: str, request: pytest.FixtureRequest) -> None:
    if name not in COMPILED:
        request.getfixturevalue("as_traced")
    mine = classes(callbacks=COMBINATIONS[name])
    start = mine.init(seed=1)
    kept = Kept(start)
    found, expected = fit(mine, start, 2, compile=True), fit(mine, start, 2)
    assert_close(found, expected)
    for row, wanted in zip(found.history.rows, expected.history.rows, strict=True):
        assert row == pytest.approx(wanted, abs=1e-4)
    kept.check()
    assert len(graphs_of(mine.model)) == 2, "one for each phase, whatever lr and lambda are"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_is_part_of_the_graph(
    dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    if dtype == torch.float16:
        request.getfixturevalue("as_traced")
    mine = classes(callbacks=[MixedPrecision(dtype, growth_interval=3, init_scale=8.0)])
    found, expected = fit(mine, mine.init(), 2, compile=True), fit(mine, mine.init(), 2)
    assert_close(found, expected, atol=0.02)
    assert len(graphs_of(mine.model)) == 2
    if dtype == torch.float16:
        assert float(found.memory["mixed_precision"]["scale"]) == float(
            expected.memory["mixed_precision"]["scale"]
        )


@traced
def test_a_smaller_last_batch_is_one_more_graph() -> None:
    mine = classes(size=16)
    assert_close(fit(mine, mine.init(), 3, compile=True), fit(mine, mine.init(), 3))
    assert len(graphs_of(mine.model)) == 3  # the third one is for validation


@traced
def test_graphs_are_found_again_in_the_next_run_unless_the_model_has_changed() -> None:
    made = model(dropout=0.5)
    mine = classes(made)
    state = fit_one_cycle(mine, mine.init(), 1, lr=0.1, compile=True)
    graphs = list(graphs_of(made))
    fit_one_cycle(mine, state, 1, lr=0.2, compile=True)
    assert graphs_of(made) == graphs
    made[2].p = 0.1  # type: ignore[assignment]
    assert graphs_of(made) == []
    fit(mine, mine.init(), 1, compile=True)
    made[2].p = 0.5  # type: ignore[assignment]
    assert graphs_of(made) == graphs


def test_chance_is_a_function_of_the_state() -> None:
    mine = classes(model(dropout=0.5))
    states: list[State] = []
    end = fit(
        mine,
        mine.init(),
        2,
        [on(committed=lambda state: states.append(state.at_rest()))],
        compile=True,
    )
    torch.manual_seed(123)
    assert_same_run(fit(mine, mine.init(), 2, compile=True), end)
    for state in states[::3]:
        assert_same_run(fit(mine, state, 2, resume=True, compile=True), end)
    assert_same(end.params, fit(mine, mine.init(seed=0), 2, compile=True).params)
    other = fit(mine, mine.init(seed=5), 2, compile=True)
    assert not torch.equal(other.params["0.weight"], end.params["0.weight"])


@traced
def test_the_model_and_its_buffers_are_left_alone() -> None:
    made = model()
    untouched = Untouched({**dict(made.named_parameters()), **dict(made.named_buffers())})
    made.eval()
    mine = classes(made)
    state = fit(mine, mine.init(), 1, compile=True)
    untouched.check()
    assert not made.training
    assert int(state.buffers["4.num_batches_tracked"]) == 4


@traced
def test_events_are_those_of_an_ordinary_run() -> None:
    mine = classes()
    compiled = [event for event, _ in trace(mine, mine.init(), 1, compile=True)]
    assert compiled == [event for event, _ in trace(mine, mine.init(), 1)]


@traced
def test_events_show_what_they_always_show() -> None:
    seen: dict[bool, list[float]] = {True: [], False: []}

    def spies(which: bool) -> Any:
        log = seen[which].append
        return on(
            order=100,
            after_pred=lambda state: log(float(state.pred.sum())),
            after_loss=lambda state: log(float(state.loss)),
            after_backward=lambda state: log(float(state.grads["0.weight"].sum())),
            before_step=lambda state: log(float(state.params["0.weight"].sum())),
            after_step=lambda state: log(float(state.params["0.weight"].sum())),
        )

    mine = classes(callbacks=[GradientClip(0.1)])
    for which in (True, False):
        fit(mine, mine.init(), 1, [spies(which)], compile=which)
    assert seen[True] == pytest.approx(seen[False], abs=1e-5)


@traced
def test_gradients_that_a_callback_changes_are_used() -> None:
    def halve(state: State) -> State:
        assert state.grads is not None
        return state.replace(
            grads={name: None if g is None else g / 2 for name, g in state.grads.items()}
        )

    mine = classes()
    for event in ("after_backward", "before_step"):
        halving = on(**{event: halve})
        assert_close(
            fit(mine, mine.init(), 1, [halving], compile=True), fit(mine, mine.init(), 1, [halving])
        )


@traced
@pytest.mark.parametrize(
    "event", ["before_batch", "after_pred", "after_loss", "before_backward", "before_step"]
)
@pytest.mark.parametrize("signal", [CancelBatch, CancelStep])
def test_signals_cancel_compiled_batches_too(event: str, signal: type[Exception]) -> None:
    if signal is CancelStep and event != "before_step":
        pytest.skip("no step to cancel there")

    def cancel(state: State) -> None:
        if state.training and state.train_iter == 2:
            raise signal

    mine = classes()
    canceller = [on(**{event: cancel})]
    assert_close(
        fit(mine, mine.init(), 1, canceller, compile=True), fit(mine, mine.init(), 1, canceller)
    )


@pytest.mark.parametrize(
    "callback", [ActivationStats(), ParamScheduler({"model.2.p": Linear(0.0, 0.5)})]
)
def test_callbacks_that_look_into_the_model_cannot_be_compiled(callback: Any) -> None:
    mine = classes(callbacks=[callback])
    with pytest.raises(ValueError, match=r"fit\(compile=True\): .*Leave it out"):
        fit(mine, mine.init(), 1, compile=True)


class Branching(nn.Module):
    """Looks at a value."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x)
        return found if float(found.sum()) > 0 else -found


def test_a_model_that_branches_on_values_says_so() -> None:
    mine = classes(Branching())
    with pytest.raises(Exception, match=r".") as caught:
        fit(mine, mine.init(), 1, compile=True)
    assert any("could not be compiled" in note for note in caught.value.__notes__)


class AsksWhetherTraced(nn.Module):
    """Looks at a value unless it gets stand-ins, as Hugging Face's models do with their masks."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, FakeTensor) and not bool(x.any()):
            return x.new_zeros(len(x), 3)
        found: Tensor = self.inner(x)
        return found


def test_a_model_that_branches_on_values_except_where_it_is_traced() -> None:
    mine = classes(AsksWhetherTraced())
    start = mine.init()
    assert_close(fit(mine, start, 1, compile=True), fit(mine, start, 1))


@pytest.mark.parametrize(
    "opt",
    [
        adamw(lr=0.01),
        lamb(lr=0.01),
        sgd(lr=0.1),
    ],
    ids=["adamw", "lamb", "sgd"],
)
def test_optimizers_are_updated_in_the_graph_or_by_their_kernel(
    opt: Any, request: pytest.FixtureRequest
) -> None:
    if opt != adamw(lr=0.01):
        request.getfixturevalue("as_traced")
    deep = nn.Sequential(*(nn.Linear(2, 2) for _ in range(12)))  # 24 leaves: too many for the graph
    for made in (net(dropout=0.0), deep):
        mine = learner(made, opt=opt, loss=mse_loss)
        assert_same(
            fit(mine, mine.init(), 1, compile=True).opt_state["step"].max(),
            fit(mine, mine.init(), 1).opt_state["step"].max(),
        )
        assert losses(fit(mine, mine.init(), 2, compile=True)) == pytest.approx(
            losses(fit(mine, mine.init(), 2)), abs=1e-4
        )


@traced
def test_a_tree_of_hypers_is_data_too() -> None:
    mine = classes()
    lr = {name: 0.1 if name.startswith("0") else 0.01 for name in mine.init().params}
    assert_close(fit(mine, mine.init(), 1, lr=lr, compile=True), fit(mine, mine.init(), 1, lr=lr))
    fit(mine, mine.init(), 1, lr={name: 2 * rate for name, rate in lr.items()}, compile=True)
    assert len(graphs_of(mine.model)) == 2


@traced
def test_train_metrics_and_history_are_complete() -> None:
    mine = classes(callbacks=[Recorder(train_metrics=True)])
    found, expected = fit(mine, mine.init(), 1, compile=True), fit(mine, mine.init(), 1)
    assert found.history.rows[0] == pytest.approx(expected.history.rows[0], abs=1e-5)
