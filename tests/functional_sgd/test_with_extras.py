"""Laws of the recipes that read something of the caller, such as the loss."""

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from torch import Tensor

from functional_sgd import Chain, fuse
from tests.catalogue import WITH_EXTRAS, random_like, sample_tree, small_tree
from tests.comparing import Untouched, assert_close, assert_finite, assert_same, member, stack
from tests.functional_sgd.fusion.helpers import ExactRoots, assert_near, tolerance_of
from tests.laws.test_laws import FLOATS
from tests.laws.test_transforms import smooth_loss

Tree = Any
Case = tuple[Chain, Callable[[Tree], dict[str, Any]]]


@pytest.fixture(params=WITH_EXTRAS)
def case(request: pytest.FixtureRequest) -> Case:
    make, extras = WITH_EXTRAS[request.param]
    return make(), extras


def walk(case: Case, params: Tree, steps: int = 3, run: Any = None) -> tuple[Tree, Tree]:
    """Steps with random gradients, by the chain or another executor of it."""
    opt, extras = case
    state = opt.init(params)
    for seed in range(steps):
        grads = random_like(params, seed)
        params, state = (run or opt)(params, grads, state, **extras(params))
    return params, state


def test_arguments_are_untouched_and_results_repeat(case: Case) -> None:
    opt, extras = case
    params, state = walk(case, sample_tree())
    grads, given = random_like(params, 5), extras(params)
    snapshot = Untouched(params, grads, state, given)
    first = opt(params, grads, state, **given)
    assert_same(opt(params, grads, state, **given), first)
    snapshot.check()


def test_the_caller_is_asked_for_what_it_must_give(case: Case) -> None:
    opt, extras = case
    assert set(opt.required) == set(extras(sample_tree()))
    with pytest.raises(ValueError, match=opt.required[0]):
        opt(sample_tree(), sample_tree(), opt.init(sample_tree()))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.complex64], ids=str)
def test_structure_and_dtypes_stay_and_zeros_are_finite(case: Case, dtype: torch.dtype) -> None:
    opt, extras = case
    params = sample_tree(dtype=dtype)
    zeros, first = optree.tree_map(torch.zeros_like, params), opt.init(params)
    state = first
    for grads in (zeros, zeros, random_like(params, 0), zeros, zeros):
        params, state = opt(params, grads, state, **extras(params))
        assert_finite((params, state))
    assert [leaf.dtype for leaf in optree.tree_leaves((params, state))] == [
        leaf.dtype for leaf in optree.tree_leaves((zeros, first))
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
def test_fused_is_plain(case: Case, donate: bool, dtype: torch.dtype) -> None:
    opt, extras = case
    fused = fuse(opt, donate=donate)
    before = walk(case, sample_tree(dtype=dtype), steps=2)
    grads, given = random_like(before[0], 5), extras(before[0])
    with ExactRoots():
        expected = opt(before[0], grads, before[1], **given)
        copies = optree.tree_map(torch.clone, before)
        found = fused(copies[0], grads, copies[1], **given)
    assert_near(found, expected, before, 2, **tolerance_of(opt))


def test_the_passes_are_kernels(case: Case) -> None:
    opt, _ = case
    kinds = [type(step).__name__ for step in fuse(opt).program.steps]
    assert kinds == ["Pass"] * 2


def test_vmap_over_members_is_a_loop(case: Case) -> None:
    opt, extras = case
    members = [small_tree(seed) for seed in range(3)]
    params, state = stack(members), stack([opt.init(tree) for tree in members])
    for seed in range(3):
        given = stack([extras(member(params, index)) for index in range(3)])
        params, state = torch.func.vmap(lambda p, g, s, e: opt(p, g, s, **e))(
            params, random_like(params, seed), state, given
        )
    for index, mine in enumerate(members):
        own = opt.init(mine)
        for seed in range(3):
            grads = member(random_like(stack(members), seed), index)
            mine, own = opt(mine, grads, own, **extras(mine))
        assert_close((member(params, index), member(state, index)), (mine, own), rtol=1e-13)


def test_derivatives_through_steps_match_finite_differences(case: Case) -> None:
    opt, _ = case
    spec = optree.tree_structure(small_tree())

    def path(lr: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        params = optree.tree_unflatten(spec, leaves)
        state = opt.init(params)
        for _ in range(5):
            grads, value = torch.func.grad_and_value(smooth_loss)(params)
            params, state = opt(params, grads, state, dict(lr=lr), value=value)
        return tuple(optree.tree_leaves(params))

    leaves = [leaf.requires_grad_() for leaf in optree.tree_leaves(small_tree())]
    lr = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(path, (lr, *leaves), eps=1e-6, atol=1e-6, rtol=1e-4)
