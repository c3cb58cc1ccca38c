"""Laws on vmap, torch.compile and differentiation through steps."""

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from torch import Tensor

from functional_sgd import Optimizer
from tests.catalogue import OPTIMIZERS, RANDOM, RECIPES, WITH_EXTRAS, random_like, run, small_tree
from tests.comparing import assert_close, assert_finite, assert_same, member, stack
from tests.each import for_each
from tests.turns import LONG, of_turn

MEMBERS = 3

EVERY = {**OPTIMIZERS, **RANDOM, **{name: make for name, (make, _) in WITH_EXTRAS.items()}}


@pytest.fixture(params=OPTIMIZERS)
def opt(request: pytest.FixtureRequest) -> Optimizer:
    return OPTIMIZERS[request.param]()


def hypers_of(opt: Optimizer) -> dict[str, Tensor]:
    """For each member of an ensemble its own lr, and its own weight decay where there is one."""
    hyper = {"lr": torch.tensor([0.01, 0.03, 0.1]), "wd": torch.tensor([0.0, 0.1, 0.3])}
    return {name: value.double() for name, value in hyper.items() if name in opt.hyper}


def test_vmap_over_members_is_a_loop_over_members(opt: Optimizer) -> None:
    """Law 8, with an lr for each member."""
    members, hyper = [small_tree(seed) for seed in range(MEMBERS)], hypers_of(opt)
    params, state = stack(members), stack([opt.init(tree) for tree in members])
    for seed in range(3):
        grads = random_like(params, seed)
        params, state = torch.func.vmap(opt)(params, grads, state, hyper)
    for index, tree in enumerate(members):
        mine, own_state = tree, opt.init(tree)
        for seed in range(3):
            grads = member(random_like(stack(members), seed), index)
            mine, own_state = opt(mine, grads, own_state, member(hyper, index))
        assert_close(
            (member(params, index), member(state, index)), (mine, own_state), rtol=1e-13, atol=1e-15
        )


@pytest.mark.parametrize("name", EVERY)
def test_each_hyper_alone_can_be_mapped_and_differentiated(name: str) -> None:
    """Laws 8 and 9, with all others as numbers: to torch, a function of a number and a tensor is
    not always one of two tensors.
    """
    opt, params = EVERY[name](), small_tree()
    grads, state = random_like(params, seed=5), opt.init(params)
    extras = WITH_EXTRAS[name][1](params) if name in WITH_EXTRAS else {}
    for own, number in opt.hyper.items():

        def moved(value: Any, own: str = own) -> Any:
            return opt(params, grads, state, {own: value}, **extras)[0]

        def total(value: Tensor) -> Tensor:
            return sum(leaf.sum() for leaf in optree.tree_leaves(moved(value)))

        value = torch.tensor(number, dtype=torch.float64)
        try:
            mapped = torch.func.vmap(moved)(value[None])
            slope = torch.func.grad(total)(value)
        except Exception as error:
            error.add_note(f"with {own!r} as a tensor")
            raise
        assert_close(member(mapped, 0), moved(number), rtol=1e-12, atol=1e-13)
        assert_finite(slope)


def test_init_can_be_mapped(opt: Optimizer) -> None:
    members = [small_tree(seed) for seed in range(MEMBERS)]
    assert_same(
        torch.func.vmap(opt.init)(stack(members)), stack([opt.init(tree) for tree in members])
    )


VARIANTS = {name for name in OPTIMIZERS for base in OPTIMIZERS if name.startswith(f"{base}_")}
"""Recipes with other options than one whose name theirs begins with: they compile as it does."""

