"""skip_nonfinite: a gradient that is not finite changes nothing but the counts."""

from typing import Any

import pytest
import torch

from functional_sgd import adamw, sgd, skip_large, skip_nonfinite
from tests.catalogue import random_like, sample_tree, small_tree
from tests.comparing import assert_finite, assert_same, member, stack

BAD = (float("nan"), float("inf"), -float("inf"))


def spoiled(grads: Any, value: float, path: str = "conv") -> Any:
    """The gradients with one bad element."""
    bad = grads[path].clone()
    bad.view(-1)[-1] = value
    return {**grads, path: bad}


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str
)
def test_a_step_that_is_skipped_leaves_everything_bit_for_bit(
    value: float, dtype: torch.dtype
) -> None:
    opt, params = skip_nonfinite(adamw(lr=0.1)), sample_tree(dtype=dtype)
    params, state = opt(params, random_like(params, 0), opt.init(params))
    after, new = opt(params, spoiled(random_like(params, 1), value), state)
    assert_same(after, params)
    assert_same(new["inner"], state["inner"])
    assert (int(new["calls"]), int(new["skipped"])) == (2, 1)


def test_without_bad_gradients_it_is_the_optimizer() -> None:
    opt, inner, params = skip_nonfinite(adamw(lr=0.1)), adamw(lr=0.1), sample_tree()
    state, expected, inner_state = opt.init(params), params, inner.init(params)
    for seed in range(3):
        grads = random_like(params, seed)
        params, state = opt(params, grads, state)
        expected, inner_state = inner(expected, grads, inner_state)
    assert_same((params, state["inner"]), (expected, inner_state))
    assert int(state["skipped"]) == 0


def test_after_skipping_it_goes_on_as_if_that_call_had_not_been() -> None:
    opt, params = skip_nonfinite(adamw(lr=0.1)), sample_tree()
    ends = []
    for bad in (True, False):
        after, state = params, opt.init(params)
        for seed in range(4):
            grads = random_like(params, seed)
            if seed == 2:
                grads = spoiled(grads, BAD[0])
            if seed != 2 or bad:
                after, state = opt(after, grads, state)
        ends.append((after, state["inner"]))
    assert_same(*ends)


def test_a_leaf_without_gradient_does_not_count() -> None:
    opt, params = skip_nonfinite(sgd(lr=1.0)), {"idle": torch.ones(1), "used": torch.ones(1)}
    after, state = opt(params, {"idle": None, "used": torch.ones(1)}, opt.init(params))
    assert_same(after, {"idle": torch.ones(1), "used": torch.zeros(1)})
    _, state = opt(params, {"idle": None, "used": None}, state)
    assert (int(state["calls"]), int(state["skipped"])) == (2, 0)


def test_every_member_of_an_ensemble_skips_for_itself() -> None:
    opt, members = skip_nonfinite(sgd(lr=1.0)), [small_tree(seed) for seed in range(3)]
    params, state = stack(members), stack([opt.init(tree) for tree in members])
    grads = stack(
        [
            spoiled(tree, BAD[0], "matrix") if index == 1 else tree
            for index, tree in enumerate(members)
        ]
    )
    after, state = torch.func.vmap(opt)(params, grads, state)
    assert_same(member(after, 1), members[1])
    assert_same(member(after, 2)["matrix"], torch.zeros(2, 3, dtype=torch.float64))
    assert state["skipped"].tolist() == [0, 1, 0]


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_skips_too() -> None:
    opt, params = skip_nonfinite(adamw(lr=0.1)), small_tree()
    fast = torch.compile(opt, fullgraph=True, backend="eager")
    params, state = fast(params, random_like(params, 0), opt.init(params))
    after, new = fast(params, spoiled(random_like(params, 1), BAD[1], "matrix"), state)
    assert_same((after, new["inner"]), (params, state["inner"]))


