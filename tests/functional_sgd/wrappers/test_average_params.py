"""average_params: means of the parameters after each step."""

from typing import Any

import pytest
import torch

from functional_sgd import (
    accumulate,
    adamw,
    average_of,
    average_params,
    freeze,
    partition,
    scheduled,
    sgd,
    skip_nonfinite,
)
from functional_sgd.schedules import DecayWarmUp
from functional_sgd.wrappers.wrapper import towards
from tests.catalogue import random_like, sample_tree
from tests.comparing import Untouched, assert_close, assert_same

START = sample_tree(dtype=torch.float64)


def path_of(opt: Any, steps: int, start: Any = START) -> tuple[list[Any], Any]:
    """The params after each step, and the last state."""
    params, state, path = start, opt.init(start), []
    for seed in range(steps):
        params, state = opt(params, random_like(params, seed), state)
        path.append(params)
    return path, state


def leaf(tree: Any) -> torch.Tensor:
    return tree["body"][0]


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_exponential_mean_in_closed_form(decay: float, steps: int) -> None:
    """Step i of n has the share (1 - decay) * decay**(n - i) / (1 - decay**n)."""
    path, state = path_of(average_params(adamw(lr=0.1), decay), steps)
    shares = [
        (1 - decay) * decay ** (steps - number) / (1 - decay**steps)
        for number in range(1, steps + 1)
    ]
    expected = sum(share * leaf(params) for share, params in zip(shares, path, strict=True))
    assert_close(leaf(average_of(state)), expected, rtol=1e-13, atol=1e-14)


def test_decay_1_is_the_plain_mean() -> None:
    path, state = path_of(average_params(adamw(lr=0.1), 1.0), 7)
    assert_close(
        leaf(average_of(state)),
        torch.stack([leaf(params) for params in path]).mean(0),
        rtol=1e-13,
        atol=1e-14,
    )


def test_by_hand() -> None:
    """From 4 along 1 at lr 1: 3, 2. With decay 1/2: (3 * 1/2 + 2) / (1/2 + 1)."""
    opt, params = average_params(sgd(lr=1.0), decay=0.5), torch.tensor([4.0], dtype=torch.float64)
    state = opt.init(params)
    assert_same(average_of(state), params)
    for expected in (3.0, 3.5 / 1.5):
        params, state = opt(params, torch.ones_like(params), state)
        assert_close(average_of(state), torch.tensor([expected], dtype=torch.float64), rtol=1e-15)


def test_params_move_as_without_it() -> None:
    path, state = path_of(average_params(adamw(lr=0.1)), 3)
    alone, inner = path_of(adamw(lr=0.1), 3)
    assert_same((path, state["inner"]), (alone, inner))


def test_after_the_first_step_the_average_is_the_params() -> None:
    path, state = path_of(average_params(adamw(lr=0.1), decay=0.999), 1)
    assert_same(average_of(state), path[0])


def test_the_first_step_leaves_no_trace_of_where_it_came_from() -> None:
    """old + (new - old) would be 0 here."""
    opt, params = average_params(sgd(lr=1.0)), torch.tensor([1e8])
    params, state = opt(params, torch.tensor([1e8 - 8]), opt.init(params))
    assert_same((params, average_of(state)), (torch.tensor([8.0]),) * 2)
    tiny, start = torch.tensor([0.125]), torch.tensor([1e9])
    assert_same(towards(start, tiny, torch.tensor(1.0)), tiny)


def test_what_stands_still_is_its_own_average() -> None:
    """Exactly, after any number of steps."""
    opt, params = average_params(sgd(lr=0.1)), {"w": torch.tensor([0.1, 1 / 3, 1e-30])}
    state = opt.init(params)
    for _ in range(50):
        params, state = opt(params, {"w": torch.zeros(3)}, state)
    assert_same(average_of(state), params)


def test_the_plain_mean_is_that_of_torchs_averaged_model() -> None:
    model = torch.nn.Linear(3, 2).double()
    theirs = torch.optim.swa_utils.AveragedModel(model)
    opt, params = average_params(sgd(lr=0.1), decay=1.0), dict(model.named_parameters())
    params = {name: value.detach().clone() for name, value in params.items()}
    state = opt.init(params)
    for seed in range(5):
        params, state = opt(params, random_like(params, seed), state)
        model.load_state_dict(params)
        theirs.update_parameters(model)
    assert_close(
        average_of(state),
        {n: p.detach() for n, p in theirs.module.named_parameters()},
        rtol=1e-14,
        atol=1e-15,
    )


