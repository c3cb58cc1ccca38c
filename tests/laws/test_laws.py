"""The laws that every optimizer in the catalogue keeps: purity, shapes, composition, restoring."""

import io
from typing import Any

import optree
import pytest
import torch

from functional_sgd import Chain, Optimizer, chain, identity, rename, sync_slow_params, weight_decay
from tests.catalogue import OPTIMIZERS, RECIPES, SEPARABLE_RECIPES, random_like, run, sample_tree
from tests.comparing import Untouched, assert_close, assert_same, by_path_of, counters, of_params
from tests.each import for_each

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=OPTIMIZERS)
def opt(request: pytest.FixtureRequest) -> Optimizer:
    return OPTIMIZERS[request.param]()


def as_tensors(hyper: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in hyper.items()}


def test_arguments_are_untouched(opt: Optimizer) -> None:
    """Law 1: params, grads, state and hyper keep their bits and their versions."""
    params, state = run(opt, sample_tree(), steps=2)
    grads, hyper = random_like(params, seed=5), as_tensors(opt.hyper)
    snapshot = Untouched(params, grads, state, hyper)
    opt(params, grads, state, hyper)
    snapshot.check()


def test_init_leaves_params_untouched(opt: Optimizer) -> None:
    """Law 1, for init."""
    params = sample_tree()
    snapshot = Untouched(params)
    opt.init(params)
    snapshot.check()


def test_same_arguments_give_the_same_results(opt: Optimizer) -> None:
    """Law 2."""
    params, state = run(opt, sample_tree(), steps=2)
    grads = random_like(params, seed=5)
    assert_same(opt(params, grads, state), opt(params, grads, state))


def test_recipes_made_twice_are_the_same_optimizer(name: str) -> None:
    """Law 2, for the optimizer: it keeps nothing outside of the state."""
    opt, twin = OPTIMIZERS[name](), OPTIMIZERS[name]()
    params, state = run(opt, sample_tree(), steps=2)
    assert_same(run(twin, params, 2, state, start=2), run(opt, params, 2, state, start=2))


@for_each("dtype", [*FLOATS, torch.complex64])
def test_params_keep_structure_dtype_and_shape(opt: Optimizer, dtype: torch.dtype) -> None:
    """Law 3, for params."""
    params = sample_tree(dtype=dtype)
    after, _ = run(opt, params, steps=3)
    assert optree.tree_structure(after) == optree.tree_structure(params)
    assert _kinds(after) == _kinds(params)


@for_each("dtype", [*FLOATS, torch.complex64])
def test_state_keeps_structure_dtype_and_shape(opt: Optimizer, dtype: torch.dtype) -> None:
    """Law 3, for the state."""
    params = sample_tree(dtype=dtype)
    before = opt.init(params)
    _, after = run(opt, params, steps=3)
    assert list(before) == list(after)
    assert optree.tree_structure(after) == optree.tree_structure(before)
    assert _kinds(after) == _kinds(before)


@for_each("dtype", [torch.bfloat16, torch.float16])
def test_slots_of_half_precision_params_are_float32(opt: Optimizer, dtype: torch.dtype) -> None:
    _, state = run(opt, sample_tree(dtype=dtype), steps=1)
    slots = [leaf for path, leaf in by_path_of(state).items() if of_params(path, sample_tree())]
    assert {leaf.dtype for leaf in slots} <= {torch.float32}


@for_each("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name",
    [
        name
        for name in OPTIMIZERS
        if name != "galore" and "average_params(" not in repr(OPTIMIZERS[name]())
    ],
)
def test_half_precision_is_float32_rounded_once(name: str, dtype: torch.dtype) -> None:
    """All but averages of params, which are averages of what has been rounded, and rules after a
    wrapper, which see what it has rounded.
    """
    opt = OPTIMIZERS[name]()
    params = sample_tree(dtype=dtype)
    grads, wide = random_like(params, seed=5), _to(params, torch.float32)
    after, state = opt(params, grads, opt.init(params))
    expected, expected_state = opt(wide, _to(grads, torch.float32), opt.init(wide))
    assert_same(after, _to(expected, dtype))
    assert_same(state, expected_state)


def test_state_does_not_depend_on_hyper_values(opt: Optimizer) -> None:
    params = sample_tree()
    _, state = run(opt, params, 1, **dict.fromkeys(opt.hyper, torch.tensor(0.25)))
    assert _kinds(state) == _kinds(opt.init(params))


def test_defaults_may_be_passed(opt: Optimizer) -> None:
    """What `hyper` shows is what is used."""
    params, state = run(opt, sample_tree(), steps=2)
    grads = random_like(params, seed=5)
    assert_same(opt(params, grads, state, opt.hyper), opt(params, grads, state))


def test_the_counter_counts_from_zero(opt: Optimizer) -> None:
    params = sample_tree()
    assert not any(count.any() for count in counters(opt.init(params)).values())
    after = run(opt, params, steps=3)[1]
    own = after["step"] if "step" in after else after["calls"]
    assert_same(own, torch.full_like(own, 3))


