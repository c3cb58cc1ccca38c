"""What an optimizer asks of the loop: a second gradient, the loss, an average to be evaluated."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from functional_sgd import (
    Optimizer,
    adamw,
    apply,
    average_of,
    average_params,
    chain,
    elementwise,
    partition,
    sam,
    schedule_free_sgd,
    scheduled,
    sgd,
    total,
    value_and_grad,
)
from loop import DataLoaders, GradientClip, Learner, SaveModel, fit, predict, validate
from loop.callback import Callback
from loop.run.signals import CancelFit
from loop.state import State
from tests.comparing import assert_close, assert_same
from tests.loop.helpers import learner, loaders


@elementwise
def polyak_step(param, grad, *, value, square=total(lambda grad: grad.square(), over="tree")):
    return dict(param=param - 0.5 * value / square * grad)


def sam_by_hand(mine: Learner, opt: Any, epochs: int) -> dict[str, Tensor]:
    """The two gradients that everybody writes down."""
    start = mine.init()
    params, state = start.params, start.opt_state
    for _ in range(epochs):
        for x, y in mine.data.train:

            def loss_fn(params: Any, x: Any = x, y: Any = y) -> Tensor:
                return mine.loss(apply(mine.model, params, start.buffers, x)[0], y)

            _, grads = value_and_grad(loss_fn)(params)
            length = torch.stack([grad.square().sum() for grad in grads.values()]).sum().sqrt()
            there = {n: params[n] + 0.1 * grad / (length + 1e-12) for n, grad in grads.items()}
            _, grads = value_and_grad(loss_fn)(there)
            params, state = opt(params, grads, state)
    return params


@pytest.mark.parametrize("fused", [False, True])
def test_sam_takes_two_gradients(fused: bool) -> None:
    mine = learner(opt=sam(adamw(lr=0.05), rho=0.1), fused=fused)
    end = fit(mine, mine.init(), 3)
    assert_close(end.params, sam_by_hand(mine, adamw(lr=0.05), 3), rtol=1e-4, atol=1e-6)
    plain = learner(opt=adamw(lr=0.05))
    assert not torch.equal(end.params["weight"], fit(plain, plain.init(), 3).params["weight"])


def test_sam_with_rho_zero_is_the_optimizer() -> None:
    mine, plain = learner(opt=sam(sgd(lr=0.1), rho=0.0)), learner(opt=sgd(lr=0.1))
    assert_same(fit(mine, mine.init(), 2).params, fit(plain, plain.init(), 2).params)


def test_a_scheduled_rho_has_its_effect() -> None:
    opt = scheduled(sam(sgd(lr=0.1)), rho=lambda calls: 0.0 * calls)
    mine, plain = learner(opt=opt), learner(opt=sgd(lr=0.1))
    assert_same(fit(mine, mine.init(), 2).params, fit(plain, plain.init(), 2).params)


def test_sam_sees_what_callbacks_make_of_the_loss() -> None:
    class Double(Callback):
        def after_loss(self, state: State) -> State:
            return state.replace(loss=2 * state.loss)

    mine = learner(opt=sam(sgd(lr=0.05), rho=0.1))
    other = learner(opt=sam(sgd(lr=0.1), rho=0.1))
    twice = fit(mine, mine.init(), 2, [Double()])
    assert_close(twice.params, fit(other, other.init(), 2).params, rtol=1e-5, atol=1e-7)


def test_clipping_is_that_of_the_second_gradient() -> None:
    mine = learner(opt=sam(sgd(lr=1.0), rho=0.1))
    start = mine.init()
    seen: list[State] = []

    class Spy(Callback):
        def after_step(self, state: State) -> None:
            seen.append(state)

    fit(mine, start, 1, [GradientClip(0.01), Spy()])
    moved = [seen[0].params[name] - start.params[name] for name in start.params]
    length = torch.stack([one.square().sum() for one in moved]).sum().sqrt()
    assert float(length) == pytest.approx(0.01, rel=1e-3)


def test_the_second_pass_is_between_the_same_brackets() -> None:
    """Else it would not be in mixed precision, and frozen layers would be trained."""
    opened: list[str] = []

    class Look(Callback):
        @contextmanager
        def around_predict(self, state: State) -> Iterator[None]:
            opened.append("predict" if state.training else "")
            yield

        @contextmanager
        def around_loss(self, state: State) -> Iterator[None]:
            opened.append("loss" if state.training else "")
            yield

    mine = learner(opt=sam(sgd(lr=0.1)))
    fit(mine, mine.init(), 1, [Look()])
    assert opened[:8] == ["predict", "loss"] * 4


def test_buffers_and_history_count_a_batch_once() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    mine = learner(model=model, opt=sam(sgd(lr=0.1)))
    end = fit(mine, mine.init(), 1)
    assert int(end.buffers["0.num_batches_tracked"]) == 3
    assert end.train_iter == 3


def test_a_signal_in_the_second_pass_leaves_the_params_where_they_were() -> None:
    calls: list[int] = []

    class StopInSecondPass(Callback):
        def after_loss(self, state: State) -> None:
            if state.training:
                calls.append(1)
                if len(calls) == 2:
                    raise CancelFit(state)

    mine = learner(opt=sam(sgd(lr=0.1), rho=1.0))
    start = mine.init()
    assert_same(fit(mine, start, 1, [StopInSecondPass()]).params, start.params)


def test_a_compiled_fit_refuses_what_it_could_not_do() -> None:
    for opt in (sam(adamw()), chain(polyak_step)):
        mine = learner(opt=opt)
        with pytest.raises(ValueError, match="Fit without compile=True"):
            fit(mine, mine.init(), 1, compile=True)


@pytest.mark.parametrize(
    "opt", [schedule_free_sgd(lr=0.3), average_params(sgd(lr=0.3), decay=0.5)], ids=["sf", "ema"]
)
def test_the_average_is_what_is_validated_predicted_and_loaded(opt: Optimizer) -> None:
    mine = learner(opt=opt)
    end = fit(mine, mine.init(), 2)
    average = average_of(end.opt_state)
    assert not torch.equal(average["weight"], end.params["weight"])
    x, _ = next(iter(mine.data.valid))
    wanted = nn.functional.linear(x, average["weight"], average.get("bias"))
    assert_close(predict(mine, end)[: len(x)], wanted, rtol=1e-5, atol=1e-6)
    plain = learner(opt=sgd(lr=0.3))
    with_average = plain.init().replace(params=average)
    assert validate(mine, end) == pytest.approx(validate(plain, with_average))
    assert end.history.rows[-1]["valid_loss"] == pytest.approx(validate(mine, end)["valid_loss"])
    assert_same(mine.load(end).weight.data, average["weight"])


def test_the_average_is_what_is_saved(tmp_path: Path) -> None:
    mine = learner(opt=schedule_free_sgd(lr=0.3))
    path = tmp_path / "best.safetensors"
    end = fit(mine, mine.init(), 2, [SaveModel(path, at_end=True)])
    assert_same(safetensors.torch.load_file(path)["weight"], average_of(end.opt_state)["weight"])


def test_a_part_of_a_partition_may_keep_an_average() -> None:
    opt = partition(
        {"w": average_params(sgd(lr=0.3), decay=0.5), "b": sgd(lr=0.3)}, {"weight": "w", "*": "b"}
    )
    mine = learner(opt=opt)
    end = fit(mine, mine.init(), 1)
    shown = opt.evaluated(end.params, end.opt_state)
    assert_same(shown["weight"], average_of(end.opt_state["parts"]["w"])["weight"])
    assert_same(shown["bias"], end.params["bias"])


def test_polyak_trains_by_the_loss() -> None:
    mine = learner(opt=chain(polyak_step))
    end = fit(mine, mine.init(), 20)
    assert end.history.rows[-1]["train_loss"] < end.history.rows[0]["train_loss"]


class LineSearch(Optimizer):
    """Steps along the gradient that are halved until the loss is lower."""

    @property
    def hyper(self) -> dict[str, Any]:
        return {}

    @property
    def required(self) -> tuple[str, ...]:
        return ("value", "value_fn")

    def init(self, params: Any) -> dict[str, Any]:
        return {}

    def __call__(
        self, params: Any, grads: Any, state: Any, hyper: Any = None, **extras: Any
    ) -> Any:
        lr = 8.0
        while lr > 1e-6:
            there = {name: params[name] - lr * grad for name, grad in grads.items()}
            if extras["value_fn"](there) < extras["value"]:
                return there, state
            lr /= 2
        return params, state


def test_a_line_search_asks_for_the_loss_at_other_params() -> None:
    x = torch.linspace(-1, 1, 8)[:, None]
    data = DataLoaders([(x, 3 * x + 1)])
    mine = Learner(nn.Linear(1, 1), data, mse_loss, LineSearch())
    end = fit(mine, mine.init(), 40)
    assert end.params["weight"].item() == pytest.approx(3.0, abs=1e-2)


def test_a_learner_fuses_its_optimizer_unless_told_not_to() -> None:
    opt = adamw()
    mine = Learner(nn.Linear(2, 2), loaders(), mse_loss, opt)
    assert repr(mine.stepper) == f"fuse({opt!r})"
    assert mine.stepper is Learner(nn.Linear(2, 2), loaders(), mse_loss, adamw()).stepper
    assert Learner(nn.Linear(2, 2), loaders(), mse_loss, opt, fused=False).stepper is opt