COMPILED = [name for name in OPTIMIZERS if name not in VARIANTS]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", of_turn(COMPILED, 0, 6))  # a second and a half each
def test_compiles_once_and_gives_the_numbers_of_eager(name: str) -> None:
    """Law 10 and part of law 6: fullgraph, three steps, another lr (a 0-d tensor) at each, one
    compilation.
    """
    opt = OPTIMIZERS[name]()
    compiled = []

    def counting(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    fast = torch.compile(opt, fullgraph=True, backend=counting)
    params = small_tree()
    state = opt.init(params)
    expected = params, state
    for seed in range(3):
        hyper = (
            {"lr": torch.tensor(0.01 * (seed + 1), dtype=torch.float64)}
            if "lr" in opt.hyper
            else {}
        )
        grads = random_like(params, seed)
        params, state = fast(params, grads, state, hyper)
        expected = opt(expected[0], grads, expected[1], hyper)
    assert_same((params, state), expected)
    assert len(compiled) <= 1  # none at all if nothing is computed on tensors


@pytest.mark.usefixtures("fresh_compiler")
def test_init_compiles() -> None:
    opt, params = RECIPES["adamw"](), small_tree()
    assert_same(torch.compile(opt.init, fullgraph=True, backend="eager")(params), opt.init(params))


def smooth_loss(params: Any) -> Tensor:
    """A bowl with waves; its slope is far from 0 around the sample params."""
    return sum(
        ((leaf - 3).square() / 2 + torch.sin(leaf)).sum() for leaf in optree.tree_leaves(params)
    )


STEPS = 5


def several_steps(
    opt: Optimizer, loss: Callable[[Any], Tensor], params: Any, hyper: dict[str, Any]
) -> Any:
    """Params after some steps, differentiable through all of it, the gradients included."""
    state = opt.init(params)
    for _ in range(STEPS):
        params, state = opt(params, torch.func.grad(loss)(params), state, hyper)
    return params


def trajectory(opt: Optimizer, loss: Callable[[Any], Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Some steps as a function of lr and the leaves of the initial params."""
    spec = optree.tree_structure(small_tree())

    def run_from(lr: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        hyper = {"lr": lr} if "lr" in opt.hyper else {}
        return tuple(
            optree.tree_leaves(several_steps(opt, loss, optree.tree_unflatten(spec, leaves), hyper))
        )

    return run_from


def test_gradients_through_steps_match_finite_differences(opt: Optimizer) -> None:
    """Law 9, by lr and by initial params, along a random direction; in the long form by each
    number. Clips and signs have no kink near this trajectory.
    """
    leaves = [leaf.requires_grad_() for leaf in optree.tree_leaves(small_tree())]
    lr = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        trajectory(opt, smooth_loss),
        (lr, *leaves),
        eps=1e-6,
        atol=1e-6,
        rtol=1e-4,
        fast_mode=not LONG,
    )


@for_each("start", ["at zero", "elsewhere"])
def test_derivatives_are_finite_where_all_gradients_are_zero(opt: Optimizer, start: str) -> None:
    """Law 9: several steps on a flat loss."""
    leaves = [
        leaf * (0.0 if start == "at zero" else 1.0) for leaf in optree.tree_leaves(small_tree())
    ]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    lr = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    flat = trajectory(
        opt, lambda params: sum(0.0 * leaf.sum() for leaf in optree.tree_leaves(params))
    )
    total = sum(leaf.sum() for leaf in flat(lr, *leaves))
    assert_finite(
        [
            grad
            for grad in torch.autograd.grad(total, [lr, *leaves], allow_unused=True)
            if grad is not None
        ]
    )


def test_derivatives_are_finite_at_a_minimum(opt: Optimizer) -> None:
    """Law 9: zero gradients of a loss that is not flat."""
    leaves = [leaf.zero_().requires_grad_() for leaf in optree.tree_leaves(small_tree())]
    lr = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    bowl = trajectory(
        opt, lambda params: sum(leaf.square().sum() for leaf in optree.tree_leaves(params))
    )
    total = sum(leaf.sum() for leaf in bowl(lr, *leaves))
    assert_finite(
        [
            grad
            for grad in torch.autograd.grad(total, [lr, *leaves], allow_unused=True)
            if grad is not None
        ]
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # inside torch.func.jvp
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "identity"])
def test_forward_mode_agrees_with_reverse_mode(name: str) -> None:
    opt = OPTIMIZERS[name]()
    leaves, lr = optree.tree_leaves(small_tree()), torch.tensor(0.01, dtype=torch.float64)
    path = trajectory(opt, smooth_loss)
    _, forward = torch.func.jvp(lambda rate: path(rate, *leaves), (lr,), (torch.ones_like(lr),))
    reverse = torch.func.jacrev(lambda rate: path(rate, *leaves))(lr)
    assert_close(list(forward), list(reverse), rtol=1e-10, atol=1e-12)


def test_steps_on_plain_tensors_keep_no_graph() -> None:
    params = small_tree()
    after, state = run(RECIPES["adamw"](), params, steps=2)
    assert not any(leaf.requires_grad for leaf in optree.tree_leaves([after, state]))
