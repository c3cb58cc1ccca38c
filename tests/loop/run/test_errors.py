"""What an error says, what it carries, and that it leaves nothing broken behind."""

import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from functional_sgd import sgd
from functional_sgd.schedules import Linear
from loop import (
    Batches,
    DataLoaders,
    Learner,
    ParamScheduler,
    Recorder,
    State,
    fit,
    predict,
    trace,
    validate,
)
from tests.comparing import assert_same
from tests.loop.helpers import (
    EVENTS,
    Kept,
    assert_at_rest,
    assert_same_run,
    batches,
    learned,
    learner,
    linear,
    loaders,
    on,
    raise_once,
    raiser,
)

LEARNER = learner()
START = LEARNER.init()
BETWEEN_BATCHES = (
    "before_fit before_epoch before_train after_batch after_train before_validate after_validate "
    "after_epoch"
).split()
NORMAL_EVENTS = [event for event in EVENTS if "cancel" not in event]


class Broken(Exception):
    """Nothing that the library knows."""


def failure(mine: Learner, *callbacks: Any, epochs: int = 2, start: State = START) -> Any:
    """The error of a run that must fail; the state that it started from must be untouched."""
    kept = Kept(start)
    with pytest.raises(Exception) as caught:  # noqa: PT011
        fit(mine, start, epochs, callbacks)
    kept.check()
    return caught.value