@pytest.mark.parametrize("opt", [make() for make in RECIPES.values()], ids=[*RECIPES])
def test_chain_is_associative(opt: Chain) -> None:
    """Law 4: equal as values, equal hashes, equal text."""
    first = chain(rename(weight_decay, wd="first_wd"), first_wd=0.25)
    last = chain(
        rename(sync_slow_params, slow_param="slowest", slow_step="last_step"), last_step=0.125
    )
    left, right, flat = (
        chain(chain(first, opt), last),
        chain(first, chain(opt, last)),
        chain(first, opt, last),
    )
    assert left == right == flat
    assert hash(left) == hash(right) == hash(flat)
    assert repr(left) == repr(right) == repr(flat)
    assert flat.rules == (*first.rules, *opt.rules, *last.rules)


@pytest.mark.parametrize("opt", [make() for make in RECIPES.values()], ids=[*RECIPES])
def test_identity_is_neutral(opt: Chain) -> None:
    """Law 4: equal as values, equal hashes, equal text."""
    for other in (chain(identity(), opt), chain(opt, identity()), chain(opt)):
        assert other == opt
        assert hash(other) == hash(opt)
        assert repr(other) == repr(opt)


@pytest.mark.parametrize("name", SEPARABLE_RECIPES)
def test_leaves_do_not_matter_to_each_other(name: str) -> None:
    """Law 5, for leafwise rules: each leaf alone goes where it goes among others."""
    opt, params = RECIPES[name](), sample_tree(dtype=torch.float64)
    grads = random_like(params, seed=5)
    together, _ = opt(params, grads, opt.init(params))
    alone = [opt(leaf, grad, opt.init(leaf))[0] for leaf, grad in _pairs(params, grads)]
    assert_same(optree.tree_leaves(together), alone)


def test_permuted_leaves_give_a_permuted_result(opt: Optimizer) -> None:
    """B11: every parameter has its own averages."""
    params = dict(zip("abcde", optree.tree_leaves(sample_tree(dtype=torch.float64)), strict=True))
    grads = random_like(params, seed=5)
    turn = dict(zip("abcde", "eabcd", strict=True))
    turned, turned_grads = (
        {turn[name]: leaf for name, leaf in tree.items()} for tree in (params, grads)
    )
    after, state = opt(params, grads, opt.init(params))
    turned_after, turned_state = opt(turned, turned_grads, opt.init(turned))
    assert_close({turn[name]: leaf for name, leaf in after.items()}, turned_after, rtol=1e-14)
    turned_leaves = by_path_of(turned_state)
    for path, leaf in by_path_of(state).items():
        *above, last = path.split(".")
        assert_close(turned_leaves[".".join([*above, turn.get(last, last)])], leaf, rtol=1e-14)


@for_each("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_saved_and_restored_is_never_stopped(name: str, dtype: torch.dtype) -> None:
    """Law 7: save, load with weights_only, build the optimizer anew, go on: the same bits."""
    params, opt = sample_tree(dtype=dtype), OPTIMIZERS[name]()
    never_stopped = run(opt, params, steps=8)
    file = io.BytesIO()
    torch.save(run(opt, params, steps=4), file)
    file.seek(0)
    restored, state = torch.load(file, weights_only=True)
    assert_same(run(OPTIMIZERS[name](), restored, 4, state, start=4), never_stopped)


@pytest.fixture(params=OPTIMIZERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_state_never_aliases_params_or_grads(opt: Optimizer) -> None:
    params = sample_tree()
    state = opt.init(params)
    assert not _storages(state) & _storages(params)
    for seed in range(3):  # some rules do something only every few steps
        grads = random_like(params, seed)
        after, state = opt(params, grads, state)
        assert not _storages(state) & (_storages(params) | _storages(after) | _storages(grads))
        params = after


def test_leaves_of_new_params_share_no_memory_with_each_other(opt: Optimizer) -> None:
    after, state = run(opt, sample_tree(), steps=2)
    leaves = [*optree.tree_leaves(after), *optree.tree_leaves(state)]
    assert len(_storages([after, state])) == len(leaves)


@for_each("params", [{}, [], (), {"a": {}, "b": []}])
def test_empty_trees_are_fine(opt: Optimizer, params: Any) -> None:
    after, state = opt(params, params, opt.init(params))
    assert after == params
    own = state["step"] if "step" in state else state["calls"]
    assert_same(own, torch.ones_like(own))


@for_each("shape", [(0,), (0, 3), (3, 0)])
def test_empty_leaves_are_fine(opt: Optimizer, shape: tuple[int, ...]) -> None:
    params = {"empty": torch.zeros(shape), "full": torch.ones(2)}
    after, _ = run(opt, params, steps=3)
    assert after["empty"].shape == shape
    assert torch.isfinite(after["full"]).all()


def test_an_empty_leaf_changes_nothing_for_the_others(opt: Optimizer) -> None:
    full = {"full": sample_tree()["body"][0]}
    grads = random_like(full, seed=5)
    both = {**full, "empty": torch.zeros(0)}
    after, _ = opt(both, {**grads, "empty": torch.zeros(0)}, opt.init(both))
    assert_same(after["full"], opt(full, grads, opt.init(full))[0]["full"])


def _kinds(tree: Any) -> list[tuple[torch.dtype, torch.device, torch.Size]]:
    return [(leaf.dtype, leaf.device, leaf.shape) for leaf in optree.tree_leaves(tree)]


def _to(tree: Any, dtype: torch.dtype) -> Any:
    return optree.tree_map(lambda leaf: leaf.to(dtype), tree)


def _pairs(params: Any, grads: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(optree.tree_leaves(params), optree.tree_leaves(grads), strict=True))


def _storages(tree: Any) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in optree.tree_leaves(tree)}
