"""fuse(opt, donate="grads"): the same bits, and new params in the memory of gradients that nobody
else has.
"""

import pickle
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from torch import Tensor

import functional_sgd as fs
from functional_sgd import Chain, chain, fuse, leafwise
from functional_sgd.fusion import fused, spent
from functional_sgd.fusion.backends.foreach import ForeachBackend
from functional_sgd.fusion.buffers import LARGE
from tests.catalogue import NARROW, RECIPES
from tests.comparing import Untouched, assert_same, copy_of
from tests.functional_sgd.fusion.helpers import draw, grads_for, memory_of, odd_tree, plain_tree
from tests.functional_sgd.user_rules import add_last
from tests.turns import of_turn

EVERYONE = [fused.BACKENDS, (ForeachBackend(),)]


@leafwise(seen=torch.zeros_like)
def look_back(param: Tensor, grad: Tensor, seen: Tensor) -> dict[str, Tensor]:
    """Reads the gradient when the step is done."""
    return dict(seen=grad + 0 * param)


def own_grads(params: Any, seed: int) -> Any:
    """Gradients in memory of their own, but for odd ones."""
    return optree.tree_map(
        lambda grad: None if grad is None else grad.clone(),
        grads_for(params, seed),
        none_is_leaf=True,
    )


@pytest.mark.parametrize("name", of_turn(RECIPES, 1, 2))
def test_the_bits_are_those_of_a_pure_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spent, "LARGE", 1)
    opt, params = RECIPES[name](), odd_tree(torch.float32)
    check_bits(opt, params, own_grads)


@pytest.mark.parametrize("name", NARROW)
def test_in_bfloat16_too(name: str) -> None:
    check_bits(NARROW[name](), plain_tree(torch.bfloat16), own_grads)


@pytest.mark.parametrize("name", ["adamw", "lamb", "clip_norm_adam"])
@pytest.mark.parametrize("backends", EVERYONE, ids=["own", "foreach"])
def test_with_large_leaves(name: str, backends: Any) -> None:
    opt = RECIPES[name]()
    params = {"w": draw((300, 400), torch.float32, 1), "b": draw((400,), torch.float32, 2)}
    check_bits(opt, params, own_grads, backends)


def check_bits(
    opt: Chain, params: Any, grads_of: Callable[[Any, int], Any], backends: Any = fused.BACKENDS
) -> None:
    """Four steps, from the results of each; arguments other than gradients stay as they were."""
    pure, sparing = fuse(opt, backends=backends), fuse(opt, donate="grads", backends=backends)
    state = opt.init(params)
    for number in range(4):
        before = Untouched(params, state)
        expected = pure(params, grads_of(params, number), state)
        found = sparing(params, grads_of(params, number), state)
        assert_same(found, expected)
        before.check()
        params, state = found


@pytest.mark.parametrize("backends", EVERYONE, ids=["own", "foreach"])
@pytest.mark.parametrize("name", ["adamw", "lamb", "clip_norm_adam"])
def test_large_params_take_the_memory_of_their_gradients(name: str, backends: Any) -> None:
    opt = fuse(RECIPES[name](), donate="grads", backends=backends)
    params = {"w": draw((LARGE,), torch.float32, 1), "b": draw((LARGE - 1,), torch.float32, 2)}
    grads = own_grads(params, 1)
    places = {name: grad.data_ptr() for name, grad in grads.items()}
    new, _ = opt(params, grads, opt.init(params))
    assert new["w"].data_ptr() == places["w"]
    assert new["b"].data_ptr() != places["b"]


def two_of_one(params: Any) -> Any:
    one = draw((LARGE,), torch.float32, 1)
    return {"a": one, "b": one}, one


