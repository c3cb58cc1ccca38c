"""torch.optim's numbers where leaves join late or have no gradient: each counts its own steps."""

from typing import Any

import pytest
import torch
from torch import nn

from functional_sgd import adam, from_torch, to_torch
from tests.comparing import assert_same
from tests.peers.late import JOINS, STEPS, gradients, largest_gap, start
from tests.peers.test_torch_optim import CASES

pytestmark = pytest.mark.usefixtures("scalars_in_double")

LR = 0.01


def theirs_for(name: str) -> tuple[list[Any], torch.optim.Optimizer]:
    """Their params and their optimizer."""
    params = [leaf.requires_grad_() for leaf in start()]
    return params, CASES[name][0](params, LR)


def give(params: list[Any], grads: list[Any]) -> None:
    """param.grad = None where there is none."""
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.clone()


@pytest.mark.parametrize("name", CASES)
def test_every_step_is_that_of_torch(name: str) -> None:
    """Float64, sixty steps, within 1e-12 after each."""
    mirrored, theirs = theirs_for(name)
    params: Any = start()
    opt = CASES[name][1](LR)
    state = opt.init(params)
    for grads in gradients():
        give(mirrored, grads)
        theirs.step()
        params, state = opt(params, grads, state)
        assert largest_gap(params, mirrored) <= 1e-12


def test_the_leaves_of_this_run_have_counts_of_their_own() -> None:
    """Or the comparison would say nothing."""
    opt, params = adam(LR), start()
    state = opt.init(params)
    for grads in gradients():
        params, state = opt(params, grads, state)
    counts = state["step"].tolist()
    assert counts[0] == STEPS
    assert len({*counts}) == 4
    assert counts[3] <= STEPS - JOINS


def test_the_first_step_of_a_late_leaf_is_as_long_as_that_of_any_other() -> None:
    """lr, whatever the gradient: with the count of others it would be three times as long."""
    opt, params = adam(lr=0.1, eps=0.0), [torch.zeros(1), torch.zeros(1)]
    state = opt.init(params)
    for step in range(10):
        late = torch.tensor([7.0]) if step == 9 else None
        params, state = opt(params, [torch.ones(1), late], state)
    torch.testing.assert_close(params[1], torch.tensor([-0.1]))
    assert_same(state["step"], torch.tensor([10, 1]))


@pytest.mark.parametrize("after", [10, JOINS + 5])
@pytest.mark.parametrize("name", CASES)
def test_a_run_of_torch_is_taken_over_in_the_middle(name: str, after: int) -> None:
    """Before and after the last leaf has joined: each parameter goes on from its own count."""
    mirrored, theirs = theirs_for(name)
    names = {f"p{place}": param for place, param in enumerate(mirrored)}
    opt, params, state, hyper = None, None, None, None
    for step, grads in enumerate(gradients()):
        if step == after:
            opt, params, state, hyper = from_torch(theirs, names)
        give(mirrored, grads)
        theirs.step()
        if opt is not None:
            params, state = opt(params, dict(zip(names, grads, strict=True)), state, hyper)
    assert params is not None
    assert largest_gap(list(params.values()), mirrored) <= 1e-12


@pytest.mark.parametrize("name", CASES)
def test_as_one_of_torchs_it_leaves_params_without_gradient_alone_too(name: str) -> None:
    mirrored, theirs = theirs_for(name)
    params = [nn.Parameter(leaf) for leaf in start()]
    ours = to_torch(CASES[name][1](LR), params)
    for grads in gradients():
        for leaves, optimizer in ((mirrored, theirs), (params, ours)):
            give(leaves, grads)
            optimizer.step()
    assert largest_gap([param.detach() for param in params], mirrored) <= 1e-12


@pytest.mark.parametrize("named", [False, True], ids=["numbers", "names"])
@pytest.mark.parametrize("name", CASES)
def test_params_that_are_added_later_are_those_of_torch(name: str, named: bool) -> None:
    """In groups, at steps 20 and 40; each begins with its own first step."""
    mirrored, params = ([nn.Parameter(leaf) for leaf in start()] for _ in range(2))
    theirs = CASES[name][0](mirrored[:2], LR)
    names = ["m", "z", "a", "k"]
    given: Any = [*zip(names, params, strict=True)] if named else params
    ours = to_torch(CASES[name][1](LR), given[:2])
    for step, grads in enumerate(gradients()):
        for place, when in ((2, JOINS), (3, 2 * JOINS)):
            if step == when:
                theirs.add_param_group({"params": mirrored[place]})
                ours.add_param_group({"params": [given[place]]})
        for leaves, optimizer in ((mirrored, theirs), (params, ours)):
            give(
                leaves,
                [
                    torch.ones_like(leaf) if g is None else g
                    for leaf, g in zip(leaves, grads, strict=True)
                ],
            )
            optimizer.step()
    assert largest_gap([param.detach() for param in params], mirrored) <= 1e-12


def test_a_dozen_params_keep_what_is_theirs_when_another_is_added() -> None:
    """Numbers as names are sorted as words: 0, 1, 10, 11, 2."""
    every = [[nn.Parameter(torch.full((), float(k))) for k in range(13)] for _ in range(2)]
    optimizers = [torch.optim.Adam(every[0][:11], LR), to_torch(adam(LR), every[1][:11])]
    for step in range(6):
        for params, optimizer in zip(every, optimizers, strict=True):
            if step == 3:
                optimizer.add_param_group({"params": params[11:]})
            for place, param in enumerate(params):
                param.grad = torch.tensor(float(place * step - 7))
            optimizer.step()
    assert largest_gap([param.detach() for param in every[1]], every[0]) <= 1e-6


def test_an_added_group_has_hypers_of_its_own() -> None:
    every = [[nn.Parameter(leaf) for leaf in start()] for _ in range(2)]
    optimizers = [
        torch.optim.AdamW(every[0][:2], LR),
        to_torch(CASES["adamw"][1](LR), every[1][:2]),
    ]
    for step, grads in enumerate(gradients()):
        for params, optimizer, wd in zip(every, optimizers, ("weight_decay", "wd"), strict=True):
            if step == JOINS:
                optimizer.add_param_group({"params": params[2:], "lr": 0.05, wd: 0.3})
            give(params, grads)
            optimizer.step()
    assert largest_gap([param.detach() for param in every[1]], every[0]) <= 1e-12
