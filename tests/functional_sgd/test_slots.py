"""What is kept of each leaf: slots of any shape, and how many steps it has taken."""

from typing import Any

import pytest
import torch
from torch import Tensor

from functional_sgd import (
    adafactor,
    adam,
    adamw,
    chain,
    elementwise,
    fuse,
    leafwise,
    sgd,
    sgd_step,
)
from functional_sgd.state import extended
from tests.comparing import Untouched, assert_close, assert_same, member, stack

Columns = dict[str, Tensor]


def zeros_for_rows(param: Tensor) -> Tensor:
    """A number for each row; for a vector, for each element."""
    return param.new_zeros(param.shape[:1])


@leafwise(rows=zeros_for_rows)
def average_rows(grad: Tensor, rows: Tensor, *, mom: float = 0.5) -> Columns:
    """Move along the average gradient of every row."""
    rows = mom * rows + (1 - mom) * grad.flatten(1).mean(1) if grad.dim() > 1 else rows + grad
    shape = (-1, *(1,) * (grad.dim() - 1))
    return dict(rows=rows, update=rows.reshape(shape).expand_as(grad))


ROWS = chain(average_rows, sgd_step, lr=1.0)
MATRIX = torch.zeros(2, 3)
STEEP = torch.tensor([[1.0, 2.0, 3.0], [4.0, 4.0, 4.0]])


def test_a_slot_may_have_another_shape_than_its_leaf() -> None:
    params = {"m": MATRIX, "t": torch.zeros(4, 1, 2), "v": torch.zeros(5)}
    shapes = {name: slot.shape for name, slot in ROWS.init(params)["rows"].items()}
    assert shapes == {"m": (2,), "t": (4,), "v": (5,)}


def test_by_hand() -> None:
    """Means of the rows 2 and 4: averages 1 and 2, then 1.5 and 3."""
    params, state = MATRIX, ROWS.init(MATRIX)
    for rows, moved in (([1.0, 2.0], [-1.0, -2.0]), ([1.5, 3.0], [-2.5, -5.0])):
        params, state = ROWS(params, STEEP, state)
        assert_same(state["rows"], torch.tensor(rows))
        assert_same(params, torch.tensor(moved)[:, None].expand(2, 3))


def test_arguments_are_untouched() -> None:
    state = ROWS.init(MATRIX)
    snapshot = Untouched(MATRIX, STEEP, state)
    ROWS(MATRIX, STEEP, state)
    snapshot.check()


def test_without_a_gradient_such_a_slot_stays() -> None:
    params = {"a": MATRIX, "b": MATRIX}
    _, state = ROWS(params, {"a": STEEP, "b": None}, ROWS.init(params))
    assert_same(state["rows"], {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(2)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_such_a_slot_of_half_precision_params_is_float32(dtype: torch.dtype) -> None:
    params = MATRIX.to(dtype)
    after, state = ROWS(params, STEEP.to(dtype), ROWS.init(params))
    assert_same(state["rows"], torch.tensor([1.0, 2.0]))
    assert after.dtype == dtype


def test_members_of_an_ensemble_have_such_slots_of_their_own() -> None:
    params, grads = torch.stack([MATRIX, MATRIX]), torch.stack([STEEP, 2 * STEEP])
    state = stack([ROWS.init(MATRIX)] * 2)
    _, after = torch.func.vmap(ROWS)(params, grads, state)
    assert_same(member(after, 1)["rows"], torch.tensor([2.0, 4.0]))


@leafwise(longest=lambda param: param.new_zeros(()))
def keep_longest(grad: Tensor, longest: Tensor) -> Columns:
    """One number for each leaf."""
    return dict(longest=torch.maximum(longest, grad.norm()))


@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 2)], ids=str)
def test_one_number_for_each_leaf(shape: tuple[int, ...]) -> None:
    """Whatever the shape of the leaf is, also if it has none."""
    opt, params = chain(keep_longest, sgd_step, lr=1.0), torch.zeros(shape)
    state = opt.init(params)
    for size in (3.0, 1.0):
        _, state = opt(params, torch.full(shape, size), state)
    assert_same(state["longest"], torch.tensor(3.0 * params.numel() ** 0.5))


def test_an_elementwise_slot_has_the_shape_of_its_leaf() -> None:
    """Also where the trial cannot tell."""

    @elementwise(own=lambda param: param.new_zeros(3), writes=("own", "update"))
    def wrong(grad: Tensor, own: Tensor) -> Columns:
        return dict(own=own, update=grad)

    with pytest.raises(
        TypeError, match=r"slot of an elementwise rule has .*, \(4,\), .* as \(3,\)"
    ):
        chain(wrong, sgd_step).init(torch.zeros(4))


# Steps.

LEAVES = {"b": torch.zeros(1), "a": torch.zeros(1), "c": [torch.zeros(1)]}