def notes(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", ()))


@pytest.mark.parametrize("event", NORMAL_EVENTS)
def test_the_error_of_a_callback_is_kept_and_says_where(event: str) -> None:
    original = Broken("as it was")
    error = failure(LEARNER, on("bad", **{event: raiser(original)}))
    assert error is original
    assert error.args == ("as it was",)
    assert traceback.extract_tb(error.__traceback__)[-1].name == "act"
    assert f"callback 'bad' in {event}" in notes(error)


def test_the_note_names_phase_batch_and_epoch() -> None:
    error = failure(LEARNER, on("bad", after_loss=raise_once(Broken(), at=6)))
    assert "training batch 1 of epoch 1" in notes(error)


def test_the_note_of_a_validation_batch() -> None:
    error = failure(LEARNER, on("bad", after_loss=raise_once(Broken(), at=4)))
    assert "validation batch 1 of epoch 0" in notes(error)


def test_the_note_of_validate() -> None:
    with pytest.raises(Broken) as caught:
        validate(learner(callbacks=[on("bad", after_loss=raise_once(Broken, at=1))]), START)
    assert "callback 'bad' in after_loss, batch 1 of a validation" in notes(caught.value)


def test_a_run_of_no_epochs_is_not_called_a_validation() -> None:
    assert "validation" not in notes(
        failure(LEARNER, on("bad", before_fit=raiser(Broken)), epochs=0)
    )


@pytest.mark.parametrize("event", NORMAL_EVENTS)
def test_the_error_carries_the_last_good_state(event: str) -> None:
    """That is the last one in which every batch is whole; a run from it works."""
    before: list[State] = [START]
    for name, state in trace(LEARNER, START, 2):
        if name == event:
            break
        if name in BETWEEN_BATCHES:
            before.append(state)
    error = failure(LEARNER, on("bad", **{event: raiser(Broken)}))
    assert_same(learned(error.state), learned(before[-1]))
    assert error.state.train_iter == before[-1].train_iter
    assert fit(LEARNER, error.state, 1).train_iter == before[-1].train_iter + 3


@pytest.mark.parametrize("event", NORMAL_EVENTS)
def test_the_state_of_an_error_is_at_rest(event: str) -> None:
    assert_at_rest(failure(LEARNER, on("bad", **{event: raiser(Broken)})).state)


def test_a_bare_assert_keeps_its_kind() -> None:
    def check(state: State) -> None:
        assert state.loss is None

    error = failure(LEARNER, on(after_loss=check))
    assert type(error) is AssertionError
    assert "'spy' in after_loss" in notes(error)


def test_an_error_without_arguments_stays_without() -> None:
    assert failure(LEARNER, on(after_loss=raiser(ValueError()))).args == ()


@pytest.mark.parametrize("raised", [StopIteration, StopIteration("s")])
def test_stop_iteration_in_a_handler_is_an_error(raised: Any) -> None:
    error = failure(LEARNER, on(after_loss=raiser(raised)))
    assert type(error) is RuntimeError
    assert str(error) == "callback 'spy' raised StopIteration in after_loss."


class Failing(nn.Linear):
    """A layer whose second forward fails."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.act = raise_once(Broken("in forward"), at=1)

    def forward(self, x: Tensor) -> Tensor:
        self.act()
        return super().forward(x)


def test_an_error_in_the_model_says_so() -> None:
    mine = learner(Failing())
    error = failure(mine, start=mine.init())
    assert type(error) is Broken
    assert "raised in [predict], training batch 1 of epoch 0; xb: " in notes(error)
    assert "float32[4, 2]" in notes(error)


def test_an_error_in_the_loss_says_so() -> None:
    act = raise_once(Broken, at=1)
    error = failure(learner(loss=lambda pred, y: act() or mse_loss(pred, y)))
    assert "raised in [loss], training batch 1 of epoch 0" in notes(error)
    assert "pred: float32[4, 2]" in notes(error)


def test_an_error_in_the_optimizer_says_so() -> None:
    error = failure(LEARNER, on(before_step=lambda state: state.replace(hyper={"l": 1})))
    assert "raised in [update]" in notes(error)


@pytest.mark.parametrize("at", [0, 2])
def test_an_error_in_the_loader_says_which_batch(at: int) -> None:
    class Loader:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for index, batch in enumerate(batches(3, seed=1)):
                if index == at:
                    raise Broken
                yield batch

    error = failure(learner(data=DataLoaders(Loader())))
    assert type(error) is Broken
    assert f"while fetching data, training batch {at} of epoch 0" in notes(error)


def test_a_batch_of_the_wrong_shape_shows_the_shapes() -> None:
    error = failure(learner(data=DataLoaders([(torch.ones(4, 3), torch.ones(4, 2))])))
    assert "[predict]" in notes(error)
    assert "float32[4, 3]" in notes(error)


def test_a_target_of_the_wrong_kind_shows_the_kinds() -> None:
    data = DataLoaders([(torch.ones(4, 2), torch.ones(4, dtype=torch.float64))])
    error = failure(learner(data=data, loss=nn.functional.nll_loss))
    assert "raised in [loss]" in notes(error)
    assert "float32[4, 2]" in notes(error)
    assert "float64[4]" in notes(error)


@pytest.mark.parametrize("empty", [[], (), Batches((torch.ones(3, 2),) * 2, 4, drop_last=True)])
def test_an_empty_training_loader_is_an_error(empty: Any) -> None:
    assert "data.train is empty" in str(failure(learner(data=DataLoaders(empty))))


def test_an_empty_validation_loader_is_an_error() -> None:
    assert "data.valid is empty" in str(failure(learner(data=DataLoaders(batches(1, 1), []))))


def test_a_generator_that_is_used_up_is_an_error_in_the_second_epoch() -> None:
    error = failure(learner(data=DataLoaders(iter(batches(2, 1)))))
    assert "data.train is empty" in str(error)
    assert error.state.epochs_seen == 1


def test_a_misspelt_hyper() -> None:
    with pytest.raises(ValueError, match="reads no 'lrr'. .*'?lr'?"):
        fit(LEARNER, START, 1, lrr=0.1)


def test_a_length_of_the_run_by_another_name() -> None:
    with pytest.raises(ValueError, match="reads no 'max_steps'. 'max_steps' is called steps here"):
        fit(LEARNER, START, max_steps=10)


def test_a_misspelt_hyper_of_a_schedule() -> None:
    assert "ParamScheduler: the optimizer reads no 'momm'" in str(
        failure(LEARNER, ParamScheduler({"momm": Linear(0, 1)}))
    )


def test_a_schedule_needs_to_know_how_long_the_run_is() -> None:
    class Endless:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter(batches(2, 1))

    error = failure(learner(data=DataLoaders(Endless())), ParamScheduler({"lr": Linear(0, 1)}))
    assert "no len()" in str(error)


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        (lambda pred, y: (pred - y).square(), "shape (4, 2)"),
        (lambda pred, y: (pred - y).square().mean()[None], "shape (1,)"),
        (lambda pred, y: 1.0, "type float"),
        (lambda pred, y: None, "type NoneType"),
    ],
)
def test_a_loss_that_is_no_0d_tensor(loss: Callable[..., Any], found: str) -> None:
    error = failure(learner(loss=loss))
    assert type(error) is ValueError
    assert found in str(error)


def test_a_loss_that_depends_on_no_parameter() -> None:
    assert "does not depend on any parameter" in str(
        failure(learner(loss=lambda pred, y: mse_loss(pred.detach(), y)))
    )


def test_a_model_without_anything_to_train() -> None:
    mine = learner(linear().requires_grad_(False))
    assert "requires_grad=False" in str(failure(mine, start=mine.init()))


@pytest.mark.parametrize("epochs", [-1, 1.0, "3"])
def test_epochs_that_are_no_number_of_epochs(epochs: Any) -> None:
    with pytest.raises(ValueError, match="epochs must be a whole number"):
        fit(LEARNER, START, epochs)


@pytest.mark.parametrize("function", [validate, predict])
def test_validation_without_data(function: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="no validation data"):
        function(learner(data=loaders(valid=None)), START)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", lambda x: x),
        ("model", nn.Linear),
        ("data", batches(2, 1)),
        ("opt", sgd),
        ("opt", torch.optim.SGD([torch.zeros(1, requires_grad=True)])),
        ("loss", "mse"),
        ("metrics", ["accuracy"]),
        ("metrics", mse_loss),
        ("callbacks", Recorder()),
    ],
)
def test_a_learner_says_which_argument_is_of_the_wrong_kind(field: str, value: Any) -> None:
    arguments = {"model": linear(), "data": loaders(), "loss": mse_loss, "opt": sgd(), field: value}
    with pytest.raises(TypeError, match=f"Learner: {field}"):
        Learner(**arguments)


@pytest.mark.parametrize("tensors", [(torch.ones(3), torch.ones(4)), ()])
def test_batches_of_tensors_that_do_not_fit(tensors: Any) -> None:
    with pytest.raises(ValueError, match="equally long"):
        Batches(tensors)


def test_batches_of_no_size() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        Batches((torch.ones(3),), batch_size=0)


def test_after_an_error_the_next_run_is_as_if_nothing_had_been() -> None:
    expected = fit(LEARNER, START, 1)
    failure(LEARNER, on(after_loss=raiser(Broken)))
    assert_same_run(fit(LEARNER, START, 1), expected)