def test_averaging_from_some_step_on() -> None:
    """SWA: decay 0 for three steps, then 1: the mean of steps 3 to 6."""
    opt = scheduled(average_params(adamw(lr=0.1)), decay=lambda step: (step >= 3).double())
    path, state = path_of(opt, 6)
    expected = torch.stack([leaf(params) for params in path[2:]]).mean(0)
    assert_close(leaf(average_of(state)), expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_averaged_in_float32(dtype: torch.dtype) -> None:
    path, state = path_of(average_params(sgd(lr=0.1), 1.0), 5, sample_tree(dtype=dtype))
    expected = torch.stack([leaf(params).float() for params in path]).mean(0)
    assert_close(leaf(average_of(state)), expected, rtol=1e-6, atol=1e-6)
    assert_same(leaf(average_of(state, like=path[0])), leaf(average_of(state)).to(dtype))


def test_complex_params_are_averaged() -> None:
    path, state = path_of(average_params(sgd(lr=0.1), 0.9), 3, sample_tree(dtype=torch.complex128))
    shares = [0.1 * 0.9 ** (3 - number) / (1 - 0.9**3) for number in (1, 2, 3)]
    expected = sum(share * leaf(params) for share, params in zip(shares, path, strict=True))
    assert_close(leaf(average_of(state)), expected, rtol=1e-13, atol=1e-14)


def test_a_leaf_without_gradient_keeps_its_average() -> None:
    opt, params = average_params(sgd(lr=1.0), 0.5), {"a": torch.ones(1), "b": torch.ones(1)}
    after, state = opt(params, params, opt.init(params))
    after, state = opt(after, params, state)
    assert average_of(state)["a"].item() != after["a"].item()
    _, new = opt(after, {"a": None, "b": params["b"]}, state)
    assert_same(average_of(new)["a"], average_of(state)["a"])
    assert float(average_of(new)["b"]) != float(average_of(state)["b"])


@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_a_late_leaf_has_the_average_that_it_would_have_alone(decay: float) -> None:
    """Its first step leaves no trace of where it waited."""
    opt, start = average_params(sgd(lr=1.0), decay), {"a": torch.ones(1), "b": torch.ones(1)}
    params, state = start, opt.init(start)
    for _ in range(4):
        params, state = opt(params, {"a": None, "b": params["b"]}, state)
    alone, own = start["a"], opt.init(start["a"])
    for size in (4.0, 2.0):
        grad = torch.tensor([size])
        params, state = opt(params, {"a": grad, "b": None}, state)
        alone, own = opt(alone, grad, own)
    assert_same((params["a"], state["average"]["a"]), (alone, own["average"]))


def test_a_weight_is_kept_for_each_leaf() -> None:
    """1 + 1/2 + 1/4 for three steps, 1 for one, 0 for none."""
    params = {"a": torch.ones(1), "b": torch.ones(1), "c": torch.ones(1)}
    opt = average_params(sgd(), decay=0.5)
    state = opt.init(params)
    for there in ("a", "ab", "a"):
        grads = {name: leaf if name in there else None for name, leaf in params.items()}
        _, state = opt(params, grads, state)
    assert_same(state["weight"], torch.tensor([1.75, 1.0, 0.0], dtype=torch.float64))


def test_the_average_is_found_inside_other_wrappers() -> None:
    opt = skip_nonfinite(accumulate(average_params(sgd(lr=1.0)), every=1))
    path, state = path_of(opt, 1)
    assert_same(average_of(state), path[0])


def test_the_average_is_a_copy() -> None:
    _, state = path_of(average_params(sgd(lr=1.0)), 1)
    snapshot = Untouched(state)
    for value in (average_of(state), average_of(state, like=START)):
        leaf(value).zero_()
    snapshot.check()


def test_frozen_leaves_have_no_average_inside_freeze() -> None:
    params = {"a": torch.ones(1), "b": torch.ones(1)}
    state = freeze(average_params(sgd()), "a").init(params)
    assert average_of(state["parts"]["trained"]).keys() == {"b"}


def test_a_state_without_average_is_an_error() -> None:
    with pytest.raises(
        ValueError, match="average_of: the state has no 'average'; it has step, grad_avg, sqr_avg"
    ):
        average_of(adamw().init(START))


def test_the_average_of_a_partition_is_in_its_parts() -> None:
    params = {"a": torch.ones(1), "b": torch.ones(1)}
    state = partition({"x": average_params(sgd()), "y": sgd()}, {"a": "x", "b": "y"}).init(params)
    with pytest.raises(
        ValueError,
        match="state is that of a partition, .*average_of\\(state\\['parts'\\].* of 'x', 'y'",
    ):
        average_of(state)
    assert average_of(state["parts"]["x"]).keys() == {"a"}


@pytest.mark.parametrize("decay", [-0.1, 1.1])
def test_a_decay_outside_of_0_to_1_is_an_error(decay: float) -> None:
    with pytest.raises(ValueError, match="hyper 'decay' must be in \\[0, 1\\]"):
        average_params(sgd(), decay)


def test_two_averages_are_an_error() -> None:
    with pytest.raises(ValueError, match="average_params: has a hyper 'decay', and so has"):
        average_params(average_params(sgd()))


def test_repr() -> None:
    assert (
        repr(average_params(sgd(lr=0.1), decay=0.9))
        == "average_params(chain(sgd_step, lr=0.1), decay=0.9)"
    )


@pytest.mark.parametrize("steps", range(9))
def test_swa_is_the_mean_of_every_second_step_after_the_third(steps: int) -> None:
    """torch's AveragedModel, told of these steps; before, the params themselves."""
    opt = average_params(adamw(lr=0.1), decay=1.0, start=3, every=2)
    path, state = path_of(opt, steps)
    counted = [leaf(params) for number, params in enumerate(path, 1) if number in (5, 7)]
    expected = torch.stack(counted).mean(0) if counted else leaf([START, *path][-1])
    assert_close(leaf(average_of(state)), expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("decay", "every"), [(1.0, 1), (1.0, 3), (0.9, 1), (0.9, 2)])
def test_the_numbers_of_torchs_averaged_model(decay: float, every: int) -> None:
    swa = torch.optim.swa_utils
    module = torch.nn.Linear(3, 2).double()
    average = None if decay == 1.0 else swa.get_ema_multi_avg_fn(decay)
    theirs = swa.AveragedModel(module, multi_avg_fn=average)
    opt = average_params(sgd(lr=0.1), decay, every=every, debias=decay == 1.0)
    params = {name: leaf.detach().clone() for name, leaf in module.named_parameters()}
    state = opt.init(params)
    for number in range(1, 13):
        params, state = opt(params, random_like(params, number), state)
        if number % every == 0:
            module.load_state_dict(params)
            theirs.update_parameters(module)
    expected = {name: leaf.detach() for name, leaf in theirs.module.named_parameters()}
    assert_close(average_of(state), expected, rtol=0, atol=1e-12)


def test_a_decay_that_warms_up() -> None:
    """TensorFlow's: the n-th step has decay min(0.5, n / (9 + n)), after the first is copied."""
    warm = DecayWarmUp(0.5)
    opt = scheduled(average_params(adamw(lr=0.1), debias=False), decay=warm)
    path, state = path_of(opt, 15)
    expected = leaf(path[0])
    for number, params in enumerate(path[1:], 2):
        decay = min(0.5, number / (9 + number))
        expected = decay * expected + (1 - decay) * leaf(params)
    assert_close(leaf(average_of(state)), expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("numbers", [dict(start=-1), dict(every=0)])
def test_wrong_places_to_average_are_errors(numbers: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="start must be at least 0 and every at least 1, got"):
        average_params(sgd(), **numbers)  # type: ignore[arg-type]


def test_repr_with_options() -> None:
    opt = average_params(sgd(lr=0.1), 1.0, start=5, every=2, debias=False)
    inner = "average_params(chain(sgd_step, lr=0.1), decay=1.0, "
    assert repr(opt) == inner + "start=5, every=2, debias=False)"
