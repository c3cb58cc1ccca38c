"""Laws for recipes that need something of the caller, draw random numbers, or round in their own
way.

They are not among the others, since without a gradient they move, since what they draw depends on
the place of a leaf, and since in half precision they are not float32 rounded once.
"""

import io
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch

from functional_sgd import Chain, fuse
from tests.catalogue import (
    DRAW_FOR_MATRICES,
    NARROW,
    RANDOM,
    WITH_EXTRAS,
    random_like,
    sample_tree,
    small_tree,
)
from tests.comparing import Untouched, assert_close, assert_finite, assert_same, member, stack
from tests.functional_sgd.fusion.helpers import ExactRoots, assert_near, tolerance_of
from tests.turns import LONG, in_turns, of_turn

Tree = Any
Extras = Callable[[Tree], dict[str, Any]]

MEMBERS = 3
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CASES: dict[str, tuple[Callable[[], Chain], Extras]] = {
    **WITH_EXTRAS,
    **{name: (make, lambda params: {}) for name, make in {**RANDOM, **NARROW}.items()},
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Chain, Extras]:
    make, extras = CASES[request.param]
    return make(), extras


def run(opt: Any, extras: Extras, params: Tree, steps: int, state: Any = None) -> Any:
    state = opt.init(params) if state is None else state
    for seed in range(steps):
        params, state = opt(params, random_like(params, seed), state, **extras(params))
    return params, state


def test_arguments_are_untouched(case: tuple[Chain, Extras]) -> None:
    """Law 1."""
    opt, extras = case
    params, state = run(opt, extras, sample_tree(), steps=2)
    given, grads = extras(params), random_like(params, 5)
    snapshot = Untouched(params, grads, state, given)
    opt(params, grads, state, **given)
    snapshot.check()


def test_same_arguments_give_the_same_results(case: tuple[Chain, Extras]) -> None:
    """Law 2."""
    assert_same(run(*case, sample_tree(), steps=3), run(*case, sample_tree(), steps=3))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.complex64], ids=str)
def test_dtypes_shapes_and_finite_at_zero(case: tuple[Chain, Extras], dtype: torch.dtype) -> None:
    """Law 3, and no NaN where all gradients and extras are zero."""
    opt, extras = case
    params = sample_tree(dtype=dtype)
    first = opt.init(params)
    state, zeros = first, optree.tree_map(torch.zeros_like, params)
    nothing = optree.tree_map(torch.zeros_like, extras(params))
    after = params
    for _ in range(3):
        after, state = opt(after, zeros, state, **nothing)
    assert_finite((after, state))
    for old, new in ((params, after), (first, state)):
        kinds = [[(leaf.dtype, leaf.shape) for leaf in optree.tree_leaves(t)] for t in (old, new)]
        assert kinds[0] == kinds[1]


@pytest.mark.parametrize(
    ("dtype", "donate"), in_turns([*FLOATS, torch.complex64], [False, True]), ids=str
)
def test_a_fused_recipe_equals_the_chain(
    case: tuple[Chain, Extras], dtype: torch.dtype, donate: bool
) -> None:
    """Law 6: bit for bit, but for the order in which numbers are added up."""
    opt, extras = case
    before = run(opt, extras, sample_tree(dtype=dtype), steps=3)
    with ExactRoots():
        expected = run(opt, extras, before[0], 1, before[1])
        own = optree.tree_map(torch.clone, before)
        found = run(fuse(opt, donate=donate), extras, own[0], 1, own[1])
    bounds = tolerance_of(opt)
    assert_near(found, expected, before, 2 if any(bounds.values()) else 0, **bounds)


def test_saved_and_restored_is_never_stopped(case: tuple[Chain, Extras]) -> None:
    """Law 7."""
    opt, extras = case
    file = io.BytesIO()
    torch.save(run(opt, extras, sample_tree(), steps=3), file)
    file.seek(0)
    restored = torch.load(file, weights_only=True)
    there = run(opt, extras, sample_tree(), steps=3)
    assert_same(
        run(opt, extras, restored[0], 3, restored[1]), run(opt, extras, there[0], 3, there[1])
    )


def test_vmap_over_members_is_a_loop_over_members(case: tuple[Chain, Extras]) -> None:
    """Law 8, with an lr for each member."""
    opt, extras = case
    members, hyper = [small_tree(seed) for seed in range(MEMBERS)], torch.tensor([0.01, 0.03, 0.1])
    params, state = stack(members), stack([opt.init(tree) for tree in members])
    grads, given = random_like(params, 5), stack([extras(tree) for tree in members])

    def step(params: Tree, grads: Tree, state: Any, lr: torch.Tensor, given: Any) -> Any:
        return opt(params, grads, state, {"lr": lr}, **given)

    found = torch.func.vmap(step)(params, grads, state, hyper.double(), given)
    for index, tree in enumerate(members):
        own = member(given, index)
        alone = step(tree, member(grads, index), opt.init(tree), hyper.double()[index], own)
        assert_close(member(found, index), alone, rtol=1e-13, atol=1e-15)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("case", of_turn(CASES, 0, 6), indirect=True)
def test_compiles_and_gives_the_numbers_of_eager(case: tuple[Chain, Extras]) -> None:
    """Law 6, for torch.compile: three seconds each, so LAWS=long tries all."""
    opt, extras = case
    params = small_tree()
    fast: Any = torch.compile(opt, fullgraph=True, backend="eager")
    state, grads = opt.init(params), random_like(params, 5)
    given = extras(params)
    assert_same(fast(params, grads, state, {}, **given), opt(params, grads, state, {}, **given))


def test_gradients_through_steps_match_finite_differences(case: tuple[Chain, Extras]) -> None:
    """Law 9, by lr and by the initial params."""
    opt, extras = case
    leaves, spec = optree.tree_flatten(small_tree())
    given = extras(small_tree())

    def steps(lr: torch.Tensor, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        params = optree.tree_unflatten(spec, leaves)
        state = opt.init(params)
        for _ in range(5):
            grads = optree.tree_map(lambda leaf: leaf - 3 + leaf.sin(), params)
            params, state = opt(params, grads, state, {"lr": lr}, **given)
        return tuple(optree.tree_leaves(params))

    lr = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(
        steps, (lr, *leaves), eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=not LONG
    )


@pytest.mark.parametrize("name", RANDOM)
def test_another_seed_draws_other_numbers(name: str) -> None:
    opt, params = RANDOM[name](), sample_tree()
    state = opt.init(params)
    one, other = (
        opt(params, params, {**state, "seed": torch.full_like(state["seed"], seed)})[0]
        for seed in (0, 1)
    )
    for leaf, another in zip(*map(optree.tree_leaves, (one, other)), strict=True):
        small = leaf.dim() < 2 or min(len(leaf), leaf[0].numel()) < 3
        if not (small and name in DRAW_FOR_MATRICES):
            assert not torch.isclose(leaf, another, rtol=0, atol=1e-6).any()


@pytest.mark.parametrize("name", WITH_EXTRAS)
def test_the_caller_is_asked_for_what_it_must_give(name: str) -> None:
    make, extras = WITH_EXTRAS[name]
    opt, params = make(), sample_tree()
    assert set(opt.required) == set(extras(params))
    with pytest.raises(ValueError, match=opt.required[0]):
        opt(params, params, opt.init(params))
