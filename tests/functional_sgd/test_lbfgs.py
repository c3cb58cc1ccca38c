"""lbfgs: torch.optim.LBFGS's numbers, purity, saving, and a run of the loop."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from functional_sgd import fuse, lbfgs, value_and_grad
from functional_sgd.lbfgs import Point, strong_wolfe
from loop import Batches, DataLoaders, Learner, fit
from tests.comparing import Untouched, assert_close, assert_same

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(30, 4, generator=GENERATOR, dtype=torch.float64)
Y = torch.randn(30, 2, generator=GENERATOR, dtype=torch.float64)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def rosenbrock(params: list[Tensor]) -> Tensor:
    x = torch.cat([leaf.reshape(-1) for leaf in params])
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def regression(params: list[Tensor]) -> Tensor:
    weight, bias, scale = params
    return ((scale * (X @ weight).tanh() + bias - Y) ** 2).mean()


Loss = Callable[[Any], Tensor]
CASES: dict[str, tuple[Loss, list[Tensor]]] = {
    "rosenbrock": (rosenbrock, [torch.tensor([-1.2, 1.0], dtype=torch.float64)]),
    "rosenbrock of 6": (rosenbrock, [drawn(2, 2), drawn(), drawn(1)]),
    "regression": (regression, [drawn(4, 2), drawn(2), drawn()]),
}


def theirs(loss: Loss, start: list[Tensor], steps: int, **options: Any) -> list[list[Tensor]]:
    leaves = [leaf.clone().requires_grad_() for leaf in start]
    opt = torch.optim.LBFGS(leaves, **options)
    path = []

    def closure() -> Tensor:
        opt.zero_grad()
        value = loss(leaves)
        value.backward()
        return value

    for _ in range(steps):
        opt.step(closure)
        path.append([leaf.detach().clone() for leaf in leaves])
    return path


def ours(opt: Any, loss: Loss, params: Any, steps: int, **extras: Any) -> list[Any]:
    state, path = opt.init(params), []
    for _ in range(steps):
        _, grads = value_and_grad(loss)(params)
        params, state = opt(params, grads, state, **extras)
        path.append(params)
    return path


@pytest.mark.parametrize("history", [3, 100])
@pytest.mark.parametrize("name", CASES)
def test_torchs_numbers_with_a_search(name: str, history: int) -> None:
    loss, start = CASES[name]
    expected = theirs(
        loss,
        start,
        20,
        max_iter=1,
        max_eval=26,  # the first, and 25 in the search
        history_size=history,
        line_search_fn="strong_wolfe",
    )
    found = ours(lbfgs(history=history), loss, start, 20, value_fn=loss)
    assert_close(found, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_torchs_numbers_without_a_search(name: str) -> None:
    loss, start = CASES[name]
    expected = theirs(loss, start, 20, lr=0.1, max_iter=1, history_size=5)
    opt = lbfgs(lr=0.1, history=5, line_search=False)
    found = ours(opt, loss, start, 20)
    assert_close(found, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_are_one_of_torchs(name: str) -> None:
    loss, start = CASES[name]
    options: dict[str, Any] = dict(max_iter=20, max_eval=10_000, line_search_fn="strong_wolfe")
    (expected,) = theirs(loss, start, 1, tolerance_change=0.0, **options)
    found = ours(lbfgs(history=100), loss, start, 20, value_fn=loss)[-1]
    assert_close(found, expected, rtol=0, atol=1e-8)


def test_a_minimum_stays() -> None:
    start = [torch.ones(3, dtype=torch.float64)]
    assert_same(ours(lbfgs(), rosenbrock, start, 2, value_fn=rosenbrock), [start, start])


def test_the_loss_may_be_given_to_save_an_evaluation() -> None:
    loss, params = CASES["regression"]
    opt, calls = lbfgs(), []

    def counting(there: Any) -> Tensor:
        calls.append(there)
        return loss(there)

    value, grads = value_and_grad(loss)(params)
    with_value = opt(params, grads, opt.init(params), value=value, value_fn=counting)
    first = len(calls)
    without = opt(params, grads, opt.init(params), value_fn=counting)
    assert_same(with_value, without)
    assert len(calls) - first == first + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128], ids=str)
def test_it_is_pure_and_keeps_dtypes(dtype: torch.dtype) -> None:
    params = {"a": torch.ones(2, 2, dtype=dtype), "b": torch.full((), 2.0, dtype=dtype)}

    def loss(tree: Any) -> Tensor:
        return sum((leaf - 0.5).abs().square().sum() for leaf in tree.values())  # type: ignore[return-value]

    opt = lbfgs(history=2)
    state = opt.init(params)
    kinds = {name: (value.dtype, value.shape) for name, value in state.items()}
    for _ in range(4):
        _, grads = value_and_grad(loss)(params)
        snapshot = Untouched(params, grads, state)
        params, state = opt(params, grads, state, value_fn=loss)
        snapshot.check()
    assert {name: (value.dtype, value.shape) for name, value in state.items()} == kinds
    assert all(leaf.dtype == dtype for leaf in params.values())
    half = {name: torch.full_like(leaf, 0.5) for name, leaf in params.items()}
    assert_close(params, half, rtol=0, atol=1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_a_leaf_without_gradient_stays() -> None:
    def loss(tree: Any) -> Tensor:
        return rosenbrock([tree["x"]]) + 0 * tree["idle"].sum()

    params = {"idle": torch.ones(2, dtype=torch.float64), "x": CASES["rosenbrock"][1][0]}
    opt = lbfgs()
    state, start = opt.init(params), params
    for _ in range(3):
        _, grads = value_and_grad(loss)(params)
        params, state = opt(params, {**grads, "idle": None}, state, value_fn=loss)
    assert_same(params["idle"], start["idle"])
    alone = ours(opt, rosenbrock, CASES["rosenbrock"][1], 3, value_fn=rosenbrock)
    assert_close(params["x"], alone[-1][0], rtol=1e-12)


def test_no_gradients_or_no_params() -> None:
    opt = lbfgs()
    params = [torch.ones(1)]
    after, state = opt(params, [None], opt.init(params), value_fn=rosenbrock)
    assert_same(after, params)
    assert int(state["calls"]) == 1
    assert opt([], [], opt.init([]), value_fn=rosenbrock)[0] == []


def test_more_params_begin_again() -> None:
    opt, params = lbfgs(history=2), {"a": torch.ones(2)}
    state = opt.init(params)
    assert opt.extend(state, params, params) is state
    more = {**params, "b": torch.ones(3)}
    assert_same(opt.extend(state, params, more), opt.init(more))


def test_a_search_narrows_a_bracket() -> None:
    """Along t**4 / 4 - t the lowest point is at 1; from 10 on, it must come back."""

    def evaluate(at: float) -> Point:
        return Point(at, at**4 / 4 - at, at**3 - 1, torch.zeros(1))

    found = strong_wolfe(evaluate, evaluate(0.0), 10.0, 25, 1e-9)
    assert abs(found.slope) <= 0.9
    assert found.value < 0


def test_a_search_ends_after_its_evaluations() -> None:
    """Along -t there is no lowest point."""
    calls = []

    def evaluate(at: float) -> Point:
        calls.append(at)
        return Point(at, -at, -1.0, torch.zeros(1))

    found = strong_wolfe(evaluate, Point(0.0, 0.0, -1.0, torch.zeros(1)), 1.0, 3, 1e-9)
    assert len(calls) == 4
    assert found.at == calls[-1]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: lbfgs(history=0), "lbfgs: history must be at least 1, got 0"),
        (lambda: lbfgs(max_evals=0), "lbfgs: max_evals must be at least 1, got 0"),
        (lambda: lbfgs(lr=-1.0), "lbfgs: hyper 'lr' must be at least 0, got -1.0"),
        (lambda: ours(lbfgs(), rosenbrock, [X], 1), "lbfgs: needs the loss as a function of the"),
        (lambda: ours(lbfgs(), rosenbrock, [X], 1, mom=0.9), "lbfgs: no rule reads 'mom'"),
        (lambda: lbfgs()([X], [X], {}, value_fn=rosenbrock), "lbfgs: state has no 'calls'"),
    ],
)
def test_what_does_not_fit_is_an_error(act: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act()


def test_it_is_a_value() -> None:
    assert lbfgs(lr=0.5) == lbfgs(lr=0.5) != lbfgs()
    assert eval(repr(lbfgs()), {"LBFGS": type(lbfgs())}) == lbfgs()
    assert not lbfgs().traceable
    assert fuse(lbfgs()).names == lbfgs().names == {"lr", "value", "value_fn"}
    assert lbfgs(line_search=False).names == {"lr"}


def test_fit_passes_the_loss() -> None:
    """Full batches: five steps of least squares in two dimensions are the exact solution."""
    x, weight = X[:, :2], torch.tensor([[2.0], [-1.0]], dtype=torch.float64)
    data = DataLoaders(Batches((x, x @ weight), 30))
    model = nn.Linear(2, 1, bias=False).double()
    learner = Learner(model, data, nn.functional.mse_loss, lbfgs())
    end = fit(learner, learner.init(seed=0), epochs=6)
    assert_close(end.params["weight"], weight.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("start", [3.0, 300.0])
def test_a_search_comes_back_from_where_the_loss_is_nan(start: float) -> None:
    """3 x - log x, which is NaN below 0, is lowest at 1/3."""

    def loss(x: Tensor) -> Tensor:
        return 3 * x - x.log()

    opt, x = lbfgs(), torch.tensor(start, dtype=torch.float64)
    state = opt.init(x)
    for _ in range(15):
        value, grads = value_and_grad(loss)(x)
        x, state = opt(x, grads, state, value=value, value_fn=loss)
    assert x.item() == pytest.approx(1 / 3, abs=1e-6)