def test_a_gradient_of_leaves_of_two_kinds_stays() -> None:
    """They are in two groups, of which the first would overwrite what the second reads."""
    one = draw((LARGE,), torch.float32, 1)
    params = {"a": draw((LARGE,), torch.float32, 2), "b": draw((LARGE,), torch.float64, 3)}
    opt = fs.sgd(lr=0.1)
    expected = opt(params, {"a": one, "b": one}, opt.init(params))
    found = fuse(opt, donate="grads")(params, {"a": one, "b": one}, opt.init(params))
    torch.testing.assert_close(found, expected)


def held_by_a_view(params: Any) -> Any:
    one = draw((LARGE,), torch.float32, 1)
    return {"a": one, "b": one.clone()}, one[:3]


def held_by_its_storage(params: Any) -> Any:
    one = draw((LARGE,), torch.float32, 1)
    storages.append(one.untyped_storage())
    return {"a": one, "b": one.clone()}, torch.empty(0).set_(storages[-1])


storages: list[torch.UntypedStorage] = []


def part_of_another(params: Any) -> Any:
    both = draw((2 * LARGE,), torch.float32, 1)
    return {"a": both[:LARGE], "b": both[LARGE:]}, both


def spread(params: Any) -> Any:
    one = draw((1,), torch.float32, 1)
    return {"a": one.expand(LARGE), "b": one.expand(LARGE)}, one


def strided(params: Any) -> Any:
    both = draw((2 * LARGE,), torch.float32, 1)
    return {"a": both[::2], "b": both[1::2]}, both


def same_as_param(params: Any) -> Any:
    return {"a": params["b"], "b": params["a"]}, params


@pytest.mark.parametrize(
    "grads_of",
    [
        two_of_one,
        held_by_a_view,
        held_by_its_storage,
        part_of_another,
        spread,
        strided,
        same_as_param,
    ],
)
def test_memory_that_somebody_else_has_stays(grads_of: Callable[[Any], Any]) -> None:
    opt = fs.adamw(lr=0.1)
    params = {"a": draw((LARGE,), torch.float32, 2), "b": draw((LARGE,), torch.float32, 3)}
    grads, others = grads_of(params)
    before = copy_of(others)  # no views, which would be others that have the memory
    state = opt.init(params)
    expected = copy_of(fuse(opt)(params, grads, state))
    found = fuse(opt, donate="grads")(params, grads, state)
    assert_same(found, expected)
    assert_same(others, before)


@pytest.mark.parametrize(
    "opt",
    [
        chain(fs.sgd_step, look_back, lr=0.1),
        chain(add_last, fs.sgd_step, lr=0.1),
        fs.accumulate(fs.adamw(), every=1),
        fs.average_params(fs.sgd(lr=0.1), decay=0.5),
    ],
    ids=["read later", "kept as a slot", "wrapped", "averaged"],
)
def test_gradients_that_are_needed_are_left_alone(opt: Any) -> None:
    params = {"a": draw((LARGE,), torch.float32, 2)}
    pure, sparing, state = fuse(opt), fuse(opt, donate="grads"), opt.init(params)
    for number in range(3):
        grads = own_grads(params, number)
        expected = pure(params, grads, state)
        places = memory_of(grads)
        found = sparing(params, grads, state)
        assert_same(found, expected)
        if not isinstance(opt, Chain) or look_back in opt.rules:
            assert not memory_of(found) & places
        params, state = found


def test_a_copy_spends_as_well_and_says_so() -> None:
    opt = fuse(fs.sgd(lr=0.1), donate="grads")
    again = pickle.loads(pickle.dumps(opt))
    assert repr(again) == repr(opt) == f"fuse({fs.sgd(lr=0.1)!r}, donate='grads')"
    assert not opt.donates
    params = {"a": draw((LARGE,), torch.float32, 2)}
    grads = own_grads(params, 1)
    assert again(params, grads, again.init(params))[0]["a"].data_ptr() == grads["a"].data_ptr()


def test_another_word_is_an_error() -> None:
    with pytest.raises(ValueError, match="fuse: donate must be True, False or 'grads', got 'all'"):
        fuse(fs.sgd(), donate="all")  # type: ignore[call-overload]