def test_derivatives_through_a_skipped_step_are_finite() -> None:
    """By the parameters the step is then the identity."""
    opt, start = (
        skip_nonfinite(adamw(lr=0.1)),
        torch.ones(2, dtype=torch.float64, requires_grad=True),
    )
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    grads = start * torch.tensor([float("nan"), 1.0])
    after, _ = opt(start, grads, opt.init(start), {"lr": lr})
    slopes = torch.autograd.grad(after.sum(), [lr, start], retain_graph=True, allow_unused=True)
    assert_same(slopes[0], torch.zeros_like(lr))
    detached, _ = opt(start, grads.detach(), opt.init(start), {"lr": lr})
    assert_same(torch.autograd.grad(detached.sum(), start)[0], torch.ones_like(start))
    assert_finite(after.detach())


def test_repr() -> None:
    assert repr(skip_nonfinite(sgd(lr=0.1))) == "skip_nonfinite(chain(sgd_step, lr=0.1))"


def bad_row(opt: Any, pattern: str) -> list[tuple[float, int, int]]:
    """(param, skipped, in a row) after each call along 1, or NaN where the pattern has an x."""
    params = torch.zeros(1)
    state, found = opt.init(params), []
    for sign in pattern:
        grad = torch.tensor([BAD[0] if sign == "x" else 1.0])
        params, state = opt(params, grad, state)
        found.append((float(params), int(state["skipped"]), int(state["in_a_row"])))
    return found


def test_with_a_limit_it_gives_up_after_so_many_in_a_row() -> None:
    opt = skip_nonfinite(sgd(lr=1.0), limit=2)
    assert bad_row(opt, ".xx.x") == [(-1, 0, 0), (-1, 1, 1), (-1, 2, 2), (-2, 2, 0), (-2, 3, 1)]
    end = bad_row(opt, ".xxx")[-1]
    assert end[0] != end[0]
    assert end[1:] == (2, 3)


def test_limit_0_skips_nothing() -> None:
    (end,) = bad_row(skip_nonfinite(sgd(lr=1.0), limit=0), "x")
    assert end[0] != end[0]
    assert end[1:] == (0, 1)


def test_a_long_gradient_is_skipped() -> None:
    """The length is that of all leaves: 5 is not shorter than 5."""
    opt, params = skip_large(sgd(lr=1.0)), {"a": torch.zeros(1), "b": torch.zeros(1)}
    grads, state = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, opt.init(params)
    same, state = opt(params, grads, state, {"max_norm": 5.0})
    assert_same(same, params)
    after, state = opt(params, grads, state, {"max_norm": 5.1})
    assert_same(after, {"a": torch.tensor([-3.0]), "b": torch.tensor([-4.0])})
    same, state = opt(params, {"a": torch.tensor([BAD[0]]), "b": None}, state, {"max_norm": 9.0})
    assert_same(same, params)
    assert (int(state["calls"]), int(state["skipped"])) == (3, 2)


def test_no_gradient_at_all_is_not_too_long() -> None:
    opt, params = skip_large(sgd(lr=1.0)), torch.zeros(1)
    _, state = opt(params, None, opt.init(params))
    assert int(state["skipped"]) == 0


def test_members_are_too_long_for_themselves() -> None:
    opt, params = skip_large(sgd(lr=1.0), max_norm=2.0), torch.zeros(2, 1)
    state = stack([opt.init(torch.zeros(1))] * 2)
    after, state = torch.func.vmap(opt)(params, torch.tensor([[1.0], [3.0]]), state)
    assert_same(after, torch.tensor([[-1.0], [0.0]]))
    assert state["skipped"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: skip_nonfinite(sgd(), limit=-1), "skip_nonfinite: limit must be at least 0"),
        (lambda: skip_large(sgd(), 0.0), "skip_large: hyper 'max_norm' must be above 0"),
    ],
)
def test_wrong_numbers_are_errors(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_repr_with_numbers() -> None:
    opt = skip_large(sgd(lr=0.1), 2.0, limit=3)
    assert repr(opt) == "skip_large(chain(sgd_step, lr=0.1), max_norm=2.0, limit=3)"
