"""Laws on gradients that are zero, or are not there."""

from typing import Any

import optree
import pytest
import torch

from functional_sgd import Optimizer
from tests.catalogue import MOVES_ZEROS, OPTIMIZERS, random_like, run, sample_tree
from tests.comparing import assert_finite, assert_same, by_path_of, counters, of_params
from tests.each import for_each

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=OPTIMIZERS)
def opt(request: pytest.FixtureRequest) -> Optimizer:
    return OPTIMIZERS[request.param]()


def zeros(tree: Any) -> Any:
    return optree.tree_map(torch.zeros_like, tree)


def slots_of(state: Any, params: Any) -> dict[str, torch.Tensor]:
    """What a state keeps of these leaves, by path."""
    return {path: leaf for path, leaf in by_path_of(state).items() if of_params(path, params)}


@for_each("dtype", [*FLOATS, torch.complex64])
def test_zero_gradients_never_give_nan(opt: Optimizer, dtype: torch.dtype) -> None:
    params = sample_tree(dtype=dtype)
    state = opt.init(params)
    for _ in range(8):  # past the first rectified and the first synced step
        params, state = opt(params, zeros(params), state)
    assert_finite((params, state))


@for_each("dtype", FLOATS)
def test_zero_gradients_of_zero_params_leave_them_zero(
    opt: Optimizer, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    if request.node.callspec.params["opt"] in MOVES_ZEROS:
        pytest.skip("0 is not in the set that it keeps to")
    params = zeros(sample_tree(dtype=dtype))
    after, _ = opt(params, params, opt.init(params))
    assert_same(after, params)


@for_each("dtype", FLOATS)
def test_zero_gradients_after_others_never_give_nan(opt: Optimizer, dtype: torch.dtype) -> None:
    params, state = run(opt, sample_tree(dtype=dtype), steps=2)
    for _ in range(3):
        params, state = opt(params, zeros(params), state)
    assert_finite((params, state))


def test_a_leaf_without_gradient_is_left_alone(opt: Optimizer) -> None:
    params, state = run(opt, sample_tree(), steps=2)
    grads = random_like(params, seed=5)
    grads["conv"], grads["body"][1]["bias"] = None, None
    after, new_state = opt(params, grads, state)
    idle = {"conv": 0, "body": ({"bias": 0}, {"bias": 0})}
    for tree, before in [({"": after}, {"": params}), (new_state, state)]:
        assert_same(slots_of(tree, idle), slots_of(before, idle))


def test_leaves_with_gradient_move_as_if_the_others_were_not_there(opt: Optimizer) -> None:
    params = sample_tree()
    grads = random_like(params, seed=5)
    after, _ = opt(params, {**grads, "conv": None}, opt.init(params))
    some, some_grads = ({name: tree[name] for name in ("body", "ends")} for tree in (params, grads))
    expected, _ = opt(some, some_grads, opt.init(some))
    assert_same({name: after[name] for name in some}, expected)


def test_without_any_gradient_only_calls_are_counted(opt: Optimizer) -> None:
    params, state = run(opt, sample_tree(), steps=2)
    grads = optree.tree_map(lambda leaf: None, params)
    after, new_state = opt(params, grads, state)
    assert_same(after, params)
    assert_same(slots_of(new_state, params), slots_of(state, params))
    before, moved = counters(state), counters(opt(params, random_like(params, 5), state)[1])
    for path, count in counters(new_state).items():
        chains = path.endswith("step") or f"{path.removesuffix('calls')}step" in before
        assert_same(count, before[path] if chains else moved[path])


@for_each("where", ["first", "last"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_leaf_may_get_its_gradient_later(name: str, where: str) -> None:
    """The structure of the state is the same either way, so a leaf can be thawed."""
    opt, params = OPTIMIZERS[name](), {"first": torch.ones(2), "last": torch.ones(2)}
    after, state = opt(params, {**params, where: None}, opt.init(params))
    for _ in range(6):  # some move after a few steps only
        after, state = opt(after, params, state)
    assert_finite(after)
    assert name == "identity" or not torch.equal(after[where], params[where])
