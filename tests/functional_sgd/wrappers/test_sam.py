"""sam: where the gradient is taken, and the step from where the params were."""

from typing import Any

import optree
import pytest
import torch

from functional_sgd import adamw, compile_step, sam, sgd, value_and_grad
from tests.catalogue import random_like, sample_tree, small_tree
from tests.comparing import Untouched, assert_close, assert_same, stack

PARAMS = sample_tree(dtype=torch.float64)
GRADS = random_like(PARAMS, 0)


def length(tree: Any) -> torch.Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in optree.tree_leaves(tree)]).norm()


def test_the_perturbed_params_are_rho_away_along_the_gradient() -> None:
    moved = sam(sgd(), rho=0.3).perturb(PARAMS, GRADS)
    way = optree.tree_map(lambda new, old: new - old, moved, PARAMS)
    assert_close(length(way), torch.tensor(0.3, dtype=torch.float64), rtol=1e-10)
    expected = optree.tree_map(lambda grad: 0.3 * grad / length(GRADS), GRADS)
    assert_close(way, expected, rtol=1e-9, atol=1e-14)


def test_by_hand() -> None:
    """Gradient (3, 4) over two leaves, rho 1: (0.6, 0.8)."""
    params = {"a": torch.zeros(1), "b": torch.zeros(1)}
    moved = sam(sgd(), rho=1.0).perturb(
        params, {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    )
    assert_close(moved, {"a": torch.tensor([0.6]), "b": torch.tensor([0.8])}, rtol=1e-6)


def test_the_step_is_that_of_the_optimizer_from_the_old_params() -> None:
    compute = value_and_grad(
        lambda params: sum((leaf**4).sum() for leaf in optree.tree_leaves(params))
    )
    opt, inner, params, expected = sam(adamw(lr=0.1), rho=0.1), adamw(lr=0.1), PARAMS, PARAMS
    state, inner_state = opt.init(params), inner.init(params)
    for _ in range(3):
        _, grads = compute(params)
        _, sharp = compute(opt.perturb(params, grads))
        params, state = opt(params, sharp, state)
        expected, inner_state = inner(expected, sharp, inner_state)
    assert_same((params, state), (expected, inner_state))


def test_rho_0_is_the_optimizer() -> None:
    assert_same(sam(sgd(), rho=0.0).perturb(PARAMS, GRADS), PARAMS)


def test_leaves_without_gradient_stay_and_do_not_count() -> None:
    params = {"a": torch.zeros(1), "b": torch.ones(1)}
    moved = sam(sgd(), rho=1.0).perturb(params, {"a": torch.tensor([2.0]), "b": None})
    assert moved["b"] is params["b"]
    assert_close(moved["a"], torch.ones(1), rtol=1e-6)
    assert sam(sgd()).perturb(params, {"a": None, "b": None}) == params


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64], ids=str)
def test_dtypes_stay_and_zero_gradients_are_fine(dtype: torch.dtype) -> None:
    params = sample_tree(dtype=dtype)
    moved = sam(sgd()).perturb(params, random_like(params, 0))
    assert [leaf.dtype for leaf in optree.tree_leaves(moved)] == [dtype] * 5
    assert_same(sam(sgd()).perturb(params, optree.tree_map(torch.zeros_like, params)), params)


def test_rho_is_a_hyper() -> None:
    opt = sam(sgd(lr=1.0), rho=0.5)
    assert opt.hyper == {"lr": 1.0, "rho": 0.5}
    assert_same(
        opt.perturb(PARAMS, GRADS, opt.init(PARAMS), {"rho": 0.1, "lr": 3.0}),
        sam(sgd(), rho=0.1).perturb(PARAMS, GRADS),
    )
    assert_same(
        opt(PARAMS, GRADS, opt.init(PARAMS), {"rho": 0.1}),
        sgd(lr=1.0)(PARAMS, GRADS, opt.init(PARAMS)),
    )


def test_arguments_are_untouched() -> None:
    snapshot = Untouched(PARAMS, GRADS)
    sam(sgd()).perturb(PARAMS, GRADS)
    snapshot.check()


@pytest.mark.usefixtures("fresh_compiler")
def test_perturb_compiles_and_maps() -> None:
    opt, members = sam(sgd(), rho=0.5), [small_tree(seed) for seed in range(2)]
    fast = torch.compile(opt.perturb, fullgraph=True, backend="eager")
    assert_same(fast(PARAMS, GRADS), opt.perturb(PARAMS, GRADS))
    mapped = torch.func.vmap(opt.perturb)(stack(members), stack(members))
    assert_close(mapped, stack([opt.perturb(tree, tree) for tree in members]), rtol=1e-14)


def test_a_hyper_that_nobody_reads_is_an_error() -> None:
    with pytest.raises(ValueError, match="sam: no rule reads 'rhoo'. Did you mean 'rho'"):
        sam(sgd()).perturb(PARAMS, GRADS, sgd().init(PARAMS), {"rhoo": 1.0})


def test_a_negative_rho_is_an_error() -> None:
    with pytest.raises(ValueError, match="sam: hyper 'rho' must be at least 0, got -1"):
        sam(sgd(), rho=-1)


def test_a_compiled_step_takes_the_gradient_at_the_perturbed_params() -> None:
    """1 - 0.5 * 2**3, and the loss at 1."""
    opt, params = sam(sgd(lr=0.5), rho=1.0), torch.tensor([1.0])
    step = compile_step(lambda params: (params**4).sum() / 4, opt)
    value, params, _ = step(params, opt.init(params), None)
    assert_same((value, params), (torch.tensor(0.25), torch.tensor([-3.0])))