def grads_of(*names: str) -> Any:
    """Ones for these leaves, None for the others."""
    given = {name: torch.ones(1) if name in names else None for name in "abc"}
    return {**given, "c": [given["c"]]}


def test_steps_begin_at_0_for_every_leaf() -> None:
    assert_same(sgd().init(LEAVES)["step"], torch.tensor([0, 0, 0]))
    assert_same(sgd().init({})["step"], torch.zeros(0, dtype=torch.int64))


def test_a_leaf_counts_the_updates_that_it_has_taken_in_the_order_of_the_keys() -> None:
    opt, params = sgd(lr=1.0), LEAVES
    state = opt.init(params)
    for names in ("b", "bc", "", "abc", "b"):
        params, state = opt(params, grads_of(*names), state)
    assert_same(state["step"], torch.tensor([1, 4, 2]))
    assert_same(
        params, {"a": torch.tensor([-1.0]), "b": torch.tensor([-4.0]), "c": [torch.tensor([-2.0])]}
    )


def test_a_rule_sees_the_steps_of_its_leaf_this_one_included() -> None:
    @elementwise
    def show(update: Tensor, *, step: Tensor) -> Columns:
        return dict(update=0 * update + step)

    opt = chain(show, sgd_step, lr=1.0)
    state = opt.init(LEAVES)
    for names in ("b", "bc", "b"):
        _, state = opt(LEAVES, grads_of(*names), state)
    after, _ = opt(LEAVES, grads_of("a", "b", "c"), state)
    assert_same(
        after, {"a": torch.tensor([-1.0]), "b": torch.tensor([-4.0]), "c": [torch.tensor([-2.0])]}
    )


def test_a_late_leaf_moves_as_if_it_were_alone() -> None:
    """Bit for bit, with the bias correction of its own first steps."""
    opt, params = adamw(lr=0.1), LEAVES
    state = opt.init(params)
    for _ in range(5):
        params, state = opt(params, grads_of("b"), state)
    alone, own = LEAVES["a"], opt.init(LEAVES["a"])
    for _ in range(3):
        params, state = opt(params, grads_of("a", "b"), state)
        alone, own = opt(alone, torch.ones(1), own)
    assert_same(params["a"], alone)


@pytest.mark.parametrize(
    "step",
    [
        torch.tensor(3),
        torch.tensor([3, 3]),
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(3, 1, dtype=torch.int64),
        3,
    ],
    ids=["of an earlier version", "too few", "too many", "a matrix", "a number"],
)
def test_a_state_with_other_counts_is_refused(step: Any) -> None:
    opt = adam()
    state = {**opt.init(LEAVES), "step": step}
    with pytest.raises(
        ValueError, match=r"state\['step'\] must have one entry for each of the 3 le"
    ):
        opt(LEAVES, LEAVES, state)


def test_counts_of_members_are_their_own() -> None:
    opt = adam(lr=0.1)
    late, early = opt.init(LEAVES), {**opt.init(LEAVES), "step": torch.tensor([8, 8, 8])}
    grads = grads_of("a", "b", "c")
    both = torch.func.vmap(lambda p, g, s: opt(p, g, s))(
        stack([LEAVES] * 2), stack([grads] * 2), stack([late, early])
    )
    for place, state in enumerate((late, early)):
        assert_close(member(both, place), opt(LEAVES, grads, state), rtol=1e-6)


def test_extended_keeps_what_is_known_and_begins_what_is_new() -> None:
    opt, some = adam(), {"b": LEAVES["b"], "x": torch.zeros(2)}
    _, state = opt(some, {"b": torch.ones(1), "x": None}, opt.init(some))
    fresh = opt.init({**some, "a": torch.zeros(3)})
    grown = extended(state, fresh, [("b",), ("x",)], [("a",), ("b",), ("x",)])
    assert_same(grown["step"], torch.tensor([0, 1, 0]))
    assert_same(grown["grad_avg"], {**state["grad_avg"], "a": torch.zeros(3)})


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("wrong", "found"),
    [(torch.zeros(5, 1), r"\(5, 1\)"), (torch.zeros(1, 1), r"\(1, 1\)"), (0.0, "float")],
)
def test_a_foreign_slot_of_a_shape_of_its_own_is_named(fused: bool, wrong: Any, found: str) -> None:
    """Also one that broadcasting would take, in the first step and after steps that were right."""
    opt = fuse(adafactor()) if fused else adafactor()
    params = {"matrix": torch.ones(3, 2), "vector": torch.ones(2)}
    state = opt.init(params)
    foreign = {**state, "rows": {**state["rows"], "matrix": wrong}}
    expected = rf"state\['rows'\] of 'matrix' must have the shape \(3, 1\), got {found}\."
    for _ in range(2):
        with pytest.raises(ValueError, match=expected):
            opt(params, params, foreign)
        opt(params, params, state)
